"""Updates the metrics of all sets and logs them once an epoch, or at each validation."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from harness.callback import Callback
from harness.metrics.plots import as_points, draw, is_curve
from harness.metrics.sets import MetricSet
from harness.metrics.split import SplitMetrics, count_batch_values
from harness.pytree import StateDict, iter_tensors

if TYPE_CHECKING:
    from torchmetrics import Metric

LOOK_BATCHES = 128
"""Batches after which losses on a device are read to look for a NaN: a read waits for it."""


class Metrics(Callback):
    """Resets, updates and logs losses and metrics, which are in ``ctx.metrics`` by split.

    Parameters
    ----------
    metrics
        Metrics of both splits.

    References
    ----------
    luz 0.5.0, ``luz_callback_metrics``. Differs from luz: values are read from the device
    once an epoch.
    """

    weight = -10

    def __init__(self, metrics: MetricSet) -> None:
        self.metric_set = metrics
        self._has_warned: set[str] = set()

    def get_metrics(self, split: str) -> dict[str, Any]:
        """Return the metrics of a set by name; all sets of validation data have the same."""
        return self.metric_set.train if split == "train" else self.metric_set.valid

    def _start(self, split: str) -> None:
        ctx = self.ctx
        if ctx.metrics is None:
            ctx.metrics = {}
        metrics = self.get_metrics(split)
        if split not in ctx.metrics:
            ctx.metrics[split] = SplitMetrics(metrics, ctx.accelerator)
            ctx.metrics[split].bind(ctx)
        every, place = self.metric_set.every, self._count(split)
        due = [name for name in metrics if place % every.get(name, 1) == 0]
        ctx.metrics[split].reset(due if every else None)

    def _count(self, split: str) -> int:
        """Number of the epoch, or of the validation by steps; 0 outside of a fit."""
        ctx = self.ctx
        if ctx.train_pass is None:
            return 0
        if ctx.pace.unit == "epoch":
            return ctx.epoch or 0
        return ctx.step // ctx.pace.every + (split == "train")

    def _get(self, split: str) -> SplitMetrics:
        assert self.ctx.metrics is not None
        return self.ctx.metrics[split]

    def _update(self, split: str) -> None:
        ctx = self.ctx
        if ctx.pred is None and not ctx.loss:
            return  # a step of the model's own left this batch out
        # A rank without samples left gets a stand-in batch, which must not count.
        rows = 0 if ctx.accelerator.counted == 0 else ctx.rows
        metrics = self._get(split)
        is_nan = metrics.update(ctx.pred, ctx.target, ctx.loss, rows)
        if is_nan is False or not rows or split in self._has_warned:
            return
        # Warn of the first one: at once on the CPU, within 128 batches on a device.
        if is_nan:
            self._warn_of_nan(split, 0)
        elif (ctx.iter or 0) % LOOK_BATCHES == 0:
            self._look_at_waiting(split)

    def _look_at_waiting(self, split: str) -> None:
        ago = self._get(split).loss.find_nan()
        if ago is not None:
            self._warn_of_nan(split, ago)

    def _warn_of_nan(self, split: str, ago: int) -> None:
        self._has_warned.add(split)
        ctx = self.ctx
        where = f"epoch {ctx.epoch}, batch {(ctx.iter or 0) - ago}"
        msg = (
            f"{split}/loss: expected a number, got nan in {where}. Training continues."
        )
        advice = "Look at this batch, or use a lower learning rate or GradientClip."
        parts = {"input": ctx.input, "target": ctx.target} if ago == 0 else {}
        found = [name for name, part in parts.items() if _has_nan(part)]
        if found:
            advice = (
                f"The {' and the '.join(found)} of the batch has nan: clean the data."
            )
        warnings.warn(f"{msg} {advice}", stacklevel=2)

    def _log(self, split: str) -> None:
        metrics = self._get(split)
        if split not in self._has_warned and metrics.loss.is_on_device:
            self._look_at_waiting(split)
        found = metrics.compute(self.ctx.pred, self.ctx.target)
        for name, value in found.items():
            self.ctx.log_metric(name, value)
        for name, (metric, value) in metrics.plotted.items():
            self._log_plotted(split, name, metric, value)

    def _log_plotted(self, split: str, name: str, metric: Metric, value: Any) -> None:
        """Record the points of curves, and the figure of a curve or a matrix."""
        ctx = self.ctx
        if is_curve(metric, value):
            points = as_points(value)
            if points is not None:
                ctx.log("curves", split, {name: points}, index=ctx.index)
        if ctx.run.id is None or not ctx.accelerator.is_main:
            return
        try:
            figure = draw(metric, value)
        except Exception as error:  # noqa: BLE001  a picture ends no training
            if f"{split}/{name}" not in self._has_warned:
                self._has_warned.add(f"{split}/{name}")
                msg = f"metrics[{name!r}]: expected to draw its value, got"
                text = f"{msg} {type(error).__name__}: {error}. Training continues."
                warnings.warn(text, stacklevel=2)
            return
        ctx.run.log_figure(figure, f"{split}/{name}", step=ctx.step, epoch=ctx.epoch)

    def on_train_begin(self) -> None:
        self._start("train")

    def on_train_batch_end(self) -> None:
        self._update("train")

    def on_train_end(self) -> None:
        self._log("train")

    def on_valid_begin(self) -> None:
        self._start(self.ctx.split)

    def on_valid_batch_end(self) -> None:
        self._update(self.ctx.split)

    def on_valid_end(self) -> None:
        self._log(self.ctx.split)

    def state_dict(self) -> StateDict:
        """Return the states of both splits; a resumed fit repeats an interrupted validation."""
        count_batch_values(self.ctx)
        is_training = self.ctx.training
        return {
            split: metrics.state_dict(is_running=is_training and split == "train")
            for split, metrics in (self.ctx.metrics or {}).items()
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the states; a list has one state for each rank that saved."""
        for split, item in state.items():
            self._start(split)
            first, *rest = item if isinstance(item, list) else [item]
            self._get(split).load_state_dict(first)
            for other in rest:
                self._get(split).merge(other)


def _has_nan(value: object) -> bool:
    """Whether a tensor of an input or target has a NaN."""
    return any(
        tensor.is_floating_point() and bool(tensor.isnan().any())
        for tensor in iter_tensors(value)
    )
