"""Tell torchmetrics objects without importing torchmetrics, which takes as long as torch."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from torchmetrics import Metric, MetricCollection


def is_metric(thing: object) -> TypeGuard[Metric]:
    """Whether a thing is a torchmetrics metric; none exists before somebody imports it."""
    return _is_a("Metric", thing)


def is_collection(thing: object) -> TypeGuard[MetricCollection]:
    """Whether a thing is a torchmetrics ``MetricCollection``."""
    return _is_a("MetricCollection", thing)


def is_tracker(thing: object) -> bool:
    """Whether a thing is a torchmetrics ``MetricTracker``, which keeps metrics of many epochs."""
    return _is_a("MetricTracker", thing)


def as_metric(item: Any) -> Metric:
    """The metric itself, or the average of a function."""
    if is_metric(item):
        return item
    from harness.metrics.functions import FunctionAverage  # noqa: PLC0415  slow to import

    return FunctionAverage(item)


def _is_a(name: str, thing: object) -> bool:
    kind = getattr(sys.modules.get("torchmetrics"), name, None)
    return isinstance(kind, type) and isinstance(thing, kind)
