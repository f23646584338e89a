"""Compare all of MLflow's points with the journal, after a rewind or an overwrite.

Both can supersede rows that MLflow already has, and MLflow cannot delete points. Such a
stale point is accepted for a later row that equals it, as in a replay after a resume.
Where the two differ, only a new MLflow run can show the history.

A rewind is answered by one comparison, once a burst of control rows is over; until then
no rows are sent. Rows of an overwritten place wait for the end of the run: a place that
is overwritten often would otherwise need a new MLflow run every time.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final, Literal

import numpy as np
import pyarrow as pa

from tracking.delivery.cursor import Cursor
from tracking.delivery.scan import READ_ROWS, JournalScan
from tracking.delivery.thinning import THINNED, Mask, mask_early, mask_final
from tracking.journal.reader import JournalReader
from tracking.journal.tombstones import Place, list_places
from tracking.mlflow_store.client import Point
from tracking.mlflow_store.matching import (
    RowMatcher,
    Rows,
    count_within_groups,
    find_keys,
    row_ids,
)
from tracking.mlflow_store.points import (
    POINTS,
    UniqueTimestamps,
    point_list,
    points_table,
)
from tracking.mlflow_store.properties import Flags

QUIET_S: Final = 0.5
"""A comparison waits until no control row has come for this time..."""

LONGEST_WAIT_S: Final = 5.0
"""... but at most for this time after the first one."""

TIMINGS: Final = ("profile", "system")
"""``what`` of the rows that a replay measures again: MLflow keeps the first values."""

Stage = Literal["live", "killed", "ended"]
"""Whether the run is being written, may be resumed, or has ended."""

_log = logging.getLogger(__name__)


@dataclass
class StalePoints:
    """Points in MLflow that no live row stands for."""

    #: keys of series of durations; their stale points equal any value
    timings: frozenset[str] = frozenset()
    _values: dict[tuple[str, int], Counter[float | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(values.total() for values in self._values.values())

    def add(self, key: str, step: int, value: float) -> None:
        """Add a point."""
        values = self._values.setdefault((key, step), Counter())
        values[_comparable(value)] += 1

    def take(self, point: Point) -> bool | None:
        """Remove a stale point that equals a new one.

        Returns
        -------
        True if there was one; False if only different ones have the same key and step;
        None if none has them
        """
        place = point.key, point.step
        values = self._values.get(place)
        if values is None:
            return None
        value = _comparable(point.value)
        if value not in values and point.key in self.timings:
            value = next(iter(values))
        if value not in values:
            return False
        values[value] -= 1
        if not values[value]:
            del values[value]
        if not values:
            del self._values[place]
        return True


@dataclass
class Reconciler:
    """Decides when to compare one MLflow run with the journal, and what follows.

    Parameters
    ----------
    is_required
        Whether a comparison is needed at the end of the run in any case.
    can_replace
        Whether a new MLflow run may take the place of this one.
    clock
        As `time.monotonic`.

    Attributes
    ----------
    num_deferred
        Rows that wait for the end of the run.
    num_present
        Points that MLflow has as it should, by the last comparison.
    is_requested
        Whether a rewind asks for a comparison.
    """

    scan: JournalScan
    cursor: Cursor
    is_required: bool = False
    can_replace: bool = True
    clock: Callable[[], float] = time.monotonic
    num_deferred: int = 0
    num_present: int = 0
    is_requested: bool = False
    _stale: StalePoints = field(default_factory=StalePoints)
    _deferred: set[Place] = field(default_factory=set)
    _num_rewinds: int = 0
    _num_overwrites: int = 0
    _first_at: float = 0.0
    _last_at: float = 0.0

    @property
    def is_required_at_end(self) -> bool:
        """Whether MLflow may still differ from the journal when all rows are sent."""
        return self.is_required or bool(self._deferred) or bool(len(self._stale))

    def check_control_rows(self) -> None:
        """Find out whether control rows that were read last concern rows in MLflow."""
        tombstones = self.scan.tombstones
        for _, position in tombstones.rewinds[self._num_rewinds :]:
            if position < self.cursor.position:
                self._request()
        for _, place in tombstones.overwrites[self._num_overwrites :]:
            if self.cursor.may_have_sent(place):
                self._deferred.add(place)
        self._num_rewinds = len(tombstones.rewinds)
        self._num_overwrites = len(tombstones.overwrites)

    def is_due(self) -> bool:
        """Whether the burst of control rows that asked for a comparison is over."""
        now = self.clock()
        is_quiet = now - self._last_at >= QUIET_S
        return is_quiet or now - self._first_at >= LONGEST_WAIT_S

    def remove_deferred(self, rows: pa.Table) -> pa.Table:
        """Drop the rows that wait for the end of the run."""
        if not self._deferred:
            return rows
        is_sent = [place not in self._deferred for place in list_places(rows)]
        self.num_deferred += len(is_sent) - sum(is_sent)
        return rows.filter(pa.array(is_sent, pa.bool_()))

    def remove_present(self, points: pa.Table) -> pa.Table | None:
        """Drop the points that MLflow has from rows that are now superseded.

        Returns
        -------
        the others; None if MLflow has a different point in the place of one, so that
        only a new run can show the history
        """
        missing, is_different = self._match(points)
        return None if is_different and self.can_replace else missing

    def compare(self, history: pa.Table, stage: Stage) -> pa.Table | None:
        """Compare MLflow's points with all rows up to the cursor.

        Parameters
        ----------
        stage
            Of the run. A killed run may be resumed and then replace stale points by
            equal ones, so it keeps them.

        Returns
        -------
        points to send, as a table with the schema `POINTS`; None if MLflow's run shows what
        the journal does not say any more, so that only a new run can show the history
        """
        self.is_requested = False
        missing = self._find_differences(history, is_final=stage == "ended")
        if stage == "live" and self._deferred:
            return POINTS.empty_table()
        missing, is_different = self._match(missing)
        if stage != "live":
            is_different |= bool(len(self._stale))
        if is_different and self.can_replace:
            if stage == "killed":
                self.is_required = False
                return POINTS.empty_table()
            _log.info("MLflow has %d points without a row", len(self._stale))
            return None
        self.num_present += missing.num_rows
        if stage != "live":
            self._stale = StalePoints()
            self._deferred.clear()
            self.num_deferred = 0
            self.is_required = False
        return missing

    def _request(self) -> None:
        self._last_at = self.clock()
        if not self.is_requested:
            self._first_at = self._last_at
        self.is_requested = True

    def _match(self, points: pa.Table) -> tuple[pa.Table, bool]:
        """Drop the points that equal a stale one; whether one differs from a stale one."""
        if not len(self._stale):
            return points, False
        is_missing, is_different = [], False
        for point in point_list(points):
            is_equal = self._stale.take(point)
            if is_equal is False and self.can_replace:
                _log.info("%s at step %d differs in MLflow", point.key, point.step)
                is_different = True
            is_missing.append(not is_equal)
        return points.filter(pa.array(is_missing, pa.bool_())), is_different

    def _find_differences(self, history: pa.Table, *, is_final: bool) -> pa.Table:
        """Find the points that MLflow does not have, and remember the stale ones.

        Points are compared by key, step and value. Those that thinning left out may be
        in MLflow or not.
        """
        expected = ExpectedPoints(
            self.scan, self.cursor.position, self.cursor.per_key, is_final=is_final
        )
        columns = ["step", "value"]
        found = row_ids(history, expected.keys, columns)
        is_ours = found[:, 0] >= 0  # a borrowed run has metrics of others too
        history, found = history.filter(pa.array(is_ours)), found[is_ours]
        missing, extra = expected.find_differences(found, columns)
        self.cursor.restart_counts(expected.counts, expected.timestamps)
        self._stale = StalePoints(timing_keys(self.scan))
        for row in history.take(extra).select(["key", *columns]).to_pylist():
            self._stale.add(**row)
        self.num_present = len(found) - len(extra)
        return missing


@dataclass
class ExpectedPoints:
    """Points of all live rows up to a position, and which of them MLflow should have.

    They are read page by page: a long run has more than fit into memory.

    Parameters
    ----------
    scan
        Which has read the rows; they are read again here.
    upto
        ``seq`` of the last row.
    per_key
        Maximum number of points of each metric; None: all points.

    Attributes
    ----------
    timestamps
        Which gave the points of the pages their times.
    counts
        Number of points of each key in the pages.
    num_sent
        Points of the pages that MLflow should have.
    """

    scan: JournalScan
    upto: int
    per_key: int | None
    is_final: bool
    timestamps: UniqueTimestamps = field(default_factory=UniqueTimestamps)
    counts: dict[str, int] = field(default_factory=dict)
    num_sent: int = 0

    @cached_property
    def keys(self) -> pa.Array:
        """All keys of the run."""
        return pa.array(list(self.scan.keys.by_series.values()), pa.string())

    def read_pages(self) -> Iterator[tuple[pa.Table, Mask]]:
        """Read the points in the order of the journal, and a mask of those to send.

        Each call reads them from the first one.
        """
        self.timestamps, self.num_sent = UniqueTimestamps(), 0
        lengths = self._count_points() if self.is_final else None
        counts = np.zeros(len(self.keys), np.int64)
        for page in self._read():
            points = self.timestamps.assign(page)
            code = find_keys(points["key"], self.keys)
            ordinals = counts[code] + count_within_groups(code)
            counts += np.bincount(code, minlength=len(counts))
            if self.per_key is None or (self.is_final and lengths is None):
                is_sent = np.ones(len(code), bool)
            elif lengths is None:
                is_sent = mask_early(ordinals, self.per_key)
            else:
                is_sent = mask_final(ordinals, lengths[code], self.per_key)
            self.num_sent += int(is_sent.sum())
            yield points, is_sent
        self.counts = dict(zip(self.keys.to_pylist(), counts.tolist(), strict=True))

    def find_differences(
        self, found: Rows, columns: list[str]
    ) -> tuple[pa.Table, Rows]:
        """Find the points to send that equal no row of MLflow's, and the rows beyond them.

        Parameters
        ----------
        found
            MLflow's points by ``row_ids``, with the key and these columns.

        Returns
        -------
        points in the order of the journal, and places of rows that equal no point
        """
        matcher = RowMatcher(found)
        missing = [POINTS.empty_table()]
        for points, is_sent in self.read_pages():
            is_there = matcher.match(row_ids(points, self.keys, columns))
            missing.append(points.filter(pa.array(is_sent & ~is_there)))
        return pa.concat_tables(missing).unify_dictionaries(), matcher.find_unmatched()

    def list_flags(self) -> Flags:
        """Flag the metrics of which MLflow gets fewer points than the pages have."""
        limit = self.per_key
        if limit is None:
            return {}
        keys = [key for key, num_points in self.counts.items() if num_points > limit]
        return {THINNED: dict.fromkeys(keys, limit)} if keys else {}

    def _count_points(self) -> Rows | None:
        """Number of points of each key; None if none can be too long."""
        if self.per_key is None or self.upto < self.per_key:
            return None
        counts = np.zeros(len(self.keys), np.int64)
        for page in self._read():
            code = find_keys(page["key"], self.keys)
            counts += np.bincount(code, minlength=len(counts))
        return counts

    def _read(self) -> Iterator[pa.Table]:
        reader = JournalReader(self.scan.rank_dir)
        tombstones = self.scan.tombstones
        while (rows := reader.read(READ_ROWS)).num_rows:
            seq = rows["seq"].to_numpy()
            is_live = tombstones.mask_live(rows) & (seq <= self.upto)
            live = tombstones.fits.label(rows.filter(pa.array(is_live)))
            yield points_table(live, self.scan.keys)
            if seq[-1] >= self.upto:
                return


def timing_keys(scan: JournalScan) -> frozenset[str]:
    """Keys of the series that a replay measures again."""
    series = scan.keys.by_series.items()
    return frozenset(key for one, key in series if one.what in TIMINGS)


def _comparable(value: float) -> float | None:
    """A value that equals itself: None for NaN."""
    return None if value != value else value
