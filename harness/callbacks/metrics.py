"""Keeps the metrics of both splits up to date and logs them once an epoch."""

from __future__ import annotations

from typing import Any

from harness.callback import Callback
from harness.data.batch import num_rows
from harness.metrics.sets import MetricSet
from harness.metrics.split import SplitMetrics


class Metrics(Callback):
    """Resets, updates and logs losses and metrics; they lie in ``ctx.metrics`` by split.

    Parameters
    ----------
    metrics
        What both splits measure.

    References
    ----------
    luz 0.5.0, ``luz_callback_metrics``. Differs from luz: values are read from the device
    once an epoch.
    """

    weight = -10

    def __init__(self, metrics: MetricSet) -> None:
        self.metric_set = metrics

    def _start(self, split: str) -> None:
        ctx = self.ctx
        if ctx.metrics is None:
            ctx.metrics = {}
        if split not in ctx.metrics:
            assert ctx.accelerator is not None
            ctx.metrics[split] = SplitMetrics(
                getattr(self.metric_set, split), ctx.accelerator
            )
        ctx.metrics[split].reset()

    def _update(self, split: str) -> None:
        ctx = self.ctx
        assert ctx.accelerator is not None
        # A batch that only stands in, for a rank with no sample left, counts for nothing.
        rows = 0 if ctx.accelerator.counted == 0 else num_rows(ctx.batch)
        ctx.metrics[split].update(ctx.pred, ctx.target, ctx.loss, rows)

    def _log(self, split: str) -> None:
        for name, value in self.ctx.metrics[split].compute().items():
            self.ctx.log_metric(name, value)

    def on_train_begin(self) -> None:
        """Start from nothing."""
        self._start("train")

    def on_train_batch_end(self) -> None:
        """Take in the batch."""
        self._update("train")

    def on_train_end(self) -> None:
        """Log the epoch's values."""
        self._log("train")

    def on_valid_begin(self) -> None:
        """Start from nothing."""
        self._start("valid")

    def on_valid_batch_end(self) -> None:
        """Take in the batch."""
        self._update("valid")

    def on_valid_end(self) -> None:
        """Log the values."""
        self._log("valid")

    def state_dict(self) -> dict[str, Any]:
        """States of both splits; validation is begun again when it was stopped."""
        is_training = self.ctx.training
        return {
            split: metrics.state_dict(is_running=is_training and split == "train")
            for split, metrics in (self.ctx.metrics or {}).items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the states; a list of them comes from several ranks."""
        for split, item in state.items():
            self._start(split)
            first, *others = item if isinstance(item, list) else [item]
            self.ctx.metrics[split].load_state_dict(first)
            for other in others:
                self.ctx.metrics[split].join(other)
