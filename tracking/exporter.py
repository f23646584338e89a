"""Export the records of runs to Parquet, CSV or Arrow."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import csv, dataset, feather, fs, parquet

from tracking.durable import replace_file
from tracking.errors import describe_path
from tracking.journal.fits import align_fits
from tracking.read import PastRun
from tracking.run import Run
from tracking.schema import SCHEMA, check_path
from tracking.store import find_runs

SUFFIXES: Final = (".parquet", ".csv", ".arrow", ".feather")


def export(
    runs: Iterable[PastRun | Run | str | os.PathLike[str]] | PastRun | Run,
    path: str | os.PathLike[str],
    *,
    superseded: bool = False,
) -> int:
    """Write the records of runs to a file, or to a folder partitioned by run.

    Parameters
    ----------
    runs
        Runs, or references that ``tracking.open`` understands.
    path
        File whose suffix is .parquet, .csv, .arrow or .feather. A path without a suffix
        is a folder that gets one Parquet file per run under ``run=<id>/``. It may be a
        URI that ``pyarrow.fs`` knows (``s3://...``, ``gs://...``, ``file:///...``).
    superseded
        Whether to include superseded rows, as in ``PastRun.records``.

    Returns
    -------
    rows written

    Raises
    ------
    RunNotFoundError
        If a run does not exist. Nothing is written then.
    ValueError
        If ``runs`` is empty, or the suffix is unknown.

    Notes
    -----
    The first column, ``run``, is the id of the run; ``fit`` is there only if a run has
    several. A local file is replaced only when
    the new one is complete. In a folder, the files of the exported runs are replaced.
    """
    check_path(path, "export(path)")
    found = _open_runs(runs)
    target = os.fspath(path)
    suffix = os.path.splitext(target)[1].lower()  # noqa: PTH122 (a URI, perhaps)
    if suffix and suffix not in SUFFIXES:
        raise ValueError(
            f"export({target!r}): expected a path that ends in {', '.join(SUFFIXES)}, or "
            f"a folder, got {suffix!r}. Choose one of these formats."
        )
    system, place = _resolve_target(target)
    if not suffix:
        return sum(_write_partition(run, system, place, superseded) for run in found)
    tables = [_read_table(run, superseded) for run in found]
    tables = align_fits(tables, at=1 + SCHEMA.get_field_index("epoch"))
    table = pa.concat_tables(tables).unify_dictionaries()
    parent = place.rpartition("/")[0]
    if parent:
        system.create_dir(parent, recursive=True)
    if not isinstance(system, fs.LocalFileSystem):
        _write(table, suffix, system, place)
        return int(table.num_rows)
    if Path(place).is_dir():
        msg = f"export({target!r}): expected a file, got {describe_path(Path(place))}."
        raise IsADirectoryError(f"{msg} Choose another name.")
    with replace_file(Path(place)) as temporary:
        _write(table, suffix, system, str(temporary))
    return int(table.num_rows)


def _open_runs(runs: Any) -> list[PastRun]:
    """Open all runs for reading."""
    if isinstance(runs, PastRun | Run | str | os.PathLike):
        runs = [runs]
    if not isinstance(runs, Iterable):
        raise TypeError(
            f"export(runs): expected a run or a list of runs, got {runs!r}. "
            "Pass runs, or their paths, ids or names."
        )
    given = list(runs)
    refs = [run for run in given if not isinstance(run, PastRun | Run)]
    paths = iter(find_runs(refs))  # the folder of runs is looked through once
    found = []
    for run in given:
        if isinstance(run, Run):
            run.flush()
        is_open = isinstance(run, PastRun | Run)
        found.append(PastRun(run.path if is_open else next(paths)))
    if not found:
        raise ValueError("export: expected at least one run, got none. Pass a run.")
    return found


def _resolve_target(target: str) -> tuple[Any, str]:
    """Find the file system of a target, and the path in it."""
    if "://" in target:
        system, place = fs.FileSystem.from_uri(target)
        return system, place
    return fs.LocalFileSystem(), str(Path(target).expanduser().absolute())


def _read_table(run: PastRun, superseded: bool) -> pa.Table:
    """Read the records of a run, with its id as first column."""
    table = run.records(superseded=superseded)
    codes = pa.array(np.zeros(table.num_rows, np.int32))
    column = pa.DictionaryArray.from_arrays(codes, [run.id])
    return table.add_column(0, "run", column)


def _write(table: pa.Table, suffix: str, system: Any, place: str) -> None:
    with system.open_output_stream(place) as sink:
        if suffix == ".parquet":
            _write_parquet(table, sink)
        elif suffix == ".csv":
            csv.write_csv(_decode_dictionaries(table), sink)
        else:
            feather.write_feather(table, sink, compression="zstd")


def _write_parquet(table: pa.Table, sink: Any) -> None:
    """Write Parquet with names as dictionaries and counts as differences."""
    names = [field.name for field in table.schema if pa.types.is_dictionary(field.type)]
    counts = ["seq", "time", "index", "epoch", "step"]
    parquet.write_table(
        table,
        sink,
        compression="zstd",
        use_dictionary=names,
        column_encoding=dict.fromkeys(counts, "DELTA_BINARY_PACKED"),
        row_group_size=1 << 20,
    )


def _decode_dictionaries(table: pa.Table) -> pa.Table:
    """Convert dictionary columns to strings, since CSV has no dictionaries."""
    fields = [
        field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def _write_partition(run: PastRun, system: Any, place: str, superseded: bool) -> int:
    """Write the file of one run in a partitioned folder."""
    table = _read_table(run, superseded)
    dataset.write_dataset(
        table,
        place,
        filesystem=system,
        format="parquet",
        partitioning=["run"],
        partitioning_flavor="hive",
        existing_data_behavior="delete_matching",
        file_options=dataset.ParquetFileFormat().make_write_options(compression="zstd"),
    )
    return int(table.num_rows)
