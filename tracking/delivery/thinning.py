"""Send fewer points of long series to MLflow, the same ones in every delivery.

While a series grows, its final length is unknown, and MLflow cannot delete points. So a
point is sent early only if it is sent for every final length: the first half of the points
that MLflow may get, all of them; then every 32nd, every 64th and so on, 1/64 of the limit
for each doubling of the length. When the run has ended, points in between are added evenly
up to the limit, and the last point.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Final

import numpy as np

Ordinals = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

THINNED: Final = "thinned"
"""Flag of the metrics of which MLflow has fewer points: by key, how many at most."""

_FIRST_STRIDE: Final = 32
_MAX_DOUBLINGS: Final = 31
"""After these nothing is sent early: the limit is exhausted, with 10**13 points by default."""


def count_first(per_key: int) -> int:
    """Number of points that are all sent early; a series that is no longer waits for nothing."""
    return max(1, per_key // 2)


def mask_early(ordinals: Ordinals, per_key: int) -> Mask:
    """Mask of the points that are sent for every final length of their series.

    Parameters
    ----------
    ordinals : >= 0
        Place of each point in its series.
    per_key : >= 2
        Maximum number of points.
    """
    num_first = count_first(per_key)
    sent = mask_doublings(ordinals, num_first, _FIRST_STRIDE)
    sent &= ordinals < num_first << _count_doublings(num_first)
    return sent


def mask_doublings(ordinals: Ordinals, num_first: int, stride: int) -> Mask:
    """Mask of the first ordinals, and then fewer with each doubling.

    Parameters
    ----------
    ordinals : >= 0
        Place of each item in its series.
    num_first : >= 1
        The first so many are all in the mask.
    stride : >= 1
        Up to twice as many every so many, then half of them, and so on.
    """
    # frexp's exponent is the number of bits: 0 below num_first, 1 up to twice that, ...
    doublings = np.frexp((ordinals // num_first).astype(np.float64))[1]
    strides = np.int64(stride) << np.maximum(doublings - 1, 0).astype(np.int64)
    sent: Mask = (doublings == 0) | (ordinals % strides == 0)
    return sent


def mask_final(ordinals: Ordinals, length: int | Ordinals, per_key: int) -> Mask:
    """Mask of the points that MLflow has after the end of the run.

    Parameters
    ----------
    ordinals : >= 0
        Place of each point in its series.
    length
        Number of points in its series: of each point, or the same for all.
    per_key : >= 2
        Maximum number of points; never exceeded.
    """
    lengths, place = np.unique(length, return_inverse=True)
    found = [_find_stride(one, per_key) for one in lengths.tolist()]
    strides = np.array(found, np.int64)[place]
    sent = mask_early(ordinals, per_key)
    sent |= ordinals == np.asarray(length) - 1
    sent |= ordinals % strides == 0
    return sent


@functools.lru_cache(maxsize=1024)
def _find_stride(length: int, per_key: int) -> int:
    """Every so many points of a series that has ended are sent, besides the early ones."""
    if length <= per_key:
        return 1
    room = per_key - count_early(length, per_key) - 1
    stride = 1
    while -(-length // stride) > max(room, 1):  # the first point is an early one
        stride *= 2
    return stride


def count_early(length: int, per_key: int) -> int:
    """Number of points of a series that are sent early."""
    num_first = count_first(per_key)
    found = min(length, num_first)
    for first, end, stride in _list_doublings(num_first):
        found += max(0, -(-min(length, end) // stride) - -(-first // stride))
    return found


def _list_doublings(num_first: int) -> Iterator[tuple[int, int, int]]:
    """First ordinal, end and stride of each doubling in which points are sent early."""
    for i in range(_count_doublings(num_first)):
        yield num_first << i, num_first << (i + 1), _FIRST_STRIDE << i


def _count_doublings(num_first: int) -> int:
    """Number of doublings that leave room for the last point."""
    most = -(-num_first // _FIRST_STRIDE)
    return min(_MAX_DOUBLINGS, (num_first - 1) // most)
