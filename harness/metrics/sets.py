"""The metrics of a fit by name: which are for training, which for validation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchmetrics import MetricCollection

if TYPE_CHECKING:
    pass

MAX_NAMED = 100
"""Elements of a vector-valued metric that are logged by their own names at most."""


@dataclass(frozen=True, kw_only=True, init=False)
class MetricSet:
    """Metrics for both splits, or for one alone.

    Parameters
    ----------
    both
        Metrics of training and validation: one, a list, or a dict by name.
    train, valid
        Metrics of one split alone, in the same forms.

    References
    ----------
    luz 0.5.0, ``luz_metric_set``.
    """

    train: dict[str, Any]
    valid: dict[str, Any]

    def __init__(
        self, both: Any = None, *, train: Any = None, valid: Any = None
    ) -> None:
        common = named_metrics(both)
        for split, own in (("train", train), ("valid", valid)):
            names = named_metrics(own)
            for name in names:
                if name in common:
                    msg = f"MetricSet({split}): expected new names, got {name!r} twice."
                    raise ValueError(f"{msg} Give a dict with other names.")
            object.__setattr__(self, split, common | names)


def as_metric_set(metrics: Any) -> MetricSet:
    """A ``MetricSet`` of whatever ``setup(metrics=...)`` was given."""
    return metrics if isinstance(metrics, MetricSet) else MetricSet(metrics)


def named_metrics(metrics: Any) -> dict[str, Any]:
    """Checked metrics by name: the dict's key, else the class in snake case.

    Raises
    ------
    TypeError
        If one is neither a torchmetrics object nor a function.
    ValueError
        If two have the same name, or one is called ``loss``.
    """
    if metrics is None:
        return {}
    if isinstance(metrics, MetricCollection):
        metrics = dict(metrics.items())
    if isinstance(metrics, Mapping):
        pairs = [(name, check_metric(item, name)) for name, item in metrics.items()]
    else:
        items = metrics if isinstance(metrics, list | tuple) else [metrics]
        pairs = [
            (metric_name(check_metric(item, n)), item) for n, item in enumerate(items)
        ]
    found: dict[str, Any] = {}
    for name, item in pairs:
        if name in found or name == "loss":
            msg = f"metrics: expected each name once ('loss' is taken), got {name!r}."
            raise ValueError(f"{msg} Give a dict with other names.")
        found[name] = item
    return found


def check_metric(item: Any, place: str | int) -> Any:
    """The metric, if it is one; a class is refused."""
    if isinstance(item, type):
        msg = (
            f"metrics[{place!r}]: expected an instance, got the class {item.__name__}."
        )
        raise TypeError(f"{msg} Write {item.__name__}(...).")
    if not callable(item) or isinstance(item, MetricCollection):
        msg = f"metrics[{place!r}]: expected a metric, got {item!r}."
        raise TypeError(
            f"{msg} Give a torchmetrics object or a function f(pred, target)."
        )
    return item


def metric_name(item: Any) -> str:
    """Class or function name in snake case; ``MulticlassAccuracy`` is ``multiclass_accuracy``."""
    name = getattr(item, "__name__", type(item).__name__)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return name.lower().strip("<>")
