"""Read runs, finished or still being written: their records as Arrow tables."""

from __future__ import annotations

import html
import os
from collections.abc import Container
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.journal.fits import COLUMN, Fits, align_fits, get_fits, name_in_fit
from tracking.journal.reader import read_records
from tracking.journal.segment import Damage
from tracking.journal.tombstones import Tombstones
from tracking.schema import CONTROL, SCHEMA, parse_value
from tracking.store import (
    Manifest,
    find_run,
    get_status,
    list_rank_dirs,
    read_manifests,
)

FIT: Final = COLUMN.name


class PastRun:
    """A run on the disk; reading changes nothing there.

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
        """``running``, ``finished``, ``failed`` or ``killed``.

        A run that says ``running`` but that no process writes was ``killed``.
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
        schema = SCHEMA
        if superseded:
            schema = SCHEMA.append(pa.field("superseded", pa.bool_(), nullable=False))
        tables = []
        for dir_rank, rank_dir in list_rank_dirs(self.path).items():
            if rank in (None, dir_rank):
                table = read_records(rank_dir)[0]
                tombstones = Tombstones()
                tombstones.add(table)
                is_live = tombstones.mask_live(table)
                if superseded:
                    is_superseded = ~(is_live | _mask_control(table))
                    table = table.append_column(
                        schema.field("superseded"), [is_superseded]
                    )
                elif not is_live.all():
                    table = table.filter(pa.array(is_live))
                tables.append(tombstones.fits.label(table))
        tables = align_fits(tables, at=SCHEMA.get_field_index("epoch"))
        tables = [_filter_rows(one, what=what, set=set, name=name) for one in tables]
        return _concat_rows(*tables) if tables else schema.empty_table()

    @property
    def damage(self) -> list[Damage]:
        """Damage in the files of the records; empty if there is none."""
        rank_dirs = list_rank_dirs(self.path).values()
        return [one for rank_dir in rank_dirs for one in read_records(rank_dir)[1]]

    @property
    def params(self) -> dict[str, Any]:
        """Last value of each hyper-parameter.

        One that a later fit has with another value than the first is named after that
        fit too, such as ``lr_fit2``.
        """
        return self._last_values("params")

    @property
    def tags(self) -> dict[str, Any]:
        """Last value of each tag, in all fits."""
        return self._last_values("tags")

    @property
    def inputs(self) -> dict[str, Any]:
        """Description of the data of each context, such as ``training``, in all fits."""
        return self._last_values("inputs")

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
        """
        records = self.records()
        kinds = [_filter_rows(records, what=what) for what in ("metrics", "steps")]
        table = _concat_rows(*kinds)
        place = pc.coalesce(table["index"], table["step"])
        is_shown = pc.and_(pc.is_valid(place), pc.is_valid(table["value"]))
        table, index = table.filter(is_shown), place.filter(is_shown).to_numpy()
        fits, rows, row = _number_places(table, index)
        # Ranks are in rising order: written backwards, the lowest rank's value remains.
        order = np.argsort(-table["rank"].to_numpy(), kind="stable")
        columns: dict[str, pa.Array] = {} if fits is None else {FIT: pa.array(fits)}
        columns["index"] = pa.array(rows)
        for key, found in _mask_by_key(table):
            at = order[found[order]]
            values = np.zeros(len(rows))
            values[row[at]] = table["value"].to_numpy()[at]
            absent = np.ones(len(rows), bool)
            absent[row[at]] = False
            columns[key] = pa.array(values, mask=absent)
        return pa.table(columns)

    def summary(self) -> dict[str, dict[str, float]]:
        """Return ``last``, ``min``, ``max`` and ``count`` of each metric ``<set>/<name>``.

        If the run has several fits, the metrics of later ones are named as in MLflow,
        such as ``valid/loss_fit2``.
        """
        wide = self.wide()
        names = wide.column_names
        fits = wide[FIT] if names[0] == FIT else None
        keys = names[1:] if fits is None else names[2:]
        found: dict[str, dict[str, float]] = {}
        for fit in [1] if fits is None else pc.unique(fits).to_pylist():
            rows = wide if fits is None else wide.filter(pc.equal(fits, fit))
            for key in keys:
                values = rows[key].drop_null()
                if len(values):
                    name = find_free_name(name_in_fit(key, fit), found)
                    found[name] = _summarize(values)
        return found

    def __repr__(self) -> str:
        return f"<PastRun {self.id}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: status, params, and a table of the metrics."""
        lines = [f"run {self.id}, {self.status}", f"in {self.path}"]
        lines += [f"{name} = {value!s:.80}" for name, value in self.params.items()]
        columns = ("last", "min", "max", "count")
        rows = [
            f"<tr><th>{html.escape(name)}</th>"
            + "".join(f"<td>{values[column]:.6g}</td>" for column in columns)
            + "</tr>"
            for name, values in self.summary().items()
        ]
        head = "".join(f"<th>{column}</th>" for column in ("", *columns))
        table = f"<table><tr>{head}</tr>{''.join(rows)}</table>" if rows else ""
        return f"<pre>{html.escape(chr(10).join(lines))}</pre>{table}"

    def _last_values(self, what: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        table = self.records(what=what, rank=0)
        columns = (table[n].to_pylist() for n in ("name", "kind", "value", "payload"))
        for fit, name, *value in zip(get_fits(table).tolist(), *columns, strict=True):
            parsed = parse_value(*value)
            if what == "params" and fit > 1 and found.get(name) != parsed:
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
    return [PastRun(path) for path in read_manifests(runs_dir)]


def find_highest_indices(rank_dir: Path) -> tuple[int, dict[tuple[str, str], int]]:
    """Find which fit a rank's next row is of, and the highest index of each (what, set).

    Only live rows of that fit count.
    """
    table, fits = _read_live(rank_dir)
    fit = fits.numbers[-1]
    table = table.filter(pc.is_valid(table["index"]))
    table = table.filter(pa.array(fits.find(table["seq"].to_numpy()) == fit))
    names = ["what", "set"]
    plain = pa.table(
        {**{n: table[n].cast(pa.string()) for n in names}, "index": table["index"]}
    )
    highest = plain.group_by(names).aggregate([("index", "max")]).to_pylist()
    return fit, {(row["what"], row["set"]): row["index_max"] for row in highest}


def count_fits(rank_dir: Path, begun_at: int | None = None) -> int:
    """Count the fits that a rank's live rows are of.

    Parameters
    ----------
    rank_dir
        Folder of the rank's records.
    begun_at
        Position at which a first fit is known to have begun. Otherwise there was one if
        a row has an epoch.
    """
    table, fits = _read_live(rank_dir)
    seq = table["seq"].to_numpy()
    has_epoch, has_index, has_step = (
        np.asarray(pc.is_valid(table[name]), bool)
        for name in ("epoch", "index", "step")
    )
    fit = fits.find(seq)
    is_known = fit > 1 if begun_at is None else (fit > 1) | (seq > begun_at)
    is_of_fit = has_epoch | is_known & (has_index | has_step)
    return int(fit[is_of_fit].max(initial=0))


def _read_live(rank_dir: Path) -> tuple[pa.Table, Fits]:
    """Read a rank's live rows, and which fit logged them."""
    table = read_records(rank_dir)[0]
    tombstones = Tombstones()
    tombstones.add(table)
    return table.filter(pa.array(tombstones.mask_live(table))), tombstones.fits


def find_free_name(name: str, taken: Container[str]) -> str:
    """Return the name, numbered if it is taken."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}#{number}"
    return free


def _number_places(table: pa.Table, index: Any) -> tuple[Any, Any, Any]:
    """Number the distinct places of rows, which are an index and perhaps a fit.

    Returns
    -------
    fit (None if the table does not tell) and index of each place, and the place of each row
    """
    if FIT not in table.column_names:
        return None, *np.unique(index, return_inverse=True)
    places = np.column_stack([get_fits(table), index])
    found, row = np.unique(places, axis=0, return_inverse=True)
    return found[:, 0], found[:, 1], row.reshape(-1)  # NumPy 2.0: two dimensions


def _summarize(values: pa.ChunkedArray) -> dict[str, float]:
    limits = pc.min_max(values)
    return {
        "last": values[-1].as_py(),
        "min": limits["min"].as_py(),
        "max": limits["max"].as_py(),
        "count": len(values),
    }


def _mask_control(table: pa.Table) -> Any:
    return np.logical_or.reduce([_mask_equal(table, "kind", kind) for kind in CONTROL])


def _filter_rows(table: pa.Table, **wanted: str | None) -> pa.Table:
    """Keep the rows with these words in their columns; None matches any."""
    for column, word in wanted.items():
        if word is not None:
            table = table.filter(pa.array(_mask_equal(table, column, word)))
    return table


def _mask_equal(table: pa.Table, column: str, word: str) -> Any:
    return np.asarray(pc.equal(table[column], word), bool)


def _concat_rows(*tables: pa.Table) -> pa.Table:
    return pa.concat_tables(tables).unify_dictionaries()


def _mask_by_key(table: pa.Table) -> list[tuple[str, Any]]:
    """Return a mask of the rows of each ``<set>/<name>``, in order of appearance."""
    words = {n: table[n].cast(pa.string()) for n in ("set", "name")}
    plain = pa.table({**words, "is_step": pc.is_null(table["index"])})
    distinct = plain.group_by(plain.column_names, use_threads=False).aggregate([])
    found: list[tuple[str, Any]] = []
    taken = {"index"}  # the other columns of ``wide``
    if FIT in table.column_names:
        taken.add(FIT)
    for row in distinct.to_pylist():
        plain_key = "/".join(word for word in (row["set"], row["name"]) if word)
        plain_key += "_step" if row["is_step"] else ""
        key = find_free_name(plain_key, taken)
        taken.add(key)
        mask = _mask_equal(table, "set", row["set"]) & _mask_equal(
            table, "name", row["name"]
        )
        mask &= np.asarray(plain["is_step"]) == row["is_step"]
        found.append((key, mask))
    return found
