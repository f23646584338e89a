"""Find the live rows: those that no ``overwrite`` or ``rewind`` row supersedes.

An overwrite supersedes the earlier rows of its (what, set, index) in its fit. A rewind to a
position restores the history at that position: later rows are superseded, and the
overwrites among them are undone. So the live rows form a chain of ranges, each from one
rewind up to the position that the next one returned to.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.journal.arrays import make_array, make_texts, read_array
from tracking.journal.fits import Fits, get_fits
from tracking.schema import CONTROL

Place = tuple[str, str, int | None, int]
"""What, set, index and fit of an overwrite."""

_COLUMNS: Final = ["seq", "what", "set", "index", "value", "kind"]
_PLACE: Final = (pa.string(), pa.string(), pa.int64(), pa.int64())
_Numbers = np.ndarray[Any, np.dtype[np.int64]]

_ENDLESS: Final = np.iinfo(np.int64).max


@dataclass
class Tombstones:
    """The control rows of one rank, added in order."""

    #: position of each rewind row, and the position that it returns to
    rewinds: list[tuple[int, int]] = field(default_factory=list)
    #: position of each overwrite row, and its place
    overwrites: list[tuple[int, Place]] = field(default_factory=list)
    fits: Fits = field(default_factory=Fits)  #: which fit logged each row
    _live_ranges: list[tuple[int, int]] = field(
        default_factory=lambda: [(-1, _ENDLESS)]
    )
    _last_overwrites: dict[Place, int] = field(default_factory=dict)
    _overwritten: _Overwritten | None = None

    def add(self, table: pa.Table) -> bool:
        """Add the control rows of the table that follows the last one.

        Parameters
        ----------
        table
            Rows in the public schema, in order of ``seq``.
        """
        control = table.filter(_is_control(table)).select(_COLUMNS)
        if not control.num_rows:
            return False
        num_rewinds, num_overwrites = len(self.rewinds), len(self.overwrites)
        for row in control.to_pylist():
            if row["kind"] != "overwrite" and not _is_finite(row["value"]):
                continue  # in a file that somebody else wrote
            if row["kind"] == "rewind":
                position = max(-1, min(int(row["value"]), row["seq"] - 1))
                self.rewinds.append((row["seq"], position))
                self.fits.rewind(row["seq"], position)
            elif row["kind"] == "fit":
                self.fits.begin(row["seq"], int(row["value"]))
            else:
                fit = self.fits.find_one(row["seq"])
                place = (row["what"], row["set"], row["index"], fit)
                self.overwrites.append((row["seq"], place))
        new = self.overwrites[num_overwrites:]
        if len(self.rewinds) > num_rewinds:
            self._live_ranges = self._find_live_ranges()
            self._last_overwrites, new = {}, self.overwrites
        for seq, place in new:
            if self._is_in_live_range(seq):
                self._last_overwrites[place] = seq
        self._overwritten = None
        return True

    def mask_live(self, table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Mask of the live rows; control rows are not live."""
        seq = read_array(table["seq"])
        starts = np.array([start for start, _ in self._live_ranges])
        ends = np.array([end for _, end in self._live_ranges])
        # A row belongs to the last range that starts before it.
        at = np.searchsorted(starts, seq, side="left") - 1
        is_live: np.ndarray[Any, np.dtype[np.bool_]] = seq <= ends[at]
        is_live &= ~read_array(_is_control(table))
        if self._last_overwrites:
            if self._overwritten is None:
                self._overwritten = _Overwritten(self._last_overwrites)
            is_live &= ~self._overwritten.mask(table, self.fits.find(seq))
        return is_live

    def _find_live_ranges(self) -> list[tuple[int, int]]:
        """Live ranges: after the first position, up to and including the second."""
        ranges, end = [], _ENDLESS
        for seq, position in reversed(self.rewinds):
            if seq <= end:
                ranges.append((seq, end))
                end = position
        return [(-1, end), *reversed(ranges)]

    def _is_in_live_range(self, seq: int) -> bool:
        at = bisect_left(self._live_ranges, (seq,)) - 1  # as in ``mask_live``
        return seq <= self._live_ranges[at][1]


class _Overwritten:
    """The places that were overwritten, for a look at all rows of a table at once.

    Parameters
    ----------
    overwrites
        Position of the last overwrite of each place.

    Notes
    -----
    The columns of a place are looked up one after the other, like the letters of a word: the
    number of a beginning and the number of the next value give that of a longer beginning.
    """

    def __init__(self, overwrites: Mapping[Place, int]) -> None:
        self._levels: list[tuple[pa.Array, _Numbers]] = []
        place = np.zeros(len(overwrites), np.int64)
        for column, type_ in zip(zip(*overwrites, strict=True), _PLACE, strict=True):
            values = _make_values([*dict.fromkeys(column)], type_)
            code = _find_codes(_make_values(column, type_), values)
            known, place = np.unique(place * len(values) + code, return_inverse=True)
            self._levels.append((values, known))
        self._last = np.empty(len(overwrites), np.int64)
        self._last[place] = [*overwrites.values()]

    def mask(
        self, table: pa.Table, fits: _Numbers
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Mask of the rows before the last overwrite of their place."""
        columns = (
            *(table[name] for name in ("what", "set", "index")),
            make_array(fits),
        )
        place = np.zeros(table.num_rows, np.int64)
        is_known = np.ones(table.num_rows, bool)
        for column, type_, level in zip(columns, _PLACE, self._levels, strict=True):
            values, known = level
            code = _find_codes(column.cast(type_), values)
            longer = place * len(values) + code
            place = np.minimum(np.searchsorted(known, longer), len(known) - 1)
            is_known &= (code >= 0) & (known[place] == longer)
        seq = read_array(table["seq"])
        found: np.ndarray[Any, np.dtype[np.bool_]] = seq < self._last[place]
        return found & is_known


def _find_codes(column: pa.ChunkedArray | pa.Array, values: pa.Array) -> _Numbers:
    """Place of each item of a column in a list of values; -1 if it is not there."""
    found: _Numbers = read_array(pc.index_in(column, values), -1).astype(np.int64)
    return found


def _make_values(values: Sequence[Any], type_: pa.DataType) -> pa.Array:
    """Make a column of a place."""
    if type_ == pa.string():
        return make_texts(values)
    is_null = np.array([value is None for value in values])
    return make_array(np.array([value or 0 for value in values], np.int64), is_null)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def list_places(table: pa.Table) -> list[Place]:
    """Return the place of each row of a table that ``Fits.label`` returned."""
    columns = (table[name].to_pylist() for name in ("what", "set", "index"))
    return list(zip(*columns, get_fits(table).tolist(), strict=True))


def _is_control(table: pa.Table) -> pa.ChunkedArray:
    return pc.is_in(table["kind"].cast(pa.string()), make_texts(CONTROL))
