"""Export the records of runs to Parquet, CSV or Arrow."""

from __future__ import annotations

import contextlib
import os
import tempfile
import urllib.parse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import csv, fs, ipc, parquet

from tracking.durable import replace_file
from tracking.errors import RunNotFoundError, describe_path, warn
from tracking.journal.fits import COLUMN, place_fits
from tracking.journal.reader import read_block, read_blocks
from tracking.journal.segment import Damage
from tracking.journal.tombstones import Tombstones
from tracking.read import PastRun, label_rows
from tracking.run import Run
from tracking.schema import SCHEMA, check_path
from tracking.store import find_runs, list_rank_dirs

SUFFIXES: Final = (".parquet", ".csv", ".arrow", ".feather")

_Words = dict[str, dict[str, None]]
_WORDS: Final = [one.name for one in SCHEMA if pa.types.is_dictionary(one.type)]

_OBJECT_STORES: Final = ("s3", "gcs", "abfs")
"""Filesystems of pyarrow without folders; a rename copies there."""

GROUP_ROWS: Final = 1 << 17
"""Rows that are written at once; about 30 MB in memory."""


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
        If a run does not exist (nothing is written), or is deleted during the export.
    ValueError
        If ``runs`` or ``path`` is empty, or the suffix is unknown.

    Notes
    -----
    The first column, ``run``, is the id of the run; there is a column ``fit`` only if a run
    has several. A warning lists rows that cannot be read. A file is replaced only when the
    new one is complete; one of another filesystem is written to a temporary file first. In
    a folder, the file of each exported run is replaced in the same way.
    """
    check_path(path, "export(path)")
    found = _open_runs(runs)
    target = os.fspath(path)
    if not target.strip():
        raise ValueError(
            f"export(path): expected a path, got {target!r}. Use '.' for this folder."
        )
    suffix = os.path.splitext(target)[1].lower()  # noqa: PTH122 (a URI, perhaps)
    if suffix and suffix not in SUFFIXES:
        raise ValueError(
            f"export({target!r}): expected a path that ends in {', '.join(SUFFIXES)}, or "
            f"a folder, got {suffix!r}. Choose one of these formats."
        )
    system, place = _resolve_target(target)
    if not suffix:
        return sum(_write_partition(run, system, place, superseded) for run in found)
    rows = _Rows(found, superseded=superseded)
    _write_file(rows, suffix, system, place)
    return rows.num_written


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
        try:
            system, place = fs.FileSystem.from_uri(target)
        except pa.ArrowInvalid as error:
            raise ValueError(
                f"export({target!r}): expected an address that pyarrow knows, got "
                f"{error}. Use for example s3://bucket/all.parquet, or a path."
            ) from error
        return system, place.rstrip("/")
    return fs.LocalFileSystem(), str(Path(target).expanduser().absolute())


class _RankBlocks:
    """The blocks of one rank of a run: those that were there when it was made.

    Attributes
    ----------
    words
        The words of the blocks by column, in order of appearance.
    tombstones
        The control rows of the rank.
    """

    def __init__(self, run: PastRun, rank_dir: Path, num_kept: int) -> None:
        self.run = run
        self.words: _Words = {name: {} for name in _WORDS}
        self.tombstones = Tombstones()
        self._rank_dir = rank_dir
        self._blocks: dict[int, pa.Table | None] = {}
        damage: list[Damage] = []
        for number, content in read_blocks(rank_dir, damage):
            table = content.table
            self.tombstones.add(table)
            for name, words in self.words.items():
                for chunk in table[name].chunks:
                    words.update(dict.fromkeys(chunk.dictionary.to_pylist()))
            # A sealed block can be read again: it does not change.
            num_kept -= table.num_rows
            is_kept = num_kept >= 0 or not content.is_sealed
            self._blocks[number] = table if is_kept else None
        for one in damage[:3]:
            warn(
                f"export({run.id!r}): expected undamaged records, got damage in "
                f"{one.file.name}: {one.reason}, {one.rows_lost} rows lost. All other "
                f"rows are written; 'harness verify {run.id}' lists the damage."
            )

    def __iter__(self) -> Iterator[pa.Table]:
        for number, table in self._blocks.items():
            if table is None:
                content = read_block(self._rank_dir, number)
                if content is None:
                    raise RunNotFoundError(
                        f"export({self.run.id!r}): expected the run until all of it is "
                        f"written, got no block {number} in {self._rank_dir} any more. "
                        "Export the other runs again."
                    )
                table = content.table
            yield table


class _Rows:
    """The records of runs, a group of rows after the other.

    Only the control rows and what a live writer may still change are held in memory.

    Attributes
    ----------
    num_written
        Rows that were iterated over so far.
    """

    def __init__(
        self,
        runs: Sequence[PastRun],
        *,
        superseded: bool,
        group_rows: int = GROUP_ROWS,
        names_runs: bool = True,
    ) -> None:
        self.num_written = 0
        self._superseded = superseded
        self._names_runs = names_runs
        self._group_rows = group_rows
        most = group_rows // len(runs)  # small runs are read once
        self._ranks = [
            _RankBlocks(run, rank_dir, most)
            for run in runs
            for rank_dir in list_rank_dirs(run.path).values()
        ]
        self._has_fits = any(map(self._has_later_fit, self._ranks))
        # Each group gets the same dictionaries, which a file of Arrow needs.
        empty = _make_empty([rank.words for rank in self._ranks])
        ids = [*dict.fromkeys(run.id for run in runs)]
        self._words = self._finish(
            label_rows(empty, Tombstones(), superseded=superseded), ids
        )

    @property
    def schema(self) -> pa.Schema:
        """Columns of the rows."""
        return self._words.schema

    def __iter__(self) -> Iterator[pa.Table]:
        """Yield the rows in order of run, rank and ``seq``; at least one table."""
        group, num_rows = [self._words], 0
        for table in self._read():
            group.append(table)
            num_rows += table.num_rows
            if num_rows >= self._group_rows:
                yield _join_words(*group)
                self.num_written += num_rows
                group, num_rows = [self._words], 0
        if num_rows or not self.num_written:
            yield _join_words(*group)
            self.num_written += num_rows

    def _read(self) -> Iterator[pa.Table]:
        for rank in self._ranks:
            for table in rank:
                yield self._finish(self._label(rank, table), [rank.run.id])

    def _label(self, rank: _RankBlocks, table: pa.Table) -> pa.Table:
        return label_rows(table, rank.tombstones, superseded=self._superseded)

    def _has_later_fit(self, rank: _RankBlocks) -> bool:
        """Whether a row is of a later fit; most runs have one, and are not read for it."""
        if len(rank.tombstones.fits.starts) == 1:
            return False
        return any(COLUMN.name in self._label(rank, one).column_names for one in rank)

    def _finish(self, table: pa.Table, ids: list[str]) -> pa.Table:
        """Add the column of the run, the first of the ids, and that of the fit."""
        if self._has_fits:
            table = place_fits(table, at=SCHEMA.get_field_index("epoch"))
        if not self._names_runs:  # as a folder does
            return table
        codes = pa.array(np.zeros(table.num_rows, np.int32))
        column = pa.DictionaryArray.from_arrays(codes, ids)
        return table.add_column(0, "run", column)


def _make_empty(found: list[_Words]) -> pa.Table:
    """Make a table without rows, whose dictionaries have all words."""
    columns = {name: pa.array([], SCHEMA.field(name).type) for name in SCHEMA.names}
    for name in _WORDS:
        words = dict.fromkeys(word for one in found for word in one[name])
        codes = pa.array([], pa.int32())
        columns[name] = pa.DictionaryArray.from_arrays(
            codes, pa.array(words, pa.string())
        )
    return pa.table(columns, schema=SCHEMA)


def _join_words(*tables: pa.Table) -> pa.Table:
    """Concatenate tables; their words get one dictionary, the first table's first."""
    return pa.concat_tables(tables).unify_dictionaries()


