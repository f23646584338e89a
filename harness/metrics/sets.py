"""Metrics of training and of validation, by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from harness.checks.calls import check_call
from harness.checks.values import check_count
from harness.events import nearest
from harness.metrics.type_checks import is_collection, is_metric, is_tracker

MAX_NAMED = 100
"""A metric with a vector of more elements is logged as a list, not element by element."""


@dataclass(frozen=True, kw_only=True, init=False)
class MetricSet:
    """Metrics of training, of validation, or of both.

    Parameters
    ----------
    both
        Metrics of training and validation: one, a list, or a dict by name.
    train, valid
        Metrics of this split only: one, a list, or a dict by name.
    every
        Epochs from one computation to the next, by name, for metrics that take long: with
        ``{"fid": 5}``, only epochs 5, 10, ... have a value. In a fit that validates by
        steps, validations are counted. ``evaluate`` computes all metrics.

    References
    ----------
    luz 0.5.0, ``luz_metric_set``.
    """

    train: dict[str, Any]
    valid: dict[str, Any]
    every: dict[str, int]

    def __init__(
        self,
        both: object = None,
        *,
        train: object = None,
        valid: object = None,
        every: Mapping[str, int] | None = None,
    ) -> None:
        common = name_metrics(both)
        for split, own in (("train", train), ("valid", valid)):
            names = name_metrics(own)
            for name in names:
                if name in common:
                    msg = f"MetricSet({split}): expected new names, got {name!r} twice."
                    raise ValueError(f"{msg} Give a dict with other names.")
            object.__setattr__(self, split, common | names)
        known = {**self.train, **self.valid}
        object.__setattr__(self, "every", check_every(every or {}, known))


def check_every(every: object, known: Mapping[str, object]) -> dict[str, int]:
    """Return ``MetricSet(every=...)`` as a dict."""
    if not isinstance(every, Mapping):
        msg = f"MetricSet(every): expected numbers of epochs by name, got {every!r}."
        raise TypeError(f'{msg} Write for example {{"fid": 5}}.')
    for name, epochs in every.items():
        if name not in known:
            msg = f"MetricSet(every): expected names of metrics, got {name!r}."
            raise ValueError(f"{msg}{nearest(str(name), known)} It has {list(known)}.")
        advice = "Leave it out for each epoch."
        check_count(f"MetricSet(every[{name!r}])", epochs, 1, advice)
    return {name: int(epochs) for name, epochs in every.items()}


def as_metric_set(metrics: object) -> MetricSet:
    """The argument of ``setup(metrics=...)`` as a ``MetricSet``."""
    return metrics if isinstance(metrics, MetricSet) else MetricSet(metrics)


def name_metrics(metrics: object) -> dict[str, Any]:
    """Metrics by name: the key in a dict, otherwise the class name in snake case.

    Those of a ``MetricCollection`` have its names, after its own name in a dict.
    """
    if metrics is None:
        return {}
    found: dict[str, object] = {}
    for name, item in _list_named(metrics):
        if not isinstance(name, str):
            msg = f"metrics: expected names of metrics, got {name!r}."
            raise TypeError(f"{msg} Write them as text.")
        if name in found or name == "loss":
            msg = f"metrics: expected each name once ('loss' is taken), got {name!r}."
            raise ValueError(f"{msg} Give a dict with other names.")
        found[name] = item
    return found


def _list_named(metrics: object) -> Iterator[tuple[object, object]]:
    """Each metric with its name; those of a collection among others one by one."""
    if isinstance(metrics, Mapping):
        for name, item in metrics.items():
            if is_collection(item):
                yield from ((f"{name}_{key}", inner) for key, inner in item.items())
            else:
                yield name, check_metric(item, name)
        return
    items = metrics if isinstance(metrics, list | tuple) else [metrics]
    for n, item in enumerate(items):
        if is_collection(item):
            yield from item.items()
        else:
            yield metric_name(check_metric(item, n)), item


def check_metric(item: object, place: str | int) -> Any:
    """The item, if it is a metric or a function; raise ``TypeError`` otherwise."""
    if isinstance(item, type):
        msg = (
            f"metrics[{place!r}]: expected an instance, got the class {item.__name__}."
        )
        raise TypeError(f"{msg} Write {item.__name__}(...).")
    if is_tracker(item):
        msg = f"metrics[{place!r}]: expected a metric of one epoch, got MetricTracker."
        raise TypeError(f"{msg} Give the metric in it: records keep every epoch.")
    if type(item).__module__ == "torchmetrics.aggregation":
        kind = type(item).__name__
        msg = f"metrics[{place!r}]: expected a metric of pred and target, got {kind}."
        advice = "ctx.log_metric(name, value) averages values of batches. A subclass"
        raise TypeError(f"{msg} {advice} may have its own update(pred, target).")
    if not callable(item) or is_collection(item):
        msg = f"metrics[{place!r}]: expected a metric, got {item!r}."
        raise TypeError(
            f"{msg} Give a torchmetrics object or a function f(pred, target)."
        )
    if not is_metric(item):
        check_call(f"metrics[{place!r}]", item, "pred", "target")
    return item


def metric_name(item: object) -> str:
    """Class or function name in snake case; ``MulticlassAccuracy`` is ``multiclass_accuracy``."""
    name = getattr(item, "__name__", type(item).__name__)
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return name.lower().strip("<>")
