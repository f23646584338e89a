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
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.delivery.cursor import Cursor
from tracking.delivery.scan import READ_ROWS, JournalScan
from tracking.delivery.thinning import count_within_groups, mask_points
from tracking.journal.reader import JournalReader
from tracking.journal.tombstones import Place, list_places
from tracking.mlflow_store.client import Point
from tracking.mlflow_store.points import (
    POINTS,
    UniqueTimestamps,
    point_list,
    points_table,
)

QUIET_S: Final = 0.5
"""A comparison waits until no control row has come for this time..."""

LONGEST_WAIT_S: Final = 5.0
"""... but at most for this time after the first one."""

TIMINGS: Final = ("profile", "system")
"""``what`` of the rows that a replay measures again: MLflow keeps the first values."""

Rows = np.ndarray[Any, np.dtype[np.int64]]
Stage = Literal["live", "killed", "ended"]
"""Whether the run is being written, may be resumed, or has ended."""

_NAN_BITS = np.array([np.nan]).view(np.int64)[0]
_log = logging.getLogger(__name__)


@dataclass
class StalePoints:
    """Points in MLflow that no live row stands for.

    Attributes
    ----------
    timings
        Keys of series of durations; their stale points equal any value.
    """

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


@dataclass(frozen=True)
class Outcome:
    """Result of a comparison.

    Attributes
    ----------
    missing
        Points to send, as a table with the schema `POINTS`.
    needs_new_run
        Whether MLflow's run shows what the journal does not say any more.
    """

    missing: pa.Table = field(default_factory=POINTS.empty_table)
    needs_new_run: bool = False


