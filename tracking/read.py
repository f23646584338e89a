"""Runs of the past, and of now, read: their records as Arrow tables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.ending import get_status
from tracking.journal.reader import read_records
from tracking.journal.segment import Damage
from tracking.journal.tombstones import Tombstones
from tracking.schema import CONTROL, SCHEMA, parse_value
from tracking.store import Manifest, find_run, list_rank_dirs, run_paths


class PastRun:
    """A run as it stands on the disk; reading changes nothing there.

    Made by ``tracking.open``. What it tells is read anew on each call, so that a run
    which is still being written can be watched.

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
        """What is known of the run as a whole."""
        return Manifest.read(self.path)

    @property
    def name(self) -> str:
        """Readable name."""
        return self.manifest.name

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed`` or ``killed``.

        The last also if the run says ``running`` and nobody writes it any more.
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
        """Rows of the run, in order of rank and ``seq``.

        Parameters
        ----------
        what, set, name
            Only rows that have these; None: any.
        superseded
            True: also rows that were overwritten or rewound, and the control rows that
            say so; a column ``superseded`` tells the former.
        rank
            Only rows of this rank; None: of all.

        Returns
        -------
        Table in the schema of ``tracking.schema``
        """
        schema = SCHEMA
        if superseded:
            schema = SCHEMA.append(pa.field("superseded", pa.bool_(), nullable=False))
        tables = [schema.empty_table()]
        for dir_rank, rank_dir in list_rank_dirs(self.path).items():
            if rank in (None, dir_rank):
                table = read_records(rank_dir)[0]
                alive = _alive(table)
                if superseded:
                    gone = ~(alive | _is_control(table))
                    table = table.append_column(schema.field("superseded"), [gone])
                elif not alive.all():
                    table = table.filter(pa.array(alive))
                tables.append(_having(table, what=what, set=set, name=name))
        return pa.concat_tables(tables).unify_dictionaries()

    @property
    def damage(self) -> list[Damage]:
        """What could not be read of the records; empty if all is well."""
        parts = list_rank_dirs(self.path).values()
        return [damage for rank_dir in parts for damage in read_records(rank_dir)[1]]

    @property
    def params(self) -> dict[str, Any]:
        """Hyper-parameters; of each the last value."""
        return self._last_values("params")

    @property
    def tags(self) -> dict[str, Any]:
        """Tags; of each the last value."""
        return self._last_values("tags")

    def wide(self) -> pa.Table:
        """Metrics with a row for each index and a column for each ``<set>/<name>``.

        Returns
        -------
        Table with ``index`` and one float64 column for each numeric metric; null where
        it has no value. Of several values at one index the last of the lowest rank.
        """
        table = self.records(what="metrics")
        table = table.filter(
            pc.and_(pc.is_valid(table["index"]), pc.is_valid(table["value"]))
        )
        index = table["index"].to_numpy()
        rows, row = np.unique(index, return_inverse=True)
        # Ranks come in rising order: written backwards, the lowest rank's is left.
        order = np.argsort(-table["rank"].to_numpy(), kind="stable")
        columns: dict[str, pa.Array] = {"index": pa.array(rows)}
        for key, found in _by_key(table):
            at = order[found[order]]
            values = np.zeros(len(rows))
            values[row[at]] = table["value"].to_numpy()[at]
            absent = np.ones(len(rows), bool)
            absent[row[at]] = False
            columns[key] = pa.array(values, mask=absent)
        return pa.table(columns)

    def summary(self) -> dict[str, dict[str, float]]:
        """Of each metric ``<set>/<name>``: ``last``, ``min``, ``max``, ``count``."""
        wide = self.wide()
        found = {}
        for key in wide.column_names[1:]:
            values = wide[key].drop_null()
            limits = pc.min_max(values)
            found[key] = {
                "last": values[-1].as_py(),
                "min": limits["min"].as_py(),
                "max": limits["max"].as_py(),
                "count": len(values),
            }
        return found

    def __repr__(self) -> str:
        return f"<PastRun {self.id}>"

    def _last_values(self, what: str) -> dict[str, Any]:
        """Last value of each name."""
        table = self.records(what=what, rank=0).select(
            ["name", "kind", "value", "payload"]
        )
        return {
            row["name"]: parse_value(row["kind"], row["value"], row["payload"])
            for row in table.to_pylist()
        }


def open(
    ref: str | os.PathLike[str], runs_dir: str | os.PathLike[str] | None = None
) -> PastRun:
    """A run of the past, or one that is being written.

    Parameters
    ----------
    ref
        Its folder, id or name, or a part of id or name that no other run has.
    runs_dir
        Folder of runs; None: ``HARNESS_RUNS``, else ``./runs``.

    Raises
    ------
    RunNotFoundError
        If no run answers to ``ref``, or several do.
    """
    return PastRun(find_run(ref, runs_dir))


def list_runs(runs_dir: str | os.PathLike[str] | None = None) -> list[PastRun]:
    """All runs of a folder, newest first."""
    return [PastRun(path) for path in run_paths(runs_dir)]


def find_highest_indices(rank_dir: Path) -> dict[tuple[str, str], int]:
    """Highest index of each (what, set) among the rows of a part that count."""
    table = read_records(rank_dir)[0]
    table = table.filter(pa.array(_alive(table)))
    table = table.filter(pc.is_valid(table["index"]))
    names = ["what", "set"]
    plain = pa.table(
        {**{n: table[n].cast(pa.string()) for n in names}, "index": table["index"]}
    )
    highest = plain.group_by(names).aggregate([("index", "max")]).to_pylist()
    return {(row["what"], row["set"]): row["index_max"] for row in highest}


def _alive(table: pa.Table) -> Any:
    """Mask of the rows of a whole part that count."""
    tombstones = Tombstones()
    tombstones.add(table)
    return tombstones.mask_live(table)


def _is_control(table: pa.Table) -> Any:
    """Mask of the control rows."""
    return np.logical_or.reduce([_equal(table, "kind", kind) for kind in CONTROL])


def _having(table: pa.Table, **wanted: str | None) -> pa.Table:
    """Rows that have these words in their columns; None is any."""
    for column, word in wanted.items():
        if word is not None:
            table = table.filter(pa.array(_equal(table, column, word)))
    return table


def _equal(table: pa.Table, column: str, word: str) -> Any:
    """Mask of the rows with a word in a column of words."""
    return np.asarray(pc.equal(table[column], word), bool)


def _by_key(table: pa.Table) -> list[tuple[str, Any]]:
    """Mask of the rows of each ``<set>/<name>``, in order of first appearance."""
    pairs = table.select(["set", "name"])
    plain = pa.table({n: pairs[n].cast(pa.string()) for n in pairs.column_names})
    distinct = plain.group_by(["set", "name"], use_threads=False).aggregate([])
    found = []
    for row in distinct.to_pylist():
        key = "/".join(word for word in (row["set"], row["name"]) if word)
        mask = _equal(table, "set", row["set"]) & _equal(table, "name", row["name"])
        found.append((key, mask))
    return found
