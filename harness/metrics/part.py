"""Metrics and losses of one part of predictions and targets, such as one head of several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.wrappers.abstract import WrapperMetric

from harness.checks.calls import check_call
from harness.events import nearest
from harness.metrics.sets import metric_name

Key = str | int | Callable[[Any], object] | None
"""Which part: a key or attribute, a position or column, a function, or None for all of it."""


def on(metric: Any, *, pred: Key = None, target: Key = None) -> Any:
    """Apply a metric or a loss to one part of the prediction and the target.

    Parameters
    ----------
    metric
        torchmetrics object, loss module, or function ``f(pred, target)``.
    pred, target
        Which part: a key of a dict or an attribute, the position in a tuple or the column of
        a tensor, or a function that returns the part. None: all of it.

    Returns
    -------
    A metric or a loss for ``setup`` and ``evaluate``. In a list of metrics its name ends in the
    key: ``multiclass_accuracy_digit``.

    Raises
    ------
    TypeError, ValueError
        If `metric` is not a metric, or a key has the wrong type. In the first batch, if
        there is no such part.

    Examples
    --------
    >>> import torch
    >>> digit = on(nn.CrossEntropyLoss(), pred="digit", target=0)
    >>> loss = digit({"digit": torch.zeros(1, 2)}, (torch.tensor([1]), None))
    >>> round(float(loss), 4)
    0.6931
    """
    if isinstance(metric, type | MetricCollection) or not callable(metric):
        name = metric.__name__ if isinstance(metric, type) else repr(metric)
        msg = f"on(metric): expected a metric or a function, got {name:.100}."
        raise TypeError(f"{msg} Pass an instance, and call on() for each metric.")
    for place, key in (("pred", pred), ("target", target)):
        is_key = isinstance(key, str | int) and not isinstance(key, bool)
        if key is not None and not is_key and not callable(key):
            msg = f"on({place}): expected a key, a position or a function, got {key!r}."
            raise TypeError(f"{msg} A function returns the part.")
    if pred is None and target is None:
        msg = "on: expected pred=... or target=..., got neither."
        raise ValueError(f"{msg} Pass the metric itself for all of both.")
    if isinstance(metric, Metric):
        return PartMetric(metric, pred, target)
    check_call("on(metric)", metric, "pred", "target")
    return PartLoss(metric, pred, target)


def select(value: Any, key: Key, place: str) -> Any:
    """Return the part of a prediction or target."""
    if key is None:
        return value
    if isinstance(key, int) and isinstance(value, Tensor):
        if value.dim() > 1 and -value.shape[1] <= key < value.shape[1]:
            return value[:, key]
        raise _missing(place, key, f"a tensor of shape {tuple(value.shape)}")
    if callable(key):
        return key(value)
    if isinstance(value, Mapping) and key in value:
        return value[key]
    if isinstance(value, Mapping):
        guess = nearest(str(key), map(str, value))
        raise _missing(place, key, f"a dict of {list(value)}", guess)
    if isinstance(key, int) and isinstance(value, tuple | list):
        if -len(value) <= key < len(value):
            return value[key]
        raise _missing(place, key, f"a {type(value).__name__} of {len(value)}")
    if isinstance(key, str) and hasattr(value, key):
        return getattr(value, key)
    raise _missing(place, key, f"a {type(value).__name__}")


def _missing(place: str, key: object, got: str, guess: str = "") -> ValueError:
    what = {"pred": "a prediction", "target": "a target"}[place]
    msg = f"on({place}={key!r}): expected {what} with {key!r}, got {got}."
    return ValueError(f"{msg}{guess} Pass a function for another part.")


def _name(metric: object, pred: Key, target: Key) -> str:
    key = target if pred is None else pred
    if callable(key):
        key = getattr(key, "__name__", "").strip("<>").replace("lambda", "")
    return "_".join(part for part in (metric_name(metric), str(key)) if part)


class PartMetric(WrapperMetric):
    """A torchmetrics object on one part of predictions and targets; see ``on``."""

    def __init__(self, metric: Metric, pred: Key, target: Key) -> None:
        super().__init__()
        self.metric, self.pred, self.target = metric, pred, target

    @property
    def __name__(self) -> str:
        """Name in a list of metrics."""
        return _name(self.metric, self.pred, self.target)

    @property
    def higher_is_better(self) -> bool | None:  # type: ignore[override]
        """As of the metric."""
        return self.metric.higher_is_better

    def update(self, pred: object, target: object) -> None:
        """Update the metric with the parts of a batch."""
        own = select(pred, self.pred, "pred")
        self.metric.update(own, select(target, self.target, "target"))

    def compute(self) -> Any:
        """The value of the metric."""
        return self.metric.compute()

    def forward(self, pred: object, target: object) -> Any:
        """The value of the metric for the parts of a batch."""
        own = select(pred, self.pred, "pred")
        return self.metric(own, select(target, self.target, "target"))

    def reset(self) -> None:
        """Reset the metric."""
        super().reset()
        self.metric.reset()


class PartLoss(nn.Module):
    """A loss, or a function as a metric, on one part of predictions and targets; see ``on``."""

    def __init__(self, function: Callable[..., Any], pred: Key, target: Key) -> None:
        super().__init__()
        self.function, self.pred, self.target = function, pred, target

    @property
    def __name__(self) -> str:
        """Name in a list of metrics."""
        return _name(self.function, self.pred, self.target)

    def forward(self, pred: object, target: object) -> Any:
        """The value for the parts of a batch."""
        own = select(pred, self.pred, "pred")
        return self.function(own, select(target, self.target, "target"))
