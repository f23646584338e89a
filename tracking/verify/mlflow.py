"""Compare a journal with what MLflow has of it, point by point."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.delivery.options import read_options
from tracking.delivery.reconcile import ExpectedPoints, timing_keys
from tracking.delivery.scan import READ_ROWS, JournalScan
from tracking.delivery.sync import MlflowContents
from tracking.delivery.thinning import THINNED
from tracking.journal.reader import JournalReader
from tracking.mlflow_store.matching import Mask, RowMatcher, Rows, row_ids
from tracking.mlflow_store.points import POINTS, points_table
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
    THINNED: "{key}: MLflow has at most {count} points, the records have all",
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
    expected = ExpectedPoints(
        scan,
        upto,
        read_options(run.manifest).per_key,
        is_final=run.status in ("finished", "failed"),
    )
    # MLflow's run may hold metrics of others too.
    is_ours = pc.is_in(there.history["key"].cast(pa.string()), expected.keys)
    history = there.history.filter(is_ours)
    missing, surplus = _compare_points(scan, expected, history)
    refused = read_refusals(there.tags)
    is_borrowed = bool(run.manifest.mlflow.get("borrowed"))
    mismatches = [
        *_describe_points(missing, surplus, refused, is_borrowed=is_borrowed),
        *_compare_properties(scan, there, refused),
    ]
    notes = describe_flags(scan.properties().flags | expected.list_flags())
    if upto < scan.last_seq:
        notes.append(
            f"{JournalReader(rank_dir, upto).count_unread()} rows have still to be delivered"
        )
    return Comparison(mismatches, notes, expected.num_sent, history.num_rows)


def describe_flags(flags: Flags) -> list[str]:
    """Describe in words what MLflow cannot store exactly."""
    return [
        _NOTES[reason].format(key=key, count=count)
        for reason, counts in flags.items()
        if reason in _NOTES
        for key, count in counts.items()
    ]


def _compare_points(
    scan: JournalScan, expected: ExpectedPoints, history: pa.Table
) -> tuple[list[Point], list[Point]]:
    """Compare the points of metrics, page by page of the journal.

    Returns
    -------
    points that MLflow should have and does not have, in order of logging; points that it has
    beyond the journal's, with their ``kind``, in order of key, step and time
    """
    ids = row_ids(history, expected.keys, _EXACT)
    missing, extra = expected.find_differences(ids, _EXACT)
    surplus = history.take(extra)
    if not len(extra):
        return missing.to_pylist(), []
    is_superseded = _match_superseded(scan, expected.keys, ids[extra])
    missing, kind, is_left = _explain_surplus(
        scan, expected, ids, surplus, is_superseded
    )
    # Sorting needs plain texts.
    at = surplus.schema.get_field_index("key")
    surplus = surplus.set_column(at, "key", surplus["key"].cast(pa.string()))
    surplus = surplus.append_column("kind", pa.array(kind)).filter(is_left)
    order = [(name, "ascending") for name in ("key", "step", "time_ms")]
    return missing.to_pylist(), surplus.sort_by(order).to_pylist()


def _match_superseded(scan: JournalScan, keys: pa.Array, extra: Rows) -> Mask:
    """Which points beyond the journal's equal superseded rows, as they may have been sent."""
    is_superseded = np.zeros(len(extra), bool)
    if scan.tombstones.rewinds or scan.tombstones.overwrites:
        matcher = RowMatcher(extra)
        reader = JournalReader(scan.rank_dir)
        while (rows := reader.read(READ_ROWS)).num_rows:
            superseded = rows.filter(pa.array(~scan.tombstones.mask_live(rows)))
            superseded = scan.tombstones.fits.label(superseded)
            matcher.match(row_ids(points_table(superseded, scan.keys), keys, _EXACT))
        is_superseded[:] = True
        is_superseded[matcher.find_unmatched()] = False
    return is_superseded


def _explain_surplus(
    scan: JournalScan,
    expected: ExpectedPoints,
    ids: Rows,
    surplus: pa.Table,
    is_superseded: Mask,
) -> tuple[pa.Table, list[str], pa.Array]:
    """Find out what MLflow's points beyond the journal's are.

    After a replay MLflow keeps the point of the first attempt, with its time: it stands for
    an equal point that is missing. In a series of durations the value may differ too.

    Parameters
    ----------
    surplus
        Points beyond the journal's.
    is_superseded
        Which of them were sent for a row that is superseded.

    Returns
    -------
    points that are missing all the same; the kind of each surplus point, and a mask of those
    that stand for no point
    """
    keys, timings = expected.keys, timing_keys(scan)
    is_timing = np.array([key in timings for key in keys.to_pylist()] + [False])

    def loosen(points: pa.Table) -> Rows:
        found = row_ids(points, keys, _LOOSE)
        found[is_timing[found[:, 0]], 2] = 0
        return found

    exact = RowMatcher(ids)
    first_attempts = RowMatcher(loosen(surplus.filter(pa.array(is_superseded))))
    distinct, place = np.unique(
        row_ids(surplus, keys, _LOOSE), axis=0, return_inverse=True
    )
    known = RowMatcher(distinct)
    missing = [POINTS.empty_table()]
    for points, is_wanted in expected.read_pages():
        known.match(row_ids(points, keys, _LOOSE))
        is_missing = ~exact.match(row_ids(points, keys, _EXACT))
        some = points.filter(pa.array(is_missing))
        is_lost = ~first_attempts.match(loosen(some)) & is_wanted[is_missing]
        missing.append(some.filter(pa.array(is_lost)))
    is_known = np.ones(len(distinct), bool)
    is_known[known.find_unmatched()] = False
    kind = np.where(is_superseded, "superseded", "unknown")
    kind = np.where(is_known[place.reshape(-1)], "duplicate", kind)
    is_left = ~is_superseded
    is_left[np.flatnonzero(is_superseded)[first_attempts.find_unmatched()]] = True
    return pa.concat_tables(missing), kind.tolist(), pa.array(is_left)


def _describe_points(
    missing: list[Point],
    surplus: list[Point],
    refused: Mapping[str, str],
    *,
    is_borrowed: bool,
) -> Iterator[Mismatch]:
    """First what is missing or changed, then what is there and should not be.

    A point is changed if MLflow has one beyond the journal's with its key and step.
    """
    there: dict[tuple[str, int], list[Point]] = {}
    for point in surplus:
        there.setdefault((point["key"], point["step"]), []).append(point)
    for point in missing:
        if others := there.get((point["key"], point["step"])):
            kind, detail = "changed", _describe_change(point, others.pop(0))
        else:
            kind, detail = "missing", f"{point['value']!r}"
            if reason := refused.get(point["key"]):
                detail += f", refused by MLflow: {reason}"
        yield Mismatch("MLflow", kind, _describe(point), detail)
    for point in itertools.chain(*there.values()) if not is_borrowed else ():
        yield Mismatch("MLflow", point["kind"], _describe(point), f"{point['value']!r}")


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
