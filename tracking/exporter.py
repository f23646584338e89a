"""Records as files that other tools read: Parquet, CSV, Arrow, one or many runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import csv, dataset, feather, fs, parquet

from tracking.durable import replace_file
from tracking.read import PastRun
from tracking.read import open as open_run
from tracking.run import Run

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
        Runs, or what ``tracking.open`` finds them by.
    path
        File whose suffix is .parquet, .csv, .arrow or .feather; without one of these a
        folder, in which each run has its own Parquet file under ``run=<id>/``. A URI
        (``s3://...``, ``gs://...``, ``file:///...``) goes where ``pyarrow.fs`` takes it.
    superseded
        As for ``PastRun.records``.

    Returns
    -------
    rows written

    Raises
    ------
    RunNotFoundError
        If there is no such run; nothing is written then.
    ValueError
        If ``runs`` is empty, or the suffix is another.

    Notes
    -----
    The first column is ``run``, the id. An existing local file is replaced when the new
    one is whole. Of a folder the runs that are written are replaced.
    """
    found = _past_runs(runs)
    target = os.fspath(path)
    suffix = os.path.splitext(target)[1].lower()  # noqa: PTH122 (a URI, perhaps)
    if suffix and suffix not in SUFFIXES:
        raise ValueError(
            f"export({target!r}): expected a path that ends in {', '.join(SUFFIXES)}, or "
            f"a folder's, got {suffix!r}. Choose one of these formats."
        )
    system, place = _place(target)
    if not suffix:
        return sum(_write_partition(run, system, place, superseded) for run in found)
    table = pa.concat_tables([_table(run, superseded) for run in found])
    table = table.unify_dictionaries()
    parent = place.rpartition("/")[0]
    if parent:
        system.create_dir(parent, recursive=True)
    if not isinstance(system, fs.LocalFileSystem):
        _write(table, suffix, system, place)
        return int(table.num_rows)
    with replace_file(Path(place)) as temporary:
        _write(table, suffix, system, str(temporary))
    return int(table.num_rows)


def _past_runs(runs: Any) -> list[PastRun]:
    """Runs as they are on the disk."""
    if isinstance(runs, PastRun | Run | str | os.PathLike):
        runs = [runs]
    found = []
    for run in runs:
        if isinstance(run, Run):
            run.flush()
            found.append(PastRun(run.path))
        else:
            found.append(run if isinstance(run, PastRun) else open_run(run))
    if not found:
        raise ValueError("export: expected at least one run, got none. Give a run.")
    return found


def _place(target: str) -> tuple[Any, str]:
    """Filesystem and path of a target."""
    if "://" in target:
        system, place = fs.FileSystem.from_uri(target)
        return system, place
    return fs.LocalFileSystem(), str(Path(target).expanduser().absolute())


def _table(run: PastRun, superseded: bool) -> pa.Table:
    """Records of a run with its id in front."""
    table = run.records(superseded=superseded)
    codes = pa.array(np.zeros(table.num_rows, np.int32))
    column = pa.DictionaryArray.from_arrays(codes, [run.id])
    return table.add_column(0, "run", column)


def _write(table: pa.Table, suffix: str, system: Any, place: str) -> None:
    """Write one file."""
    with system.open_output_stream(place) as sink:
        if suffix == ".parquet":
            _write_parquet(table, sink)
        elif suffix == ".csv":
            csv.write_csv(_plain(table), sink)
        else:
            feather.write_feather(table, sink, compression="zstd")


def _write_parquet(table: pa.Table, sink: Any) -> None:
    """Write Parquet: names by dictionary, counts by difference, numbers as they are."""
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


def _plain(table: pa.Table) -> pa.Table:
    """Dictionary columns as strings, which is all that CSV has."""
    fields = [
        field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field
        for field in table.schema
    ]
    return table.cast(pa.schema(fields))


def _write_partition(run: PastRun, system: Any, place: str, superseded: bool) -> int:
    """Write one run's file of a partitioned data set."""
    table = _table(run, superseded)
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
