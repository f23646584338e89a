"""What a picture has room for: which metrics, which lines, and which points of a line."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

Line = tuple[Array, Array]
"""Places and values of the points of a line, in rising order of place."""


@dataclass(frozen=True, kw_only=True)
class ChartLimits:
    """How much a picture shows at most."""

    charts: int  #: charts, one for each metric
    lines: int  #: lines of a chart, one for each set
    columns: int  #: columns of dots that a line has, from left to right


@dataclass(frozen=True)
class Charts:
    """Lines to draw."""

    #: lines by metric and set, the main metrics first
    lines: dict[str, dict[str, Line]]
    #: lines of every metric, also of those that there is no room for
    num_lines: dict[str, int]


def choose_charts(
    lines: Mapping[str, Mapping[str, Line]], limits: ChartLimits
) -> Charts:
    """Choose the charts that a picture has room for, and the points of each line.

    Parameters
    ----------
    lines
        All lines by metric and set.
    """
    shown: dict[str, dict[str, Line]] = {}
    for metric in choose_metrics(lines)[: limits.charts]:
        chart = shown[metric] = {}
        for name, (x, y) in islice(lines[metric].items(), limits.lines):
            at = thin_curve(x, y, limits.columns)
            chart[name] = x[at], y[at]
    return Charts(shown, {metric: len(sets) for metric, sets in lines.items()})


def choose_metrics(sets: Mapping[str, Collection[object]]) -> list[str]:
    """Order metrics, the main ones first.

    Returns
    -------
    the metric ``loss``, other losses, then those with more than one set, such as train and
    valid, then the others; each in the order given
    """

    def rank(name: str) -> int:
        if name == "loss":
            return 0
        if name.rpartition("/")[2].removesuffix("_step").endswith("loss"):
            return 1
        return 2 if len(sets[name]) > 1 else 3

    return sorted(sets, key=rank)


def thin_curve(x: Any, y: Any, columns: int) -> Array:
    """Return the places of the points that a picture needs to show a curve.

    Parameters
    ----------
    x, y : one-dimensional
        Points, in any order of `x`.
    columns : >= 1
        Columns of dots that the picture has.

    Returns
    -------
    places in rising order of `x`: of each column the first and last point, and the lowest
    and highest number; all if they are few

    References
    ----------
    U. Jugel et al., M4: A Visualization-Oriented Time Series Data Aggregation, VLDB 2014:
    a line through these points colours the same pixels as the line through all.
    """
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    order = np.argsort(x, kind="stable")
    if len(x) <= 4 * columns:
        return order
    x, y = x[order], y[order]
    left, right = x[0], x[-1]
    # Half of each, so that none overflows.
    share = (x / 2 - left / 2) / max(right / 2 - left / 2, np.finfo(float).tiny)
    column = np.minimum((share * columns).astype(np.int64), columns - 1)
    starts = np.flatnonzero(np.diff(column, prepend=-1))
    ends = np.append(starts[1:], len(x))
    kept = [starts, ends - 1]
    finite = np.where(np.isfinite(y), y, np.nan)  # others are not drawn
    for find in (np.fmin, np.fmax):
        extreme = np.repeat(find.reduceat(finite, starts), ends - starts)
        at = np.flatnonzero(finite == extreme)
        kept.append(at[np.flatnonzero(np.diff(column[at], prepend=-1))])
    shown: Array = order[np.unique(np.concatenate(kept))]
    return shown
