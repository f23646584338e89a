"""Rows of one table that another lacks, counted: a row may be there several times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

Rows = np.ndarray[Any, np.dtype[np.int64]]

_NAN_BITS = np.array([np.nan]).view(np.int64)[0]


def row_ids(table: pa.Table, keys: list[str], columns: list[str]) -> Rows:
    """What makes a row itself, as a row of integers that compare as the values do.

    Parameters
    ----------
    table
        With a column ``key``, and numbers in ``columns``.
    keys
        All keys that may be; the place in it stands for a key.
    columns
        Of the table. NaN is NaN, and -0.0 is 0.0, as databases have it.

    Returns
    -------
    (rows, 1 + columns), int64
    """
    key = pc.index_in(table["key"].cast(pa.string()), pa.array(keys, pa.string()))
    found = [key.fill_null(-1).to_numpy().astype(np.int64)]
    for name in columns:
        numbers = table[name].to_numpy()
        if numbers.dtype == np.float64:
            numbers = (numbers + 0.0).view(np.int64)  # -0.0 + 0.0 is 0.0
            numbers[np.isnan(numbers.view(np.float64))] = _NAN_BITS
        found.append(numbers.astype(np.int64, copy=False))
    return np.column_stack(found) if len(key) else np.empty((0, 1 + len(columns)), int)


def unmatched_rows(
    left: Rows, right: Rows
) -> tuple[np.ndarray[Any, np.dtype[np.int64]], np.ndarray[Any, np.dtype[np.int64]]]:
    """Places of the rows on each side that the other has no partner for.

    Notes
    -----
    Of several equal rows the first ones are matched, so the later ones are returned.
    """
    rows = np.concatenate([left, right])
    order = np.lexsort([*rows.T[::-1]])
    ranked = rows[order]
    is_new = np.ones(len(rows), bool)
    is_new[1:] = (ranked[1:] != ranked[:-1]).any(axis=1)
    group = np.cumsum(is_new) - 1
    is_left = order < len(left)
    num_groups = int(group[-1]) + 1 if len(rows) else 0
    counts_left = np.bincount(group[is_left], minlength=num_groups)
    counts_right = np.bincount(group[~is_left], minlength=num_groups)
    both = np.minimum(counts_left, counts_right)
    extra_left = order[is_left][
        occurrence_numbers(group[is_left]) >= both[group[is_left]]
    ]
    extra = order[~is_left][
        occurrence_numbers(group[~is_left]) >= both[group[~is_left]]
    ]
    return np.sort(extra_left), np.sort(extra - len(left))


def occurrence_numbers(
    group: np.ndarray[Any, np.dtype[np.int64]],
) -> np.ndarray[Any, np.dtype[np.int64]]:
    """How many of the same group come before each, of groups in order."""
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    lengths = np.diff(starts, append=len(group))
    return np.arange(len(group)) - np.repeat(starts, lengths)
