"""A journal's rows against what MLflow has of them, point by point."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.delivery.compare import Rows, row_ids, unmatched_rows
from tracking.delivery.reconcile import expected_points, thinning_mask, timing_keys
from tracking.delivery.scan import Flags, JournalScan
from tracking.delivery.sync import MlflowContents
from tracking.journal.reader import JournalReader, is_being_written
from tracking.mlflow_store.points import POINTS, UniqueTimestamps, points_table
from tracking.read import PastRun
from tracking.store import get_rank_dir
from tracking.verify.finding import Finding

_NOTES: Final = {
    "infinite": "{key}: {count} values are infinite; MLflow has the largest float",
    "large_int": "{key}: {count} integers have more digits than MLflow's floats hold",
    "long_param": "param {key}: MLflow has the first 6000 of {count} characters",
    "long_tag": "tag {key}: MLflow has the first 8000 of {count} characters",
    "changed_param": "param {key} was logged with several values; MLflow has the first",
}
_EXACT: Final = ["time_ms", "step", "value"]
_LOOSE: Final = ["step", "value"]


@dataclass
class Compared:
    """What the comparison gave.

    Attributes
    ----------
    num_here, num_there
        Points that the journal gives, and that MLflow has of the same keys.
    notes
        What MLflow cannot hold as it is, or does not hold yet.
    """

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_here: int = 0
    num_there: int = 0


def against_mlflow(run: PastRun, there: MlflowContents) -> Compared:
    """Compare a run's rows of rank 0 with what MLflow has.

    Parameters
    ----------
    run
        Ended or not; of one that is being written, what has been sent is compared.
    there
        What MLflow has.
    """
    rank_dir = get_rank_dir(run.path, 0)
    scan = JournalScan(rank_dir)
    scan.look()
    upto = scan.last
    if is_being_written(rank_dir):
        upto = int(there.tags.get("luz.delivered", "-1"))
    points = expected_points(rank_dir, scan, upto, UniqueTimestamps())
    history = _ours(there.history, scan)
    found = Compared(num_here=points.num_rows, num_there=history.num_rows)
    found.notes = notes_of(scan.properties().flags)
    if upto < scan.last:
        left = JournalReader(rank_dir, upto).count_unread()
        found.notes.append(f"{left} rows have still to be delivered")
    found.findings = [
        *_points(run, points, history, scan, _refused(there.tags)),
        *_properties(scan, there),
    ]
    return found


def notes_of(flags: Flags) -> list[str]:
    """What MLflow holds otherwise than the journal, in words."""
    return [
        _NOTES[reason].format(key=key, count=count)
        for reason, counts in flags.items()
        if reason in _NOTES
        for key, count in counts.items()
    ]


def _ours(history: pa.Table, scan: JournalScan) -> pa.Table:
    """The part of a history that the journal is about."""
    keys = pa.array(list(scan.keys.given.values()), pa.string())
    return history.filter(pc.is_in(history["key"], keys))


def _points(
    run: PastRun,
    points: pa.Table,
    history: pa.Table,
    scan: JournalScan,
    refused: Mapping[str, str],
) -> Iterator[Finding]:
    """Points that are not the same in both."""
    keys = list(scan.keys.given.values())
    here, there = (row_ids(table, keys, _EXACT) for table in (points, history))
    lacking, extra = unmatched_rows(here, there)
    dead = _superseded_points(run, scan)
    is_dead = np.zeros(history.num_rows, bool)
    if dead.num_rows and len(extra):
        not_dead, _ = unmatched_rows(there[extra], row_ids(dead, keys, _EXACT))
        is_dead[np.delete(extra, not_dead)] = True
        lacking, extra = _without_first_attempts(
            points, history, lacking, extra, is_dead, scan
        )
    manifest = run.manifest
    is_final = run.status in ("finished", "failed")
    per_key = manifest.delivery.get("per_key")
    lacking = lacking[thinning_mask(points, per_key, is_final=is_final)[lacking]]
    absent = _by_place(points, lacking)
    surplus = history.take(extra).append_column("is_dead", [is_dead[extra]])
    surplus = surplus.sort_by([(k, "ascending") for k in ("key", "step", "time_ms")])
    rest, found = [], []
    for row in surplus.to_pylist():
        before = absent.get((row["key"], row["step"]))
        if before:
            ours = before.pop(0)
            change = Finding("MLflow", "changed", _name(row), _change(ours, row))
            found.append((ours["seq"], change))
        else:
            rest.append(row)
    for row in (row for rows in absent.values() for row in rows):
        why = refused.get(row["key"])
        detail = f"{row['value']!r}" + (f", refused by MLflow: {why}" if why else "")
        missing = Finding("MLflow", "missing", _name(row), detail)
        found.append((row["seq"], missing))
    yield from (finding for _, finding in sorted(found, key=lambda item: item[0]))
    if not manifest.mlflow.get("borrowed"):
        yield from _surplus(rest, row_ids(points, keys, _LOOSE), keys)


def _superseded_points(run: PastRun, scan: JournalScan) -> pa.Table:
    """Points of the rows that do not count any more, as they may have been sent."""
    tables = [POINTS.empty_table()]
    if scan.tombstones.rewinds or scan.tombstones.overwrites:
        tail = JournalReader(get_rank_dir(run.path, 0))
        while (table := tail.read(1 << 14)).num_rows:
            dead = table.filter(pa.array(~scan.tombstones.mask_live(table)))
            tables.append(points_table(dead, scan.keys))
    return pa.concat_tables(tables).unify_dictionaries()


def _without_first_attempts(
    points: pa.Table,
    history: pa.Table,
    lacking: Rows,
    extra: Rows,
    is_dead: np.ndarray[Any, np.dtype[np.bool_]],
    scan: JournalScan,
) -> tuple[Rows, Rows]:
    """Leave out the points that a superseded, equal one stands for in MLflow.

    They have the time of the first attempt. Of a series of times any value will do.
    """
    keys, timings = list(scan.keys.given.values()), timing_keys(scan)
    first = extra[is_dead[extra]]
    is_timing = np.array([key in timings for key in keys] + [False])
    ids = [row_ids(table, keys, _LOOSE) for table in (points, history)]
    for one in ids:
        one[is_timing[one[:, 0]], 2] = 0
    still, over = unmatched_rows(ids[0][lacking], ids[1][first])
    paired = np.delete(first, over)
    return lacking[still], np.setdiff1d(extra, paired)


def _by_place(points: pa.Table, where: Rows) -> dict[tuple[str, int], list[Any]]:
    """Some of the points, by key and step, in order."""
    found: dict[tuple[str, int], list[Any]] = {}
    for row in points.take(where).to_pylist():
        found.setdefault((row["key"], row["step"]), []).append(row)
    return found


def _surplus(
    rows: list[dict[str, Any]], known: Rows, keys: list[str]
) -> Iterator[Finding]:
    """Points that MLflow has beyond those of the journal."""
    schema = [(name, POINTS.field(name).type) for name in ("step", "value")]
    table = pa.Table.from_pylist(rows, pa.schema([("key", pa.string()), *schema]))
    unique = np.unique(known, axis=0)
    known_too = {tuple(one) for one in unique.tolist()} if rows else set()
    ids = row_ids(table, keys, _LOOSE).tolist() if rows else []
    for row, one in zip(rows, ids, strict=True):
        kind = "superseded" if row["is_dead"] else "unknown"
        if tuple(one) in known_too:
            kind = "doubled"
        yield Finding("MLflow", kind, _name(row), f"{row['value']!r}")


def _properties(scan: JournalScan, there: MlflowContents) -> Iterator[Finding]:
    """Params, tags and artifacts that are not the same in both."""
    wanted = scan.properties()
    sizes = {n: d.get("size_bytes") for n, d in wanted.artifacts.items()}
    for word, ours, theirs in (
        ("param", wanted.params, there.params),
        ("tag", wanted.tags, there.tags),
        ("bytes of artifact", sizes, there.artifacts),
    ):
        for key, value in ours.items():
            other = theirs.get(key)
            if other is None:
                yield Finding("MLflow", "missing", f"{word} {key}")
            elif other != value:
                detail = f"{value!r} is {other!r}"
                yield Finding("MLflow", "changed", f"{word} {key}", detail)


def _change(ours: dict[str, Any], theirs: dict[str, Any]) -> str:
    """How two points at one place differ."""
    return ", ".join(
        f"{name} {ours[name]!r} is {theirs[name]!r}"
        for name in ("value", "time_ms")
        if repr(ours[name]) != repr(theirs[name])
    )


def _name(row: dict[str, Any]) -> str:
    """What and where a point is."""
    return f"{row['key']} at step {row['step']}"


def _refused(tags: Mapping[str, str]) -> dict[str, str]:
    """What MLflow refused, as delivery noted it."""
    try:
        found = json.loads(tags.get("luz.flags", "{}")).get("refused", {})
    except ValueError:
        return {}
    return dict(found)
