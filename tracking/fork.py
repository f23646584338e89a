"""A run that begins as another one did, and goes its own way from some position on."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute as pc

from tracking.journal.reader import list_blocks, read_block
from tracking.journal.segment import write_segment
from tracking.read import PastRun
from tracking.run import now
from tracking.store import create_run_dir, get_rank_dir


def fork(
    parent: PastRun,
    positions: Mapping[int, int],
    about: Mapping[str, Any],
    name: str | None = None,
) -> PastRun:
    """Make a run of the first rows of another one; the other stays as it is.

    Parameters
    ----------
    parent
        A run that has ended.
    positions
        By rank, the ``seq`` of the last row that the two share, from ``Run.position``.
    about
        What the manifest keeps of the place, beside the parent's id: its step, say.
    name
        Readable name; None: the parent's with ``-fork``.

    Returns
    -------
    PastRun
        Marked killed, to be gone on with by ``start(run_id=...)``.

    Raises
    ------
    ValueError
        If the parent is being written.
    """
    if parent.status == "running":
        raise ValueError(
            f"fork({parent.id!r}): expected a run that has ended, got one that is being "
            "written. End it first."
        )
    manifest = parent.manifest
    path, name = create_run_dir(
        parent.path.parent, manifest.experiment, name or f"{manifest.name}-fork"
    )
    try:
        for rank, position in positions.items():
            _copy_rows(
                get_rank_dir(parent.path, rank), get_rank_dir(path, rank), position
            )
        child = dataclasses.replace(
            manifest,
            id=path.name,
            name=name,
            created=now(),
            ended=now(),
            status="killed",
            error=None,
            mlflow={},
            resumed=[],
            extra=manifest.extra | {"forked_from": {"run": parent.id, **about}},
        )
        child.write(path)
        _copy_artifacts(parent.path, PastRun(path))
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    return PastRun(path)


def _copy_rows(source: Path, target: Path, position: int) -> None:
    """Rows up to a position, control rows among them, in sealed blocks."""
    target.mkdir(parents=True)
    for number in list_blocks(source):
        view = read_block(source, number)
        assert view is not None
        kept = view.table.filter(pc.less_equal(view.table["seq"], pa.scalar(position)))
        if kept.num_rows:
            write_segment(
                kept,
                target / f"{number:06d}.arrow",
                rank=int(target.name),
                damage=tuple(view.damage),
            )


def _copy_artifacts(source: Path, child: PastRun) -> None:
    """Files that the shared rows tell of."""
    for name in set(child.records(what="artifacts")["name"].to_pylist()):
        file, copy = source / "artifacts" / name, child.path / "artifacts" / name
        if file.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
