"""Position of a delivery in the journal: what has been sent, and what comes next."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import pyarrow as pa

from tracking.delivery.scan import JournalScan
from tracking.delivery.thinning import Ordinals, count_first, mask_early
from tracking.journal.fits import COLUMN, get_fits
from tracking.journal.tombstones import Place
from tracking.mlflow_store.keys import KeyMap
from tracking.mlflow_store.matching import count_within_groups
from tracking.mlflow_store.points import UniqueTimestamps, points_table

COMPARED_ROWS: Final = 1 << 16
"""Rows before the position whose times are compared with those of new points."""

_COLUMNS: Final = (
    *("seq", "time", "what", "set", "name", "index", "step", "value", "kind"),
    COLUMN.name,
)
"""Columns that are kept of rows to send; the last one only where there are several fits."""


@dataclass
class Cursor:
    """Position in the journal up to which MLflow has all rows, and the next rows.

    Parameters
    ----------
    position
        ``seq`` of the last row that MLflow has; -1 for none.
    per_key
        Maximum number of points of each metric; None: all points.

    Attributes
    ----------
    timestamps
        Times given to the points so far.
    counts
        Number of points of each key so far, for thinning.
    num_pending
        Rows that have been read and not sent.
    """

    position: int = -1
    per_key: int | None = None
    timestamps: UniqueTimestamps = field(default_factory=UniqueTimestamps)
    counts: dict[str, int] = field(default_factory=dict)
    num_pending: int = 0
    _longest: int = 0
    _pending: deque[pa.Table] = field(default_factory=deque)
    _index_bounds: dict[tuple[str, str, int], list[int]] = field(default_factory=dict)

    def push(self, rows: pa.Table, scan: JournalScan) -> None:
        """Add the next rows of the journal. Those up to the position are not sent again.

        Parameters
        ----------
        rows
            In the public schema, in order of ``seq``, perhaps with their fits.
        """
        num_sent = int((rows["seq"].to_numpy() <= self.position).sum())
        if num_sent:
            self._pass_over(rows.slice(0, num_sent), scan)
        if num_sent < rows.num_rows:
            columns = [name for name in _COLUMNS if name in rows.column_names]
            self._pending.append(rows.slice(num_sent).select(columns))
            self.num_pending += rows.num_rows - num_sent

    def peek(self, max_rows: int) -> pa.Table | None:
        """Next rows to send, at most ``max_rows``; None if there are none."""
        return self._pending[0].slice(0, max_rows) if self._pending else None

    def advance(self, position: int) -> None:
        """Drop the rows up to a position: they have been sent."""
        self.position = position
        while self._pending:
            rows = self._pending.popleft()
            num_sent = int((rows["seq"].to_numpy() <= position).sum())
            self.num_pending -= num_sent
            if num_sent < rows.num_rows:
                self._pending.appendleft(rows.slice(num_sent))
                return

    def next_points(self, rows: pa.Table, keys: KeyMap) -> pa.Table:
        """Convert live rows to the points that are sent now, in the same order."""
        points = self.timestamps.assign(points_table(rows, keys))
        if self.per_key is None:
            return points
        ordinals = self._count_points(points)
        return points.filter(pa.array(mask_early(ordinals, self.per_key)))

    @property
    def is_thinned(self) -> bool:
        """Whether some points have been left out until the length of a series is known."""
        return self.per_key is not None and self._longest > count_first(self.per_key)

    def list_thinned(self) -> list[str]:
        """Keys of the series that have more points than MLflow gets."""
        if self.per_key is None or self._longest <= self.per_key:
            return []
        return [key for key, count in self.counts.items() if count > self.per_key]

    def restart_counts(
        self, counts: dict[str, int], timestamps: UniqueTimestamps
    ) -> None:
        """Forget the points so far; take others for them.

        Parameters
        ----------
        counts
            Number of points of each key up to the position.
        """
        self.timestamps = timestamps
        self.counts = dict(counts)
        self._longest = max(counts.values(), default=0)

    def note_places(self, rows: pa.Table) -> None:
        """Remember the places of rows that are sent; see `may_have_sent`."""
        words = {name: rows[name].cast(pa.string()) for name in ("what", "set")}
        counts = {"fit": pa.array(get_fits(rows)), "index": rows["index"]}
        places = pa.table({**words, **counts}).group_by(["what", "set", "fit"])
        found = places.aggregate([("index", "min"), ("index", "max")])
        for row in found.to_pylist():
            series = row["what"], row["set"], row["fit"]
            bounds = self._index_bounds.setdefault(series, [])
            if row["index_min"] is not None:
                bounds += [row["index_min"], row["index_max"]]
                bounds[:] = min(bounds), max(bounds)

    def may_have_sent(self, place: Place) -> bool:
        """Whether rows that have been sent may be among those of a place."""
        what, set_, index, fit = place
        bounds = self._index_bounds.get((what, set_, fit))
        if bounds is None or index is None:
            return bounds is not None
        return bool(bounds) and bounds[0] <= index <= bounds[1]

    def _pass_over(self, rows: pa.Table, scan: JournalScan) -> None:
        """Take note of rows that an earlier delivery sent."""
        self.note_places(rows)  # superseded ones too: they may have been sent
        is_far = rows["seq"][-1].as_py() < self.position - COMPARED_ROWS
        if is_far and self.per_key is None:
            return
        live = rows.filter(pa.array(scan.tombstones.mask_live(rows)))
        points = points_table(live, scan.keys)
        if not is_far:
            points = self.timestamps.assign(points)
        if self.per_key is not None:
            self._count_points(points)

    def _count_points(self, points: pa.Table) -> Ordinals:
        """Place of each point in its series; counts them too."""
        column = points["key"].combine_chunks()
        code, keys = column.indices.to_numpy(), column.dictionary.to_pylist()
        before = np.array([self.counts.get(key, 0) for key in keys], np.int64)
        ordinals: Ordinals = count_within_groups(code) + before[code]
        added = np.bincount(code, minlength=len(keys)).tolist()
        for key, count in zip(keys, added, strict=True):
            self.counts[key] = self.counts.get(key, 0) + count
        self._longest = max(self._longest, ordinals.max(initial=-1) + 1)
        return ordinals
