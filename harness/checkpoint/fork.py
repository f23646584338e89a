"""A new run from a checkpoint of another one, to go its own way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tracking
from harness.checkpoint.format import (
    MANIFEST,
    check,
    checkpoints,
    read_manifest,
    read_part,
)
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
    """Make a run that shares another one's records up to a checkpoint, and the checkpoint.

    Parameters
    ----------
    ref
        The other run: its path, id or a part of its name.
    step : >= 0
        Optimizer steps done at the checkpoint; of several the one saved last.
    name
        Readable name; None: the other's with ``-fork``.
    runs_dir
        Folder of runs.

    Returns
    -------
    PastRun
        ``harness resume`` goes on with it.

    Raises
    ------
    CheckpointError
        If there is no whole checkpoint of that step.
    ValueError
        If the other run is being written.
    """
    parent = tracking.open(ref, runs_dir=runs_dir)
    place = _at(parent.path / "checkpoints", parent.id, step)
    manifest = check(place)
    positions = {
        rank: read_part(place, rank)["journal"]
        for rank in range(manifest["world_size"])
    }
    about = {"checkpoint": place.name, **manifest["position"]}
    child = fork(parent, positions, about, name)
    try:
        _copy(place, child)
    except BaseException:
        shutil.rmtree(child.path, ignore_errors=True)
        raise
    return child


def _at(folder: Path, run_id: str, step: int) -> Path:
    """The checkpoint of a step."""
    steps = {}
    for place in reversed(checkpoints(folder)):
        steps[read_manifest(place)["position"]["step"]] = place
    if step in steps:
        return steps[step]
    known = ", ".join(str(one) for one in sorted(steps)) or "none"
    msg = f"fork({run_id!r}, at={step}): expected a step with a checkpoint, got {step}."
    raise CheckpointError(f"{msg} There are checkpoints of steps: {known}.")


def _copy(place: Path, child: tracking.PastRun) -> None:
    """Copy a checkpoint into a run, as its own; in place by one rename."""
    target = child.path / "checkpoints" / place.name
    # A fit of the child removes a folder of this name that a killed fork left.
    unfinished = target.with_name(f".{place.name}.tmp")
    with replace_folder(target, temporary=unfinished) as temporary:
        shutil.copytree(place, temporary, dirs_exist_ok=True)
        manifest = json.loads((temporary / MANIFEST).read_text(encoding="utf-8"))
        manifest["run"] = {"id": child.id, "path": str(child.path.absolute())}
        (temporary / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
        check(temporary)
