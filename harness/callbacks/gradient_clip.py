"""Clips gradients before each optimizer step."""

from __future__ import annotations

from harness.callback import Callback
from harness.setup_checks import check_more_than


class GradientClip(Callback):
    """Clips the total gradient norm of the stepping optimizer.

    Parameters
    ----------
    max_norm : > 0
        Largest norm; larger gradients are scaled down to it.
    norm_type : > 0 or inf
        Order of the norm.

    References
    ----------
    luz 0.5.0, ``luz_callback_gradient_clip``; torch ``clip_grad_norm_``.
    """

    def __init__(self, max_norm: float = 1.0, norm_type: float = 2.0) -> None:
        advice = "Remove the callback to clip nothing."
        check_more_than("GradientClip(max_norm)", max_norm, 0, advice)
        check_more_than("GradientClip(norm_type)", norm_type, 0, "Leave it out for 2.")
        self.max_norm, self.norm_type = max_norm, norm_type

    def on_train_batch_before_step(self) -> None:
        """Clip the gradients of the current optimizer."""
        assert self.ctx.accelerator is not None
        self.ctx.accelerator.clip(self.max_norm, self.ctx.opt_name, self.norm_type)
