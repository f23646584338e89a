"""A journal's rows against those of an exported Parquet file, bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import parquet

from tracking.delivery.compare import Rows, unmatched_rows
from tracking.read import PastRun
from tracking.schema import SCHEMA
from tracking.verify.finding import Finding


def exports_of(run: PastRun) -> list[Path]:
    """Parquet files among a run's artifacts that hold records."""
    files = sorted((run.path / "artifacts").rglob("*.parquet"))
    wanted = {"seq", "rank", "kind"}
    return [file for file in files if wanted <= set(parquet.read_schema(file).names)]


def against_file(run: PastRun, file: Path) -> tuple[list[Finding], int, int]:
    """Compare a run's rows with those of a file.

    Returns
    -------
    findings, rows in the journal, rows in the file

    Raises
    ------
    ValueError
        If the file does not hold records.
    """
    table = parquet.read_table(file, partitioning=None)
    if not {"seq", "rank", "kind"} <= set(table.column_names):
        raise ValueError(
            f"verify: expected records in {file}, got the columns "
            f"{', '.join(table.column_names[:10])}. Give a file that 'harness export' "
            "wrote."
        )
    if "run" in table.column_names:
        table = table.filter(pc.equal(table["run"].cast(pa.string()), run.id))
    ours = run.records(superseded="superseded" in table.column_names)
    findings = list(_differences(ours, table, file.name))
    return findings, ours.num_rows, table.num_rows


def _differences(ours: pa.Table, theirs: pa.Table, place: str) -> Iterator[Finding]:
    """Rows that are not the same in both."""
    known, found = _places(ours), _places(theirs)
    lacking, extra = unmatched_rows(known, found)
    for row in ours.take(lacking).to_pylist():
        yield Finding(place, "missing", _name(row))
    shared = np.setdiff1d(np.arange(len(known)), lacking)
    kept = np.setdiff1d(np.arange(len(found)), extra)
    shared = shared[np.lexsort(known[shared].T)]
    kept = kept[np.lexsort(found[kept].T)]
    yield from _changes(ours.take(shared), theirs.take(kept), place)
    there = set(map(tuple, known[shared].tolist()))
    for row in theirs.take(extra).to_pylist():
        is_known = (row["rank"], row["seq"]) in there
        yield Finding(place, "doubled" if is_known else "unknown", _name(row))


def _changes(ours: pa.Table, theirs: pa.Table, place: str) -> Iterator[Finding]:
    """Rows with a column that differs, of tables that hold the same rows in order."""
    differs = np.zeros(ours.num_rows, bool)
    columns = [name for name in SCHEMA.names if name in theirs.column_names]
    for name in columns:
        mine, other = _bits(ours[name]), _bits(theirs[name])
        same = pc.fill_null(pc.equal(mine, other), False)
        same = pc.or_(same, pc.and_(pc.is_null(mine), pc.is_null(other)))
        differs |= ~np.asarray(same)
    where = np.flatnonzero(differs)
    rows = (table.take(where).to_pylist() for table in (ours, theirs))
    for mine, other in zip(*rows, strict=True):
        detail = ", ".join(
            f"{name} {mine[name]!r} is {other[name]!r}"
            for name in columns
            if repr(mine[name]) != repr(other[name])
        )
        yield Finding(place, "changed", _name(mine), detail)


def _bits(column: pa.ChunkedArray) -> pa.Array:
    """A column whose values are equal where their bits are."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz=column.type.tz)).cast(pa.int64())
    array = column.combine_chunks()
    return array.view(pa.int64()) if pa.types.is_floating(array.type) else array


def _places(table: pa.Table) -> Rows:
    """Rank and seq of each row, which no other row of the run has."""
    columns = [table[name].cast(pa.int64()).to_numpy() for name in ("rank", "seq")]
    return np.column_stack(columns)


def _name(row: dict[str, Any]) -> str:
    """What and where a row is."""
    name = "/".join(part for part in (row["what"], row["set"], row["name"]) if part)
    places = ("index", "step", "rank", "seq")
    words = [f"{word} {row[word]}" for word in places if row[word] is not None]
    return f"{name} at {', '.join(words)}"
