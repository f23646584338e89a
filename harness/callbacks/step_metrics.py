"""Records the loss and learning rate of single optimizer steps."""

from __future__ import annotations

from torch import Tensor

from harness.callback import Callback
from harness.checks.values import check_count


class StepMetrics(Callback):
    """Records the loss and learning rate every `every` optimizer steps.

    Values go to the journal (and to MLflow as ``train/loss_step``) but not into
    ``ctx.records``, so memory does not grow. Losses are copied on their device and read
    later, not in the step.

    Parameters
    ----------
    every : >= 1
        Optimizer steps from one record to the next.

    Raises
    ------
    ValueError
        If `every` is below 1.
    """

    weight = 10

    def __init__(self, every: int = 1) -> None:
        check_count("StepMetrics(every)", every, 1, "Use 1 for every step.")
        self.every = every

    def on_train_batch_after_step(self) -> None:
        """Record the finished step."""
        ctx = self.ctx
        if ctx.step % self.every:
            return
        name = ctx.opt_name
        tail = f"/{name}" if len(ctx.optimizers) > 1 else ""
        rate = ctx.opt.param_groups[0]["lr"]
        if not isinstance(rate, Tensor):  # one on a device is read later
            rate = float(rate)
        ctx.log_step({f"loss{tail}": ctx.loss[name], f"lr{tail}": rate})
