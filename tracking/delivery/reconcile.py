"""What MLflow has of a run, held against what it should have.

A run that was rewound leaves points in MLflow which no row stands for any more, and
MLflow deletes no point. Such a leftover is taken for the row that replaces it where the
two are equal; where they differ, only a fresh MLflow run can show the history.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from tracking.delivery.compare import occurrence_numbers, row_ids, unmatched_rows
from tracking.delivery.scan import JournalScan
from tracking.delivery.thinning import Mask, sent_at_once, sent_in_the_end
from tracking.journal.reader import JournalReader
from tracking.mlflow_store.client import Point
from tracking.mlflow_store.points import POINTS, UniqueTimestamps, points_table

TIMINGS: Final = ("profile",)
"""``what`` of the rows that a replay measures anew: the first measurement is kept."""


@dataclass
class StalePoints:
    """Points in MLflow that no row which counts stands for.

    Attributes
    ----------
    timings
        Keys of series of times, of which any leftover will do.
    """

    timings: frozenset[str] = frozenset()
    _values: dict[tuple[str, int], Counter[float | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(values.total() for values in self._values.values())

    def add(self, key: str, step: int, value: float) -> None:
        """Take note of a point."""
        values = self._values.setdefault((key, step), Counter())
        values[_comparable(value)] += 1

    def take(self, point: Point) -> bool | None:
        """Let a leftover stand for a point.

        Returns
        -------
        whether one does; None if there is none at the point's place at all
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
class Comparison:
    """How MLflow and the journal differ.

    Attributes
    ----------
    missing
        Points that MLflow should have and has not.
    leftovers
        Points that it has and should not have.
    num_present
        Points that are as they should be.
    """

    missing: pa.Table
    leftovers: StalePoints
    num_present: int


def expected_points(
    rank_dir: Path, scan: JournalScan, upto: int, stamps: UniqueTimestamps
) -> pa.Table:
    """Points of all rows that count up to a position, in order."""
    tail = JournalReader(rank_dir)
    tables = [POINTS.empty_table()]
    while (table := tail.read(1 << 14)).num_rows:
        seq = table["seq"].to_numpy()
        counts = scan.tombstones.mask_live(table) & (seq <= upto)
        points = points_table(table.filter(pa.array(counts)), scan.keys)
        tables.append(stamps.settled(points))
        if seq[-1] >= upto:
            break
    return pa.concat_tables(tables).unify_dictionaries()


def compare_points(
    points: pa.Table, chosen: Mask, history: pa.Table, scan: JournalScan
) -> Comparison:
    """Compare what MLflow has with what it should have, by key, step and value.

    Parameters
    ----------
    points
        All points that the journal gives.
    chosen
        Which of them MLflow is to have now; the others it may have.
    history
        What MLflow has. Keys that are none of the run's are left out.
    scan
        Of the journal.
    """
    keys = list(scan.keys.given.values())
    columns = ["step", "value"]
    found = row_ids(history, keys, columns)
    ours = found[:, 0] >= 0
    history, found = history.filter(pa.array(ours)), found[ours]
    lacking, left = unmatched_rows(row_ids(points, keys, columns), found)
    leftovers = StalePoints(timing_keys(scan))
    for row in history.take(left).select(["key", "step", "value"]).to_pylist():
        leftovers.add(**row)
    lacking = lacking[chosen[lacking]]
    return Comparison(points.take(lacking), leftovers, len(found) - len(left))


def timing_keys(scan: JournalScan) -> frozenset[str]:
    """Keys of the series that a replay measures anew."""
    given = scan.keys.given.items()
    return frozenset(key for (what, _, _), key in given if what in TIMINGS)


def thinning_mask(points: pa.Table, per_key: int | None, *, is_final: bool) -> Mask:
    """Which points are sent: all, or a number of each series; see `thinning`."""
    if per_key is None:
        return np.ones(points.num_rows, bool)
    code = points["key"].combine_chunks().indices.to_numpy()
    order = np.argsort(code, kind="stable")
    ordinals = np.empty(len(code), np.int64)
    ordinals[order] = occurrence_numbers(code[order])
    if not is_final:
        return sent_at_once(ordinals, per_key)
    chosen = np.zeros(len(code), bool)
    for places in np.split(order, np.cumsum(np.bincount(code))[:-1]):
        where = ordinals[places]
        chosen[places] = sent_in_the_end(where, len(places), per_key)
    return chosen


def point_list(table: pa.Table) -> list[Point]:
    """Points as they are sent."""
    columns = (table[name].to_pylist() for name in ("key", "value", "time_ms", "step"))
    return [Point(*row) for row in zip(*columns, strict=True)]


def _comparable(value: float) -> float | None:
    """A value that equals itself: None for NaN."""
    return None if value != value else value
