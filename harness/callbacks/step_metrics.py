"""Per-step series: the loss and learning rate of single optimizer steps."""

from __future__ import annotations

from harness.callback import Callback


class StepMetrics(Callback):
    """Records the loss and learning rate every `every` optimizer steps.

    They go to the journal (and MLflow, as ``train/loss_step``), not into ``ctx.records``, so
    memory does not grow; losses are copied on their device and read out off the step.

    Parameters
    ----------
    every : >= 1
        Optimizer steps between two records.

    Raises
    ------
    ValueError
        If `every` is below 1.
    """

    weight = 10

    def __init__(self, every: int = 1) -> None:
        if every < 1:
            msg = f"StepMetrics(every): expected at least 1, got {every!r}."
            raise ValueError(f"{msg} Use 1 for every step.")
        self.every = every

    def on_train_batch_after_step(self) -> None:
        """Record the step that was finished."""
        ctx = self.ctx
        if ctx.step % self.every:
            return
        name = ctx.opt_name
        tail = f"/{name}" if len(ctx.optimizers) > 1 else ""
        rate = float(ctx.opt.param_groups[0]["lr"])
        ctx.log_step({f"loss{tail}": ctx.loss[name], f"lr{tail}": rate})
