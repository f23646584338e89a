"""Histograms: how the values of a tensor are distributed, as counts of bins."""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from tracking.artifacts.arrays import Array, as_array

MAX_BINS: Final = 512


def make_histogram(values: Any, bins: int, place: str) -> dict[str, Any]:
    """Count values in bins of equal width, from the lowest to the highest one.

    Parameters
    ----------
    values
        Tensor, array or list of bools, integers or floats, of any shape.
    bins : 1 to 512
        Number of bins. Integers of a smaller range get one bin each.

    Returns
    -------
    dict
        ``edges`` (one more than ``counts``), ``counts``; ``num``: all values, of which
        ``num_nan`` and ``num_inf`` are in no bin; ``min``, ``max``, ``mean``, ``std`` of
        the others, None if there are none.
    """
    if type(bins) is not int or not 1 <= bins <= MAX_BINS:
        raise ValueError(
            f"{place}: expected bins from 1 to {MAX_BINS}, got {bins!r}. "
            "The default is 64."
        )
    array = as_array(values, place).ravel()
    is_whole = array.dtype.kind != "f"
    if is_whole or array.dtype.itemsize not in (4, 8):
        array = array.astype(np.float64)
    is_finite = np.isfinite(array)
    finite = array if is_finite.all() else array[is_finite]
    num_nan = int(np.isnan(array).sum())
    about: dict[str, Any] = {
        "edges": [],
        "counts": [],
        "num": array.size,
        "num_nan": num_nan,
        "num_inf": array.size - finite.size - num_nan,
        "min": None,
        "max": None,
        "mean": None,
        "std": None,
    }
    return about | _count(finite, bins, is_whole) if finite.size else about


def _count(finite: Array, bins: int, is_whole: bool) -> dict[str, Any]:
    low, high = float(finite.min()), float(finite.max())
    # Neither the range nor the squares of the largest floats are finite.
    shrink = 2.0**-600 if max(-low, high) > 1e37 else 1.0
    limits = _widen(low * shrink, high * shrink)
    if shrink != 1.0 or limits != (low, high):
        finite = finite.astype(np.float64) * shrink
    if is_whole and high - low < bins:
        counts, edges = np.histogram(finite, np.arange(low - 0.5, high + 1.0))
    else:
        counts, edges = np.histogram(finite, bins, limits)
    return {
        "edges": [edge / shrink for edge in edges.tolist()],
        "counts": counts.tolist(),
        "min": low,
        "max": high,
        "mean": float(finite.mean(dtype=np.float64)) / shrink,
        "std": float(finite.std(dtype=np.float64)) / shrink,
    }


def _widen(low: float, high: float) -> tuple[float, float]:
    """Return limits that are far enough apart for bins."""
    scale = max(abs(low), abs(high))
    room = max(1e-6 * scale, 1e-300) if high > low else scale or 1.0
    return (low, high) if high - low > room else (low - room / 2, high + room / 2)
