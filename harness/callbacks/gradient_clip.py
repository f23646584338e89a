"""Clips gradients before each optimizer step."""

from __future__ import annotations

from harness.callback import Callback
from harness.setup_checks import check_number


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
        check_number("GradientClip(max_norm)", max_norm, advice)
        check_number("GradientClip(norm_type)", norm_type, "Leave it out for 2.")
        if not norm_type > 0:
            msg = f"GradientClip(norm_type): expected more than 0, got {norm_type!r}."
            raise ValueError(f"{msg} Leave it out for 2.")
        if not max_norm > 0:
            msg = f"GradientClip(max_norm): expected more than 0, got {max_norm!r}."
            raise ValueError(f"{msg} {advice}")
        self.max_norm, self.norm_type = max_norm, norm_type

    def on_train_batch_before_step(self) -> None:
        """Clip the gradients of the current optimizer."""
        assert self.ctx.accelerator is not None
        self.ctx.accelerator.clip(self.max_norm, self.ctx.opt_name, self.norm_type)
