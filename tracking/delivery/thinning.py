"""Send fewer points of long series to MLflow, the same ones in every delivery.

While a series grows, its final length is unknown, and MLflow cannot delete points. So a
point is sent early only if it is sent for every final length: all of the first points,
then every second, fourth, eighth and so on. When the run has ended, points in between
are added evenly up to the limit, and the last point.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import pyarrow as pa

Ordinals = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

_DENSE_FRACTION: Final = 32
"""The first ``per_key // 32`` points are all sent early.

A series that doubles 16 times after them still leaves half of the points for the end.
"""


def mask_points(points: pa.Table, per_key: int | None, *, is_final: bool) -> Mask:
    """Mask of the points to send, in a table that holds whole series.

    Parameters
    ----------
    points
        All points from the first one, with the column ``key``.
    per_key : >= 2
        Maximum number of points of each series; None: all points.
    is_final
        Whether no more points come.
    """
    if per_key is None:
        return np.ones(points.num_rows, bool)
    code = points["key"].combine_chunks().indices.to_numpy()
    ordinals = count_within_groups(code)
    if not is_final:
        return mask_early(ordinals, per_key)
    sent = np.zeros(len(code), bool)
    order = np.argsort(code, kind="stable")
    for places in np.split(order, np.cumsum(np.bincount(code))[:-1]):
        sent[places] = mask_final(ordinals[places], len(places), per_key)
    return sent


def mask_early(ordinals: Ordinals, per_key: int) -> Mask:
    """Mask of the points that are sent for every final length of their series.

    Parameters
    ----------
    ordinals : >= 0
        Place of each point in its series.
    per_key : >= 2
        Maximum number of points.
    """
    base = max(1, per_key // _DENSE_FRACTION)
    # frexp's exponent is the number of bits: 0 below base, 1 up to twice that, ...
    doublings = np.frexp((ordinals // base).astype(np.float64))[1]
    sent: Mask = ordinals % (np.int64(1) << doublings.astype(np.int64)) == 0
    return sent


def mask_final(ordinals: Ordinals, length: int, per_key: int) -> Mask:
    """Mask of the points that MLflow has after the end of the run.

    Parameters
    ----------
    ordinals : >= 0
        Place of each point in its series.
    length
        Number of points in the series.
    per_key : >= 2
        Maximum number of points; never exceeded.
    """
    if length <= per_key:
        return np.ones(len(ordinals), bool)
    sent: Mask = mask_early(ordinals, per_key) | (ordinals == length - 1)
    num_early = int(mask_early(np.arange(length), per_key).sum())
    room = per_key - num_early - 1
    stride = 1
    while room > 0 and -(-length // stride) > room:
        stride *= 2
    if room > 0:
        sent |= ordinals % stride == 0
    return sent


def count_within_groups(group: Ordinals) -> Ordinals:
    """Count for each element how many of the same group come before it.

    Examples
    --------
    >>> count_within_groups(np.array([5, 3, 5, 5, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    is_first = np.ones(len(ordered), bool)
    is_first[1:] = ordered[1:] != ordered[:-1]
    starts = np.flatnonzero(is_first)
    lengths = np.diff(starts, append=len(ordered))
    counts = np.empty(len(group), np.int64)
    counts[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return counts
