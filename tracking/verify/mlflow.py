"""Compare a journal with what MLflow has of it, point by point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.delivery.reconcile import (
    Rows,
    expected_points,
    row_ids,
    timing_keys,
    unmatched_rows,
)
from tracking.delivery.scan import JournalScan
from tracking.delivery.sync import MlflowContents
from tracking.delivery.thinning import mask_points
from tracking.journal.reader import JournalReader
from tracking.mlflow_store.points import POINTS, UniqueTimestamps, points_table
from tracking.mlflow_store.properties import Flags
from tracking.mlflow_store.series import TABLES_TAG, merge_tables
from tracking.mlflow_store.writer import read_refusals
from tracking.read import PastRun
from tracking.store import get_rank_dir, is_being_written
from tracking.verify import Comparison, Mismatch

_NOTES: Final = {
    "infinite": "{key}: MLflow stores infinite values as the largest float ({count} times)",
    "large_int": "{key}: MLflow stores large integers as floats, rounded ({count} times)",
    "long_param": "param {key}: MLflow has the first 6000 of {count} characters",
    "long_tag": "tag {key}: MLflow has the first 8000 of {count} characters",
    "changed_param": "param {key} was logged with several values; MLflow has the first",
}
_EXACT: Final = ["time_ms", "step", "value"]
_LOOSE: Final = ["step", "value"]

Point = dict[str, Any]


def compare_with_mlflow(run: PastRun, there: MlflowContents) -> Comparison:
    """Compare a run's rows of rank 0 with what MLflow has.

    Parameters
    ----------
    run
        Any run. If it is still being written, only the rows sent so far are compared.
    there
        What MLflow has of it.
    """
    rank_dir = get_rank_dir(run.path, 0)
    scan = JournalScan(rank_dir)
    scan.read_all()
    upto = scan.last_seq
    if is_being_written(rank_dir):
        upto = int(there.tags.get("luz.delivered", "-1"))
    points = expected_points(scan, upto, UniqueTimestamps())
    # MLflow's run may hold metrics of others too.
    keys = pa.array(list(scan.keys.by_series.values()), pa.string())
    history = there.history.filter(pc.is_in(there.history["key"], keys))
    mismatches = [
        *_compare_points(run, points, history, scan, read_refusals(there.tags)),
        *_compare_properties(scan, there, read_refusals(there.tags)),
    ]
    notes = describe_flags(scan.properties().flags)
    if upto < scan.last_seq:
        notes.append(
            f"{JournalReader(rank_dir, upto).count_unread()} rows have still to be delivered"
        )
    return Comparison(mismatches, notes, points.num_rows, history.num_rows)


def describe_flags(flags: Flags) -> list[str]:
    """Describe in words what MLflow cannot store exactly."""
    return [
        _NOTES[reason].format(key=key, count=count)
        for reason, counts in flags.items()
        if reason in _NOTES
        for key, count in counts.items()
    ]


def _compare_points(
    run: PastRun,
    points: pa.Table,
    history: pa.Table,
    scan: JournalScan,
    refused: Mapping[str, str],
) -> Iterator[Mismatch]:
    """Compare the points of metrics: first what is missing or changed, then the surplus."""
    keys = list(scan.keys.by_series.values())
    here, there = (row_ids(table, keys, _EXACT) for table in (points, history))
    missing, extra = unmatched_rows(here, there)
    superseded = _superseded_points(run, scan)
    is_superseded = np.zeros(history.num_rows, bool)
    if superseded.num_rows and len(extra):
        others, _ = unmatched_rows(there[extra], row_ids(superseded, keys, _EXACT))
        is_superseded[np.delete(extra, others)] = True
        missing, extra = _accept_first_attempts(
            points, history, missing, extra, is_superseded, scan
        )
    missing = missing[_is_wanted(run, points)[missing]]
    surplus = history.take(extra).append_column("is_superseded", [is_superseded[extra]])
    surplus = surplus.sort_by([(k, "ascending") for k in ("key", "step", "time_ms")])
    pairs, lost, rest = _pair_by_place(
        points.take(missing).to_pylist(), surplus.to_pylist()
    )
    yield from _describe_missing(pairs, lost, refused)
    if not run.manifest.mlflow.get("borrowed"):
        yield from _describe_surplus(rest, row_ids(points, keys, _LOOSE), keys)


def _is_wanted(run: PastRun, points: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which points MLflow should have after thinning."""
    is_final = run.status in ("finished", "failed")
    per_key = run.manifest.delivery.get("per_key")
    return mask_points(points, per_key, is_final=is_final)


def _pair_by_place(
    missing: list[Point], surplus: list[Point]
) -> tuple[list[tuple[Point, Point]], list[Point], list[Point]]:
    """Pair points with the same key and step.

    Returns
    -------
    pairs, unpaired missing points, unpaired surplus points
    """
    places: dict[tuple[str, int], list[Point]] = {}
    for point in missing:
        places.setdefault((point["key"], point["step"]), []).append(point)
    pairs, rest = [], []
    for point in surplus:
        candidates = places.get((point["key"], point["step"]))
        if candidates:
            pairs.append((candidates.pop(0), point))
        else:
            rest.append(point)
    return pairs, [point for left in places.values() for point in left], rest


