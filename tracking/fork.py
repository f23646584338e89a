"""Fork a run: a new run that starts with the first rows of another one."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import compute as pc

from tracking.journal.reader import get_segment_path, list_blocks, read_block
from tracking.journal.segment import write_segment
from tracking.read import PastRun
from tracking.run import utc_now
from tracking.store import create_run_dir, get_rank_dir


def fork(
    parent: PastRun,
    positions: Mapping[int, int],
    about: Mapping[str, Any],
    name: str | None = None,
) -> PastRun:
    """Create a run from the first rows of another one, which does not change.

    Parameters
    ----------
    parent
        A run that has ended.
    positions
        By rank, the ``seq`` of the last row to copy, from ``Run.position``.
    about
        More about the fork for the manifest, e.g. the step of the checkpoint.
    name
        Readable name; None: the parent's name with ``-fork``.

    Returns
    -------
    PastRun
        Marked as killed; ``start(run_id=...)`` continues it.

    Raises
    ------
    ValueError
        If the parent is still being written.
    """
    if parent.status == "running":
        raise ValueError(
            f"fork({parent.id!r}): expected a run that has ended, got one that is still "
            "being written. Stop it first."
        )
    manifest = parent.manifest
    path, name = create_run_dir(
        parent.path.parent, manifest.experiment, name or f"{manifest.name}-fork"
    )
    try:
        for rank, position in positions.items():
            source, target = (get_rank_dir(one, rank) for one in (parent.path, path))
            _copy_rows(source, target, position)
        child = dataclasses.replace(
            manifest,
            id=path.name,
            name=name,
            created=utc_now(),
            ended=utc_now(),
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
    """Copy all rows up to a position, control rows included, as sealed blocks."""
    target.mkdir(parents=True)
    for number in list_blocks(source):
        view = read_block(source, number)
        assert view is not None
        kept = view.table.filter(pc.less_equal(view.table["seq"], pa.scalar(position)))
        if kept.num_rows:
            write_segment(kept, get_segment_path(target, number), damage=view.damage)


def _copy_artifacts(source: Path, child: PastRun) -> None:
    """Copy the artifacts that the shared rows record."""
    for name in _list_files(child):
        file, copy = source / "artifacts" / name, child.path / "artifacts" / name
        if file.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)


def _list_files(run: PastRun) -> set[str]:
    """Names below ``artifacts/`` of the files that the rows of a run record."""
    names: set[str] = set()
    for what in ("artifacts", "images", "tables"):
        for row in run.records(what=what).select(["name", "payload"]).to_pylist():
            described = json.loads(row["payload"] or "null")
            about = described[0] if isinstance(described, list) and described else {}
            names |= {row["name"], *about.get("images", [])} - {""}
    return names
