"""Match rows of two tables that may contain equal rows several times.

Rows are integers here, so that they are equal where a database finds them equal. One side
is held in memory, 40 bytes a row; the other one may come in pages, however many.
"""

from __future__ import annotations

from itertools import count
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.journal.arrays import mask_first

Rows = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]
Hashes = np.ndarray[Any, np.dtype[np.uint64]]

_NAN_BITS: Final = np.array([np.nan]).view(np.int64)[0]
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(29)


def row_ids(table: pa.Table, keys: pa.Array, columns: list[str]) -> Rows:
    """Encode rows as integers that are equal where a database finds the rows equal.

    Parameters
    ----------
    table
        With a column ``key``, and numbers in ``columns``.
    keys
        All known keys; another key becomes -1.
    columns
        Of the table. NaN equals NaN, and -0.0 equals 0.0.

    Returns
    -------
    (rows, 1 + columns), int64
    """
    found = np.empty((table.num_rows, 1 + len(columns)), np.int64)
    found[:, 0] = find_keys(table["key"], keys)
    for i, name in enumerate(columns, start=1):
        numbers = table[name].to_numpy()
        if numbers.dtype == np.float64:
            numbers = (numbers + 0.0).view(np.int64)  # -0.0 + 0.0 is 0.0
            numbers[np.isnan(numbers.view(np.float64))] = _NAN_BITS
        found[:, i] = numbers
    return found


def find_keys(column: pa.ChunkedArray, keys: pa.Array) -> Rows:
    """Place of each key of a column in a list; -1 for another key."""
    places = [np.empty(0, np.int64)]
    for chunk in column.chunks:
        code = None
        if pa.types.is_dictionary(chunk.type):
            code, chunk = chunk.indices.to_numpy(), chunk.dictionary
        place = pc.index_in(chunk, keys).fill_null(-1).to_numpy(zero_copy_only=False)
        places.append(place if code is None else place[code])
    found: Rows = np.concatenate(places).astype(np.int64)
    return found


class RowMatcher:
    """Matches pages of rows with the rows of one table, each of them once."""

    def __init__(self, rows: Rows) -> None:
        for seed in count():
            hashes = hash_rows(rows, seed)
            order = np.argsort(hashes, kind="stable")
            hashes = hashes[order]
            is_first = mask_first(hashes)
            is_same = (rows[order[1:]] == rows[order[:-1]]).all(axis=1)
            if (is_same | is_first[1:]).all():  # equal hashes are equal rows
                break
        starts = np.flatnonzero(is_first)
        self._rows = rows
        self._seed = seed
        self._order = order
        self._hashes = hashes[starts]
        self._firsts = order[starts]
        self._sizes = np.diff(starts, append=len(rows))
        self._used = np.zeros(len(starts), np.int64)

    def match(self, page: Rows) -> Mask:
        """Match the next rows; return which of them have an equal row that was left."""
        if not len(self._hashes) or not len(page):
            return np.zeros(len(page), bool)
        hashes = hash_rows(page, self._seed)
        group = np.searchsorted(self._hashes, hashes)
        group = np.minimum(group, len(self._hashes) - 1)
        matched: Mask = self._hashes[group] == hashes
        matched &= (self._rows[self._firsts[group]] == page).all(axis=1)
        where = np.flatnonzero(matched)
        group = group[where]
        number = self._used[group] + count_within_groups(group)
        is_left = number < self._sizes[group]
        np.add.at(self._used, group[is_left], 1)
        matched[where] = is_left
        return matched

    def find_unmatched(self) -> Rows:
        """Places of the rows of the table that nothing was matched with, in order.

        Of equal rows these are the later ones.
        """
        number = np.arange(len(self._order))
        number -= np.repeat(np.cumsum(self._sizes) - self._sizes, self._sizes)
        unmatched: Rows = np.sort(
            self._order[number >= np.repeat(self._used, self._sizes)]
        )
        return unmatched


def unmatched_rows(left: Rows, right: Rows) -> tuple[Rows, Rows]:
    """Find the rows of each side that have no equal row on the other side.

    Notes
    -----
    Equal rows are matched in order, each once, so the later ones are returned.
    """
    matcher = RowMatcher(right)
    return np.flatnonzero(~matcher.match(left)), matcher.find_unmatched()


def count_within_groups(group: Rows) -> Rows:
    """Count for each element how many of the same group come before it.

    Examples
    --------
    >>> count_within_groups(np.array([5, 3, 5, 5, 3])).tolist()
    [0, 0, 1, 2, 1]
    """
    order = np.argsort(group, kind="stable")
    ordered = group[order]
    starts = np.flatnonzero(mask_first(ordered))
    lengths = np.diff(starts, append=len(ordered))
    counts = np.empty(len(group), np.int64)
    counts[order] = np.arange(len(ordered)) - np.repeat(starts, lengths)
    return counts


def hash_rows(rows: Rows, seed: int = 0) -> Hashes:
    """Hash each row. Different rows may have the same hash; equal ones do."""
    hashes = np.full(len(rows), seed + 1, np.uint64)
    for column in rows.T:
        hashes ^= column.astype(np.uint64)  # wraps around
        hashes *= _ODD
        hashes ^= hashes >> _SHIFT
    return hashes