def _describe_missing(
    pairs: list[tuple[Point, Point]], missing: list[Point], refused: Mapping[str, str]
) -> Iterator[Mismatch]:
    """Points that MLflow has with other values, or not at all, in order of logging."""
    found = [
        (ours["seq"], "changed", ours, _describe_change(ours, theirs))
        for ours, theirs in pairs
    ]
    for point in missing:
        reason = refused.get(point["key"])
        detail = f"{point['value']!r}"
        detail += f", refused by MLflow: {reason}" if reason else ""
        found.append((point["seq"], "missing", point, detail))
    for _, kind, point, detail in sorted(found, key=lambda item: item[0]):
        yield Mismatch("MLflow", kind, _describe(point), detail)


def _superseded_points(run: PastRun, scan: JournalScan) -> pa.Table:
    """Points of superseded rows, as they may have been sent."""
    tables = [POINTS.empty_table()]
    if scan.tombstones.rewinds or scan.tombstones.overwrites:
        reader = JournalReader(get_rank_dir(run.path, 0))
        while (table := reader.read(1 << 14)).num_rows:
            superseded = table.filter(pa.array(~scan.tombstones.mask_live(table)))
            superseded = scan.tombstones.fits.label(superseded)
            tables.append(points_table(superseded, scan.keys))
    return pa.concat_tables(tables).unify_dictionaries()


def _accept_first_attempts(
    points: pa.Table,
    history: pa.Table,
    missing: Rows,
    extra: Rows,
    is_superseded: np.ndarray[Any, np.dtype[np.bool_]],
    scan: JournalScan,
) -> tuple[Rows, Rows]:
    """Drop missing points for which MLflow has an equal, superseded point.

    After a replay MLflow keeps the point of the first attempt, with its time. In a
    series of durations the value may differ too.

    Returns
    -------
    the remaining missing points and extra points
    """
    keys, timings = list(scan.keys.by_series.values()), timing_keys(scan)
    first_attempts = extra[is_superseded[extra]]
    is_timing = np.array([key in timings for key in keys] + [False])
    ids = [row_ids(table, keys, _LOOSE) for table in (points, history)]
    for rows in ids:
        rows[is_timing[rows[:, 0]], 2] = 0
    still_missing, unused = unmatched_rows(ids[0][missing], ids[1][first_attempts])
    accepted = np.delete(first_attempts, unused)
    return missing[still_missing], np.setdiff1d(extra, accepted)


def _describe_surplus(
    points: list[Point], expected: Rows, keys: list[str]
) -> Iterator[Mismatch]:
    """Points that MLflow has and the journal does not ask for."""
    if not points:
        return
    schema = [(name, POINTS.field(name).type) for name in ("step", "value")]
    table = pa.Table.from_pylist(points, pa.schema([("key", pa.string()), *schema]))
    known = {tuple(row) for row in np.unique(expected, axis=0).tolist()}
    ids = row_ids(table, keys, _LOOSE).tolist()
    for point, row in zip(points, ids, strict=True):
        kind = "superseded" if point["is_superseded"] else "unknown"
        if tuple(row) in known:
            kind = "duplicate"
        yield Mismatch("MLflow", kind, _describe(point), f"{point['value']!r}")


def _compare_properties(
    scan: JournalScan, there: MlflowContents, refused: Mapping[str, str]
) -> Iterator[Mismatch]:
    """Compare params, tags and the sizes of artifacts."""
    wanted = scan.properties()
    # The size of a picture that delivery makes is not known.
    present = there.artifacts
    sizes = {
        name: about.get("size_bytes", present.get(name, 0))
        for name, about in wanted.artifacts.items()
    }
    tags = dict(wanted.tags)
    if TABLES_TAG in tags:
        tags[TABLES_TAG] = merge_tables(tags[TABLES_TAG], there.tags.get(TABLES_TAG))
    for word, ours, theirs in (
        ("param", wanted.params, there.params),
        ("tag", tags, there.tags),
        ("bytes of artifact", sizes, present),
    ):
        for key, value in ours.items():
            other = theirs.get(key)
            if other is None:
                reason = refused.get(key)
                detail = f"refused by MLflow: {reason}" if reason else ""
                yield Mismatch("MLflow", "missing", f"{word} {key}", detail)
            elif other != value:
                detail = f"{value!r} is {other!r}"
                yield Mismatch("MLflow", "changed", f"{word} {key}", detail)


def _describe_change(ours: Point, theirs: Point) -> str:
    return ", ".join(
        f"{name} {ours[name]!r} is {theirs[name]!r}"
        for name in ("value", "time_ms")
        if repr(ours[name]) != repr(theirs[name])
    )


def _describe(point: Point) -> str:
    return f"{point['key']} at step {point['step']}"
