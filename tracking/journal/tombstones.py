"""Which rows still count: what ``overwrite`` and ``rewind`` say about earlier ones.

An overwrite supersedes the earlier rows of its (what, set, index). A rewind to a
position brings the history back to what it was there: later rows are superseded, the
overwrites among them undone. So the rows that count form a chain of stretches, each
from a rewind up to the position that the next one went back to.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.schema import CONTROL

Place = tuple[str, str, int | None]
"""What, set and index that an overwrite is about."""

_ENDLESS: Final = np.iinfo(np.int64).max


@dataclass
class Tombstones:
    """The control rows of one part, learnt in order.

    Attributes
    ----------
    rewinds
        Position of each rewind row, and the position it goes back to.
    overwrites
        Position of each overwrite row, and its place.
    """

    rewinds: list[tuple[int, int]] = field(default_factory=list)
    overwrites: list[tuple[int, Place]] = field(default_factory=list)
    _stretches: list[tuple[int, int]] = field(default_factory=lambda: [(-1, _ENDLESS)])
    _last: dict[Place, int] = field(default_factory=dict)

    def add(self, table: pa.Table) -> bool:
        """Take in the control rows of a table, which goes on where the last ended.

        Parameters
        ----------
        table
            Rows in the public schema, in order of ``seq``.

        Returns
        -------
        whether there were any
        """
        control = table.filter(_is_control(table))
        if not control.num_rows:
            return False
        for row in control.to_pylist():
            if row["kind"] == "rewind":
                position = min(int(row["value"]), row["seq"] - 1)
                self.rewinds.append((row["seq"], position))
            else:
                place = (row["what"], row["set"], row["index"])
                self.overwrites.append((row["seq"], place))
        self._stretches = self._chain()
        kept = ((seq, place) for seq, place in self.overwrites if self._counts(seq))
        self._last = {place: seq for seq, place in kept}
        return True

    def mask_live(self, table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Mask of the rows that count; control rows do not."""
        seq = table["seq"].to_numpy()
        starts = np.array([start for start, _ in self._stretches])
        ends = np.array([end for _, end in self._stretches])
        # A row belongs to the last stretch that starts before it.
        at = np.searchsorted(starts, seq, side="left") - 1
        alive: np.ndarray[Any, np.dtype[np.bool_]] = seq <= ends[at]
        alive &= ~np.asarray(_is_control(table))
        if self._last:
            alive &= ~self._overwritten(table, seq)
        return alive

    def _chain(self) -> list[tuple[int, int]]:
        """Stretches that count: after the first position, up to the second."""
        stretches, end = [], _ENDLESS
        for seq, position in reversed(self.rewinds):
            if seq <= end:
                stretches.append((seq, end))
                end = position
        return [(-1, end), *reversed(stretches)]

    def _counts(self, seq: int) -> bool:
        """Whether a position lies in a stretch that counts."""
        return any(start < seq <= end for start, end in self._stretches)

    def _overwritten(
        self, table: pa.Table, seq: np.ndarray[Any, np.dtype[np.int64]]
    ) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Mask of the rows that an overwrite supersedes."""
        pairs = {(what, set_) for what, set_, _ in self._last}
        concerned = np.zeros(len(seq), bool)
        for what, set_ in pairs:
            same = pc.and_(pc.equal(table["what"], what), pc.equal(table["set"], set_))
            concerned |= np.asarray(same)
        where = np.flatnonzero(concerned)
        rows = table.select(["what", "set", "index"]).take(where)
        columns = (rows[name].to_pylist() for name in ("what", "set", "index"))
        last = [self._last.get(place, -1) for place in zip(*columns, strict=True)]
        concerned[where] = seq[where] < np.array(last, np.int64)
        return concerned


def _is_control(table: pa.Table) -> pa.ChunkedArray:
    """Which rows say something of other rows."""
    return pc.is_in(table["kind"].cast(pa.string()), pa.array(CONTROL))
