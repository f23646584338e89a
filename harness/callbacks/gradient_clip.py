"""Clips gradients before each optimizer step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from harness.callback import Callback
from harness.checks.values import check_flags, check_more_than

if TYPE_CHECKING:
    from harness.context import Context


class GradientClip(Callback):
    """Clips the total gradient norm of the stepping optimizer, and records the norm.

    The norm before clipping is the metric ``grad_norm`` of training: each step is recorded,
    and the epoch has the mean.

    Parameters
    ----------
    max_norm : > 0
        Largest norm; larger gradients are scaled down to it.
    norm_type : > 0 or inf
        Order of the norm.
    record
        Whether to record the norm.

    References
    ----------
    luz 0.5.0, ``luz_callback_gradient_clip``; torch ``clip_grad_norm_``.
    """

    def __init__(
        self, max_norm: float = 1.0, norm_type: float = 2.0, *, record: bool = True
    ) -> None:
        advice = "Remove the callback to clip nothing."
        check_more_than("GradientClip(max_norm)", max_norm, 0, advice)
        check_more_than("GradientClip(norm_type)", norm_type, 0, "Leave it out for 2.")
        check_flags("GradientClip", record=record)
        self.max_norm, self.norm_type, self.record = max_norm, norm_type, record
        self._norm: Tensor | None = None

    def check(self, ctx: Context) -> None:
        """Refuse a norm that an engine cannot compute."""
        if self.norm_type != 2.0 and "stage" in ctx.accelerator.state_dict():
            msg = "GradientClip(norm_type): expected 2.0 under DeepSpeed"
            advice = "DeepSpeed supports only the Euclidean norm."
            raise ValueError(f"{msg}, got {self.norm_type!r}. {advice}")

    def on_train_batch_before_step(self) -> None:
        name = self.ctx.opt_name
        norm = self.ctx.accelerator.clip(self.max_norm, name, self.norm_type)
        if not getattr(self.ctx, "is_repeated", False):
            self._norm = norm

    def on_train_batch_after_step(self) -> None:
        """Record the norm, which engines know only after the step."""
        if self.record and self._norm is not None:
            several = len(self.ctx.optimizers) > 1
            norm = {self.ctx.opt_name: self._norm} if several else self._norm
            self.ctx.log_metric("grad_norm", norm)
