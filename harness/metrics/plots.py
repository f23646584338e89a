"""Metrics whose value is no number: curves and matrices, and the figures that show them."""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from harness.metrics.type_checks import is_metric

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchmetrics import Metric

MAX_NUMBERS = 40_000
"""Numbers of a value that are recorded. Of longer curves some points are left out."""


MAX_WRITTEN = 30
"""Rows of a matrix whose cells are written out in its figure; each takes a millisecond."""


def get_plotted(metric: Metric) -> Metric | None:
    """The metric that can plot itself, such as the one that ``on`` applies; None: none can."""
    from torchmetrics import Metric  # noqa: PLC0415  slow to import

    inner = getattr(metric, "metric", None)
    own = inner if is_metric(inner) else metric
    return own if type(own).plot is not Metric.plot else None


def is_curve(metric: Metric, value: object) -> bool:
    """Whether a value is curves: lists of tensors of a metric that plots them."""
    if not isinstance(value, tuple | list) or get_plotted(metric) is None:
        return False
    return any(tensor.ndim > 0 for tensor in _iter_tensors(value))


def is_matrix(metric: Metric, value: object) -> bool:
    """Whether a value is a matrix, or several, of a metric that plots it."""
    is_plotted = isinstance(value, Tensor) and value.ndim > 1
    return is_plotted and get_plotted(metric) is not None


def as_points(value: object) -> Any:
    """Curves as nested lists of at most 40,000 numbers; None if there are too many curves.

    Evenly spaced points are kept, the first and the last one included.
    """
    lines = [line for tensor in _iter_tensors(value) for line in _split(tensor)]
    if not lines:
        return None
    most = MAX_NUMBERS // len(lines)
    if most < 2:
        return None
    longest = max(map(len, lines))
    step = max(1, -(-(longest - 1) // (most - 1)))
    return _thin(value, step)


def draw(metric: Metric, value: Any) -> Figure:
    """Draw a value by the metric's own ``plot``.

    The figure is not one of pyplot, so that no window opens and nothing stays in memory.
    """
    plotted = get_plotted(metric)
    assert plotted is not None
    module = importlib.import_module("matplotlib.figure")  # takes half a second
    figure: Figure = module.Figure()
    options: dict[str, object] = {}
    writes = "add_text" in inspect.signature(plotted.plot).parameters
    if writes and isinstance(value, Tensor) and value.shape[-1] > MAX_WRITTEN:
        options["add_text"] = False
    with warnings.catch_warnings():  # such as of NumPy, about tensors in matplotlib
        warnings.simplefilter("ignore")
        try:
            plotted.plot(value, ax=figure.add_subplot(), **options)
        except Exception:  # noqa: BLE001  several axes are needed, which only plot makes
            pyplot = importlib.import_module("matplotlib.pyplot")
            figure, _ = plotted.plot(value, **options)
            pyplot.close(figure)
    return figure


def _iter_tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _iter_tensors(item)


def _split(tensor: Tensor) -> list[Tensor]:
    return list(tensor.reshape(-1, tensor.shape[-1])) if tensor.ndim else []


def _thin(value: Any, step: int) -> Any:
    if isinstance(value, Tensor):
        if not value.ndim:
            return value.tolist()
        length = value.shape[-1]
        places = dict.fromkeys([*range(0, length, step), *range(length)[-1:]])
        return value[..., [*places]].tolist()
    return [_thin(item, step) for item in value]
