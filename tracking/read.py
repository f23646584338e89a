"""Read runs, finished or still being written: their records as Arrow tables."""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.curves.points import MetricPoints, collect_points, encode_names
from tracking.journal.arrays import make_array, make_texts, read_array
from tracking.journal.fits import COLUMN, Fits, align_fits, get_fits, name_in_fit
from tracking.journal.reader import SealedBlocks, concat_rows, read_records
from tracking.journal.segment import Damage
from tracking.journal.tombstones import Tombstones
from tracking.schema import CONTROL, SCHEMA, check_name, parse_value
from tracking.store import (
    Manifest,
    find_run,
    get_status,
    list_rank_dirs,
    read_manifests,
)

SUPERSEDED: Final = pa.field("superseded", pa.bool_(), nullable=False)
"""Column that tells the superseded rows."""


class PastRun:
    """A run on disk, opened for reading.

    Returned by ``tracking.open``. Every call reads the files again, so that a run can be
    watched while it is being written.

    Parameters
    ----------
    path
        Folder of the run.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.id = path.name

    @property
    def manifest(self) -> Manifest:
        """Facts about the run as a whole."""
        return Manifest.read(self.path)

    @property
    def name(self) -> str:
        """Readable name."""
        return self.manifest.name

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed``, ``killed`` or ``unknown``.

        A run without an end whose process is gone was ``killed``. It is ``unknown`` if the
        process may be alive on another machine.
        """
        return get_status(self.path, self.manifest)

    def records(
        self,
        what: str | None = None,
        set: str | None = None,
        name: str | None = None,
        superseded: bool = False,
        rank: int | None = None,
    ) -> pa.Table:
        """Read the rows of the run, in order of rank and ``seq``.

        Parameters
        ----------
        what, set, name
            Only rows with these values; None: any.
        superseded
            Include rows that were overwritten or rewound, and the control rows that did
            so; the column ``superseded`` is true for the former.
        rank
            Only rows of this rank; None: all ranks.

        Returns
        -------
        table in the schema of ``tracking.schema``; if the run has several fits, with a
        column ``fit`` before ``epoch``, which counts from 1
        """
        for word, given in (("what", what), ("set", set), ("name", name)):
            if given is not None:
                check_name(given, word, "PastRun.records")
        ranks = list_rank_dirs(self.path)
        found = (_read_rank(ranks[one]) for one in ranks if rank in (None, one))
        tables = [
            label_rows(table, tombstones, superseded=superseded)
            for table, _, tombstones in found
        ]
        tables = align_fits(tables, at=SCHEMA.get_field_index("epoch"))
        tables = [_filter_rows(one, what=what, set=set, name=name) for one in tables]
        schema = SCHEMA.append(SUPERSEDED) if superseded else SCHEMA
        return concat_rows(tables) if tables else schema.empty_table()

    def snapshot(self, known: SealedBlocks | None = None) -> Snapshot:
        """Read the records once, and answer several questions from them.

        Parameters
        ----------
        known
            An empty dictionary, given again in later calls while the run is being written:
            they read only what is new. None: everything is read.

        Returns
        -------
        Snapshot
            ``params``, ``tags``, ``inputs``, ``wide`` and ``summary`` as here, of what
            the files hold now.
        """
        tables, damage, written = [], [], {}
        for rank, path in list_rank_dirs(self.path).items():
            table, lost, tombstones = _read_rank(path, known)
            tables.append(label_rows(table, tombstones))
            damage += lost
            written[rank] = table["seq"]
        tables = align_fits(tables, at=SCHEMA.get_field_index("epoch"))
        return Snapshot(concat_rows(tables), damage, written)

    @property
    def damage(self) -> list[Damage]:
        """Damage in the files of the records; empty if there is none."""
        rank_dirs = list_rank_dirs(self.path).values()
        if not rank_dirs:
            lost = "the folder with the records is missing"
            return [Damage(self.path / "records", 0, 0, lost)]
        return [one for rank_dir in rank_dirs for one in read_records(rank_dir)[1]]

    @property
    def params(self) -> dict[str, Any]:
        """Last value of each hyper-parameter.

        A value that a later fit changes is listed under that fit too, such as ``lr_fit2``.
        """
        return self.snapshot().params

    @property
    def tags(self) -> dict[str, Any]:
        """Last value of each tag, in all fits."""
        return self.snapshot().tags

    @property
    def inputs(self) -> dict[str, Any]:
        """Description of the data of each context, such as ``training``, in all fits."""
        return self.snapshot().inputs

    def wide(self) -> pa.Table:
        """Return metrics with a row for each index and a column for each ``<set>/<name>``.

        Returns
        -------
        table with ``index`` and one float64 column for each numeric metric; null where
        it has no value. If there are several values at one index, the last one of the
        lowest rank is taken. Values of ``log_step``, and metrics that have a step and no
        index, are at their step, in columns ``<set>/<name>_step``, as in MLflow. If the
        run has several fits, the first column is ``fit``, and each fit has rows of its
        own.

        Notes
        -----
        The table takes 9 bytes for each row and column, whether it has a value there or
        not. ``records`` and ``summary`` take only as much as was logged.
        """
        return self.snapshot().wide()

    def summary(self) -> dict[str, dict[str, float]]:
        """Return ``last``, ``min``, ``max`` and ``count`` of each metric ``<set>/<name>``.

        If the run has several fits, the metrics of later ones are named as in MLflow,
        such as ``valid/loss_fit2``.
        """
        return self.snapshot().summary()

    def __repr__(self) -> str:
        return f"<PastRun {self.id}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: status, params, and a table of the metrics."""
        read = self.snapshot()
        lines = [f"run {self.id}, {self.status}", f"in {self.path}"]
        lines += [f"{name} = {value!s:.80}" for name, value in read.params.items()]
        columns = ("last", "min", "max", "count")
        rows = [
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(f"<td>{values[column]:.6g}</td>" for column in columns)
            + "</tr>"
            for name, values in read.summary().items()
        ]
        head = "".join(f"<th>{column}</th>" for column in ("", *columns))
        table = f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else ""
        text = html.escape("\n".join(lines))
        return f'<pre style="font-family: monospace">{text}</pre>{table}'


