"""Compare a journal with an exported Parquet file, bit by bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import parquet

from tracking.journal.fits import COLUMN, align_fits
from tracking.mlflow_store.matching import Rows, unmatched_rows
from tracking.read import PastRun
from tracking.schema import SCHEMA
from tracking.verify import Comparison, Mismatch

_REQUIRED: Final = frozenset({"seq", "rank", "kind"})
"""Columns that a file with records has."""

_T = TypeVar("_T")


def find_exports(run: PastRun) -> list[Path]:
    """Parquet files among a run's artifacts that hold records."""
    files = sorted((run.path / "artifacts").rglob("*.parquet"))
    return [
        file
        for file in files
        if file.is_file() and set(_read(parquet.read_schema, file).names) >= _REQUIRED
    ]


def _read(read: Callable[[Path], _T], file: Path) -> _T:
    """Read a Parquet file, or its schema."""
    try:
        return read(file)
    except pa.ArrowException as error:
        raise ValueError(
            f"verify: expected a Parquet file in {file}, got {error}. Write it again, or "
            "remove it."
        ) from error


def compare_with_file(run: PastRun, file: Path) -> Comparison:
    """Compare a run's rows with those of a Parquet file.

    Raises
    ------
    ValueError
        If the file does not hold records.
    """
    there = _read(partial(parquet.read_table, partitioning=None), file)
    if not set(there.column_names) >= _REQUIRED:
        raise ValueError(
            f"verify: expected records in {file}, got the columns "
            f"{', '.join(there.column_names[:10])}. Give a file that 'harness export' "
            "wrote."
        )
    if "run" in there.column_names:
        there = there.filter(pc.equal(there["run"].cast(pa.string()), run.id))
    here = run.records(superseded="superseded" in there.column_names)
    mismatches = list(_find_mismatches(here, there, file.name))
    return Comparison(mismatches, num_expected=here.num_rows, num_found=there.num_rows)


def _find_mismatches(here: pa.Table, there: pa.Table, place: str) -> Iterator[Mismatch]:
    """Compare the journal's rows with those of a file, matched by rank and seq."""
    expected, found = _row_ids(here), _row_ids(there)
    missing, extra = unmatched_rows(expected, found)
    for row in here.take(missing).to_pylist():
        yield Mismatch(place, "missing", _describe(row))
    shared_here = np.setdiff1d(np.arange(len(expected)), missing)
    shared_there = np.setdiff1d(np.arange(len(found)), extra)
    shared_here = shared_here[np.lexsort(expected[shared_here].T)]
    shared_there = shared_there[np.lexsort(found[shared_there].T)]
    yield from _find_changes(here.take(shared_here), there.take(shared_there), place)
    shared_ids = set(map(tuple, expected[shared_here].tolist()))
    for row in there.take(extra).to_pylist():
        is_known = (row["rank"], row["seq"]) in shared_ids
        yield Mismatch(place, "duplicate" if is_known else "unknown", _describe(row))


def _find_changes(here: pa.Table, there: pa.Table, place: str) -> Iterator[Mismatch]:
    """Compare two tables that hold the same rows in the same order."""
    differs = np.zeros(here.num_rows, bool)
    columns = [name for name in SCHEMA.names if name in there.column_names]
    if COLUMN.name in there.column_names:
        here, there = align_fits([here, there], at=0)
        columns.append(COLUMN.name)
    for name in columns:
        ours, theirs = _as_bits(here[name]), _as_bits(there[name])
        same = pc.fill_null(pc.equal(ours, theirs), False)
        same = pc.or_(same, pc.and_(pc.is_null(ours), pc.is_null(theirs)))
        differs |= ~np.asarray(same)
    where = np.flatnonzero(differs)
    rows = (table.take(where).to_pylist() for table in (here, there))
    for our, their in zip(*rows, strict=True):
        detail = ", ".join(
            f"{name} {our[name]!r} is {their[name]!r}"
            for name in columns
            if repr(our[name]) != repr(their[name])
        )
        yield Mismatch(place, "changed", _describe(our), detail)


def _as_bits(column: pa.ChunkedArray) -> pa.Array:
    """Convert a column so that values are equal only if their bits are."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(pa.string())
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("us", tz=column.type.tz)).cast(pa.int64())
    array = column.combine_chunks()
    return array.view(pa.int64()) if pa.types.is_floating(array.type) else array


def _row_ids(table: pa.Table) -> Rows:
    """Rank and seq of each row, which identify it within the run."""
    columns = [table[name].cast(pa.int64()).to_numpy() for name in ("rank", "seq")]
    return np.column_stack(columns)


def _describe(row: dict[str, Any]) -> str:
    name = "/".join(part for part in (row["what"], row["set"], row["name"]) if part)
    places = ("index", "step", "rank", "seq")
    words = [f"{word} {row[word]}" for word in places if row[word] is not None]
    return f"{name} at {', '.join(words)}"
