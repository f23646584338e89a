"""The final checkpoint of a fit whose weights are not gathered: each rank writes its part.

It has weights and nothing else, in a folder ``final`` beside the checkpoints of the fit, where
no resume looks for it and nothing removes it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from harness.checkpoint.format import (
    Manifest,
    Position,
    RunRef,
    begin_checkpoint,
    commit_checkpoint,
    get_final_path,
    mark_failed,
    write_rank,
)
from harness.checkpoint.state import (
    describe_left_out,
    get_extra_states,
    read_description,
)
from harness.context import Context
from harness.pytree import flatten
from harness.reshard.model_part import take_model_part

FINAL = "final"
"""Folder of final checkpoints, in the folder of a fit's other ones."""


def save_final(ctx: Context, folder: Path) -> Path | None:
    """Save the weights of a fit that has ended; every rank must call it.

    Returns
    -------
    Path of the checkpoint; None on every rank, with a warning on rank 0, if a rank could
    not write
    """
    accelerator = ctx.accelerator
    position = Position(
        epoch=ctx.epoch or 1, iter=ctx.trained, step=ctx.step, phase="epoch"
    )
    temporary: str | None = None
    error: Exception | None = None
    if accelerator.is_main:
        try:
            temporary = str(begin_checkpoint(folder / FINAL, position))
        except OSError as found:
            error = found
    temporary = accelerator.broadcast(temporary)
    if temporary is not None:
        error = _write(ctx, Path(temporary), position)
    errors = accelerator.gather_objects(None if error is None else str(error))
    if temporary is not None and not any(errors):
        return get_final_path(Path(temporary))
    if accelerator.is_main:
        reason = next((text for text in errors if text), "no folder")
        msg = f"fit: expected to write the final checkpoint, got {reason}"
        warnings.warn(f"{msg} The weights are gathered on rank 0.", stacklevel=2)
    return None


def _write(ctx: Context, temporary: Path, position: Position) -> Exception | None:
    """Write the part of this rank and, on rank 0, commit."""
    accelerator = ctx.accelerator
    path = None if ctx.run.path is None else str(Path(ctx.run.path).absolute())
    manifest = Manifest(
        world_size=accelerator.world_size,
        position=position,
        run=RunRef(id=ctx.run.id, path=path),
        about=read_description(ctx),
    )
    state = {
        "accelerator": take_model_part(accelerator.state_dict()),
        "extra": get_extra_states(ctx.model),
        **describe_left_out(ctx.model),
    }
    try:
        plan, tensors = flatten(state)
        on_cpu = {name: value.cpu().contiguous() for name, value in tensors.items()}
        write_rank(temporary, accelerator.rank, plan, on_cpu)
        if accelerator.is_main:
            commit_checkpoint(temporary, manifest)
    except Exception as error:  # noqa: BLE001  the weights must not be lost with it
        mark_failed(temporary, accelerator.rank)
        return error
    return None