@dataclass(frozen=True, repr=False)
class Snapshot:
    """What a run's files held when they were read.

    Returned by ``PastRun.snapshot``.

    Attributes
    ----------
    records
        Live rows of all ranks, as ``PastRun.records`` returns them.
    damage
        Damage in the files of the records.
    written
        ``seq`` of every row of each rank, superseded and control rows included.
    """

    records: pa.Table
    damage: list[Damage]
    written: dict[int, pa.ChunkedArray]

    @property
    def params(self) -> dict[str, Any]:
        """Last value of each hyper-parameter, as ``PastRun.params``."""
        return self._last_values("params")

    @property
    def tags(self) -> dict[str, Any]:
        """Last value of each tag."""
        return self._last_values("tags")

    @property
    def inputs(self) -> dict[str, Any]:
        """Description of the data of each context."""
        return self._last_values("inputs")

    def wide(self) -> pa.Table:
        """Return metrics with a row for each index, as ``PastRun.wide``."""
        return self.points.widen()

    def summary(self) -> dict[str, dict[str, float]]:
        """Return last and extreme values of each metric, as ``PastRun.summary``."""
        return self.points.summarize()

    @cached_property
    def points(self) -> MetricPoints:
        """The points of numeric metrics, by name."""
        return collect_points(self.records)

    def select(self, what: str) -> pa.Table:
        """Return the live rows of one kind of record."""
        return _filter_rows(self.records, what=what)

    def count_rows_after(self, seq: int, rank: int = 0) -> int:
        """Count the rows of a rank behind a position, whatever became of them."""
        written = self.written.get(rank)
        return 0 if written is None else int((read_array(written) > seq).sum())

    def _last_values(self, what: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        words = ("name", "kind", "value", "payload")
        table = self.records
        is_wanted = _mask_equal(table, "what", what) & (read_array(table["rank"]) == 0)
        fits = [COLUMN.name] if COLUMN.name in table.column_names else []
        table = table.select([*words, *fits]).filter(make_array(is_wanted))
        columns = (table[word].to_pylist() for word in words)
        for fit, name, *value in zip(get_fits(table).tolist(), *columns, strict=True):
            parsed = parse_value(*value)
            if what == "params" and found.get(name) != parsed:
                name = name_in_fit(name, fit)
            found[name] = parsed
        return found


def open(
    ref: str | os.PathLike[str], runs_dir: str | os.PathLike[str] | None = None
) -> PastRun:
    """Open a run, finished or being written.

    Parameters
    ----------
    ref
        Its folder, id or name, or any piece of an id or name that is unique among runs.
    runs_dir
        Folder of runs; None: ``HARNESS_RUNS``, else ``./runs``.

    Raises
    ------
    RunNotFoundError
        If no run matches ``ref``, or several do.
    """
    return PastRun(find_run(ref, runs_dir))


def list_runs(runs_dir: str | os.PathLike[str] | None = None) -> list[PastRun]:
    """Return all runs of a folder, newest first.

    A run whose ``run.json`` cannot be read is left out, with a warning.
    """
    return [PastRun(path) for path, _ in read_manifests(runs_dir)]


def find_highest_indices(rank_dir: Path) -> tuple[int, dict[tuple[str, str], int]]:
    """Find which fit a rank's next row is of, and the highest index of each (what, set).

    Only live rows of that fit count.
    """
    table, fits = _read_live(rank_dir)
    fit = fits.numbers[-1]
    table = table.filter(pc.is_valid(table["index"]))
    table = table.filter(make_array(fits.find(read_array(table["seq"])) == fit))
    what, whats = encode_names(table["what"])
    split, splits = encode_names(table["set"])
    pairs, place = np.unique(what * len(splits) + split, return_inverse=True)
    highest = np.full(len(pairs), -1)
    np.maximum.at(highest, place, read_array(table["index"]))
    names = ((whats[pair // len(splits)], splits[pair % len(splits)]) for pair in pairs)
    return fit, dict(zip(names, highest.tolist(), strict=True))


def count_fits(rank_dir: Path, begun_at: int | None = None) -> int:
    """Count the fits that a rank's live rows are of.

    Parameters
    ----------
    begun_at
        Position at which a first fit is known to have begun. Otherwise there was one if
        a row has an epoch.
    """
    table, fits = _read_live(rank_dir)
    seq = read_array(table["seq"])
    has_epoch, has_index, has_step = (
        read_array(pc.is_valid(table[name])) for name in ("epoch", "index", "step")
    )
    fit = fits.find(seq)
    is_known = fit > 1 if begun_at is None else (fit > 1) | (seq > begun_at)
    is_of_fit = has_epoch | is_known & (has_index | has_step)
    return int(fit[is_of_fit].max(initial=0))


def label_rows(
    table: pa.Table, tombstones: Tombstones, *, superseded: bool = False
) -> pa.Table:
    """Return the live rows of a rank, with the fit of each if they are of a later one.

    Parameters
    ----------
    table
        Rows of one rank, in the public schema.
    tombstones
        All control rows of the rank.
    superseded
        Return all rows, with a column that tells the superseded ones.
    """
    is_live = tombstones.mask_live(table)
    if superseded:
        is_control = [_mask_equal(table, "kind", kind) for kind in CONTROL]
        is_superseded = ~(is_live | np.logical_or.reduce(is_control))
        table = table.append_column(SUPERSEDED, make_array(is_superseded))
    elif not is_live.all():
        table = table.filter(make_array(is_live))
    return tombstones.fits.label(table)


def _read_rank(
    rank_dir: Path, known: SealedBlocks | None = None
) -> tuple[pa.Table, list[Damage], Tombstones]:
    """Read all rows of one rank, their damage, and what its control rows say."""
    table, damage = read_records(rank_dir, known)
    tombstones = Tombstones()
    tombstones.add(table)
    return table, damage, tombstones


def _read_live(rank_dir: Path) -> tuple[pa.Table, Fits]:
    """Read a rank's live rows, and which fit logged them."""
    table, _, tombstones = _read_rank(rank_dir)
    return table.filter(make_array(tombstones.mask_live(table))), tombstones.fits


def _filter_rows(table: pa.Table, **wanted: str | None) -> pa.Table:
    """Keep the rows with these words in their columns; None matches any."""
    for column, word in wanted.items():
        if word is not None:
            table = table.filter(make_array(_mask_equal(table, column, word)))
    return table


def _mask_equal(table: pa.Table, column: str, word: str) -> Any:
    found = pc.is_in(table[column].cast(pa.string()), make_texts([word]))
    return read_array(found)