def _write_file(rows: _Rows, suffix: str, system: Any, place: str) -> None:
    """Write a file, which is seen whole or not at all; its folder is made."""
    parent = place.rpartition("/")[0]
    path, is_local = Path(place), isinstance(system, fs.LocalFileSystem)
    with _name_place(place):
        if parent:
            system.create_dir(parent, recursive=True)
        is_folder = is_local and path.is_dir()
    if not is_local:
        _send(rows, suffix, system, place)
        return
    if is_folder:
        msg = f"export({place!r}): expected a file, got {describe_path(path)}."
        raise IsADirectoryError(f"{msg} Choose another name.")
    with replace_file(path) as temporary:
        with _name_place(place):
            temporary.touch()
        _write(rows, suffix, temporary)


@contextlib.contextmanager
def _name_place(place: str) -> Iterator[None]:
    """Say which target cannot be written, if the block fails for it."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(
            error.errno,
            f"export({place!r}): expected a place that can be written, got {reason}. "
            "Choose another one.",
        ) from error


def _send(rows: _Rows, suffix: str, system: Any, place: str) -> None:
    """Write a file of another filesystem, once all rows are read.

    pyarrow 25 closes a stream that an error ends, and cannot abort it: an object store would
    keep the rows so far as a whole object.
    """
    with tempfile.TemporaryDirectory(prefix="export-") as folder:
        local = Path(folder) / f"rows{suffix}"
        _write(rows, suffix, local)
        parent, slash, name = place.rpartition("/")
        # An object appears when all of it is there; a file is renamed once it is whole.
        is_store = system.type_name in _OBJECT_STORES
        sent = place if is_store else f"{parent}{slash}.{os.getpid()}-{name}"
        fs.copy_files(str(local), sent, fs.LocalFileSystem(), system)
        if not is_store:
            system.move(sent, place)


def _write(rows: _Rows, suffix: str, path: Path) -> None:
    with (
        pa.OSFile(str(path), "wb") as sink,
        _WRITERS[suffix](sink, rows.schema) as writer,
    ):
        for table in rows:
            if suffix == ".csv":
                table = table.cast(_decode_schema(table.schema))
            writer.write_table(table)


def _open_parquet(sink: Any, schema: pa.Schema) -> Any:
    """Write Parquet with names as dictionaries and counts as differences."""
    names = [field.name for field in schema if pa.types.is_dictionary(field.type)]
    counts = ["seq", "time", "index", "epoch", "step"]
    return parquet.ParquetWriter(
        sink,
        schema,
        compression="zstd",
        use_dictionary=names,
        column_encoding=dict.fromkeys(counts, "DELTA_BINARY_PACKED"),
    )


def _open_csv(sink: Any, schema: pa.Schema) -> Any:
    return csv.CSVWriter(sink, _decode_schema(schema))


def _open_arrow(sink: Any, schema: pa.Schema) -> Any:
    """Write Feather of version 2, which is Arrow's file format."""
    return ipc.new_file(sink, schema, options=ipc.IpcWriteOptions(compression="zstd"))


_WRITERS: Final = {
    ".parquet": _open_parquet,
    ".csv": _open_csv,
    ".arrow": _open_arrow,
    ".feather": _open_arrow,
}


def _decode_schema(schema: pa.Schema) -> pa.Schema:
    """Strings in place of dictionaries, which CSV does not have."""
    return pa.schema(
        field.with_type(pa.string()) if pa.types.is_dictionary(field.type) else field
        for field in schema
    )


def _write_partition(run: PastRun, system: Any, folder: str, superseded: bool) -> int:
    """Write the file of one run in a partitioned folder, and remove others of this run."""
    rows = _Rows([run], superseded=superseded, names_runs=False)
    part = f"{folder}/run={urllib.parse.quote(run.id, safe='')}"
    name = "part-0.parquet"
    _write_file(rows, ".parquet", system, f"{part}/{name}")
    for one in system.get_file_info(fs.FileSelector(part)):
        if one.base_name.startswith("part-") and one.base_name != name:
            system.delete_file(one.path)
    return rows.num_written