class Reconciler:
    """Decides when to compare one MLflow run with the journal, and what follows.

    Parameters
    ----------
    scan
        Reads the journal.
    cursor
        Position of the delivery.
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

    def __init__(
        self,
        scan: JournalScan,
        cursor: Cursor,
        *,
        is_required: bool = False,
        can_replace: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_deferred = 0
        self.num_present = 0
        self.is_requested = False
        self._scan = scan
        self._cursor = cursor
        self._is_required = is_required
        self._can_replace = can_replace
        self._clock = clock
        self._stale = StalePoints()
        self._deferred: set[Place] = set()
        self._num_rewinds = self._num_overwrites = 0
        self._first_at = self._last_at = 0.0

    @property
    def is_required_at_end(self) -> bool:
        """Whether MLflow may still differ from the journal when all rows are sent."""
        return self._is_required or bool(self._deferred) or bool(len(self._stale))

    def check_control_rows(self) -> None:
        """Find out whether control rows that were read last concern rows in MLflow."""
        tombstones = self._scan.tombstones
        for _, position in tombstones.rewinds[self._num_rewinds :]:
            if position < self._cursor.position:
                self._request()
        for _, place in tombstones.overwrites[self._num_overwrites :]:
            if self._cursor.may_have_sent(place):
                self._deferred.add(place)
        self._num_rewinds = len(tombstones.rewinds)
        self._num_overwrites = len(tombstones.overwrites)

    def is_due(self) -> bool:
        """Whether the burst of control rows that asked for a comparison is over."""
        now = self._clock()
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
        return None if is_different and self._can_replace else missing

    def compare(self, history: pa.Table, stage: Stage) -> Outcome:
        """Compare MLflow's points with all rows up to the cursor.

        Parameters
        ----------
        history
            All points of the MLflow run.
        stage
            Of the run. A killed run may be resumed and then replace stale points by
            equal ones, so it keeps them.
        """
        self.is_requested = False
        missing = self._find_differences(history, is_final=stage == "ended")
        if stage == "live" and self._deferred:
            return Outcome()
        missing, is_different = self._match(missing)
        if stage != "live":
            is_different |= bool(len(self._stale))
        if is_different and self._can_replace:
            if stage == "killed":
                self._is_required = False
                return Outcome()
            _log.info("MLflow has %d points without a row", len(self._stale))
            return Outcome(needs_new_run=True)
        self.num_present += missing.num_rows
        if stage != "live":
            self._stale = StalePoints()
            self._deferred.clear()
            self.num_deferred = 0
            self._is_required = False
        return Outcome(missing)

    def _request(self) -> None:
        self._last_at = self._clock()
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
            if is_equal is False and self._can_replace:
                _log.info("%s at step %d differs in MLflow", point.key, point.step)
                is_different = True
            is_missing.append(not is_equal)
        return points.filter(pa.array(is_missing, pa.bool_())), is_different

    def _find_differences(self, history: pa.Table, *, is_final: bool) -> pa.Table:
        """Find the points that MLflow does not have, and remember the stale ones.

        Points are compared by key, step and value. Those that thinning left out may be
        in MLflow or not.
        """
        timestamps = UniqueTimestamps()
        points = expected_points(self._scan, self._cursor.position, timestamps)
        self._cursor.restart_counts(points, timestamps)
        is_sent = mask_points(points, self._cursor.per_key, is_final=is_final)
        keys = list(self._scan.keys.by_series.values())
        columns = ["step", "value"]
        found = row_ids(history, keys, columns)
        is_ours = found[:, 0] >= 0  # a borrowed run has metrics of others too
        history, found = history.filter(pa.array(is_ours)), found[is_ours]
        missing, extra = unmatched_rows(row_ids(points, keys, columns), found)
        self._stale = StalePoints(timing_keys(self._scan))
        for row in history.take(extra).select(["key", *columns]).to_pylist():
            self._stale.add(**row)
        self.num_present = len(found) - len(extra)
        return points.take(missing[is_sent[missing]])


def expected_points(
    scan: JournalScan, upto: int, timestamps: UniqueTimestamps
) -> pa.Table:
    """Points of all live rows up to a position, in the order of the journal.

    Parameters
    ----------
    scan
        Which has read the rows; they are read again here.
    upto
        ``seq`` of the last row.
    timestamps
        Gives the points their times.
    """
    reader = JournalReader(scan.rank_dir)
    tables = [POINTS.empty_table()]
    while (rows := reader.read(READ_ROWS)).num_rows:
        seq = rows["seq"].to_numpy()
        is_live = scan.tombstones.mask_live(rows) & (seq <= upto)
        live = scan.tombstones.fits.label(rows.filter(pa.array(is_live)))
        points = points_table(live, scan.keys)
        tables.append(timestamps.assign(points))
        if seq[-1] >= upto:
            break
    return pa.concat_tables(tables).unify_dictionaries()


def timing_keys(scan: JournalScan) -> frozenset[str]:
    """Keys of the series that a replay measures again."""
    series = scan.keys.by_series.items()
    return frozenset(key for one, key in series if one.what in TIMINGS)


def row_ids(table: pa.Table, keys: list[str], columns: list[str]) -> Rows:
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
    key = pc.index_in(table["key"].cast(pa.string()), pa.array(keys, pa.string()))
    found = [key.fill_null(-1).to_numpy().astype(np.int64)]
    for name in columns:
        numbers = table[name].to_numpy()
        if numbers.dtype == np.float64:
            numbers = (numbers + 0.0).view(np.int64)  # -0.0 + 0.0 is 0.0
            numbers[np.isnan(numbers.view(np.float64))] = _NAN_BITS
        found.append(numbers.astype(np.int64, copy=False))
    return np.column_stack(found) if len(key) else np.empty((0, 1 + len(columns)), int)


def unmatched_rows(left: Rows, right: Rows) -> tuple[Rows, Rows]:
    """Find the rows of each side that have no equal row on the other side.

    Returns
    -------
    places of these rows in ``left`` and in ``right``, in order

    Notes
    -----
    Equal rows are matched in order, each once, so the later ones are returned.
    """
    group = _number_groups(np.concatenate([left, right]))
    of_left, of_right = group[: len(left)], group[len(left) :]
    return _surplus(of_left, of_right), _surplus(of_right, of_left)


def _number_groups(rows: Rows) -> Rows:
    """Number the distinct rows; equal rows get the same number."""
    order = np.lexsort([*rows.T[::-1]])  # much faster than np.unique(axis=0)
    ordered = rows[order]
    is_new = np.zeros(len(rows), bool)
    is_new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    group = np.empty(len(rows), np.int64)
    group[order] = np.cumsum(is_new)
    return group


def _surplus(group: Rows, other: Rows) -> Rows:
    """Places of the elements of a group beyond those that the other side has."""
    num_other = np.bincount(other, minlength=int(group.max(initial=-1)) + 1)
    return np.flatnonzero(count_within_groups(group) >= num_other[group])


def _comparable(value: float) -> float | None:
    """A value that equals itself: None for NaN."""
    return None if value != value else value
