"""Start a new run from a checkpoint of another run."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from pathlib import Path

import tracking
from harness.checkpoint.format import (
    RunRef,
    list_checkpoints,
    read_manifest,
    verify_checkpoint,
)
from harness.checkpoint.ranks.states import SavedRanks
from harness.errors import CheckpointError
from tracking.durable import replace_folder
from tracking.fork import fork


def fork_run(
    ref: str | Path,
    step: int,
    *,
    name: str | None = None,
    runs_dir: str | Path | None = None,
) -> tracking.PastRun:
    """Make a run with the records of another run up to a checkpoint, and the checkpoint.

    Parameters
    ----------
    ref
        The other run: its path, its id, or a unique part of its name.
    step : >= 0
        Optimizer steps finished at the checkpoint; if several match, the one saved last.
    name
        Readable name; None: the name of the other run with ``-fork``.

    Returns
    -------
    PastRun
        Continue it with ``harness resume``.

    Raises
    ------
    CheckpointError
        If there is no undamaged checkpoint of that step.
    ValueError
        If a process is writing the other run.
    """
    parent = tracking.open(ref, runs_dir=runs_dir)
    path = _find_checkpoint(parent.path / "checkpoints", parent.id, step)
    manifest = verify_checkpoint(path)
    positions = dict(enumerate(SavedRanks(path, manifest).index.journals))
    about = {"checkpoint": path.name, **asdict(manifest.position)}
    child = fork(parent, positions, about, name)
    try:
        _copy_checkpoint(path, child)
    except BaseException:
        shutil.rmtree(child.path, ignore_errors=True)
        raise
    return child


def _find_checkpoint(folder: Path, run_id: str, step: int) -> Path:
    steps = {}
    for path in reversed(list_checkpoints(folder)):
        steps[read_manifest(path).position.step] = path
    if step in steps:
        return steps[step]
    known = ", ".join(str(one) for one in sorted(steps)) or "none"
    msg = f"fork({run_id!r}, at={step}): expected a step with a checkpoint, got {step}."
    raise CheckpointError(f"{msg} There are checkpoints of steps: {known}.")


def _copy_checkpoint(path: Path, child: tracking.PastRun) -> None:
    """Copy a checkpoint into a run, with that run in its manifest."""
    target = child.path / "checkpoints" / path.name
    # A fit of the child removes a folder of this name that a killed fork left.
    unfinished = target.with_name(f".{path.name}.tmp")
    with replace_folder(target, temporary=unfinished) as temporary:
        shutil.copytree(path, temporary, dirs_exist_ok=True)
        run = RunRef(id=child.id, path=str(child.path.absolute()))
        replace(read_manifest(temporary), run=run).write(temporary)
        verify_checkpoint(temporary)
