"""The final checkpoint of a fit whose weights are not gathered: each rank writes its part.

It has weights and nothing else, in a folder ``final`` beside the checkpoints of the fit, where
no resume looks for it and nothing removes it.
"""

from __future__ import annotations

import warnings
from pathlib import Path

from torch import Tensor

from harness.checkpoint.format import Position, get_final_path
from harness.checkpoint.held.objects import get_extra_states
from harness.checkpoint.state import describe_left_out
from harness.checkpoint.writer import (
    begin_on_main,
    describe_checkpoint,
    write_and_commit,
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
    temporary, error = begin_on_main(folder / FINAL, position, ctx)
    if temporary is not None:
        error = _write(ctx, temporary, position)
    errors = accelerator.gather_objects(None if error is None else str(error))
    if temporary is not None and not any(errors):
        return get_final_path(temporary)
    if accelerator.is_main:
        reason = next((text for text in errors if text), "no folder")
        msg = f"fit: expected to write the final checkpoint, got {reason}"
        warnings.warn(f"{msg} The weights are gathered on rank 0.", stacklevel=2)
    return None


def _write(ctx: Context, temporary: Path, position: Position) -> Exception | None:
    """Write the weights of this rank; return the error of a failure."""
    state = {
        "accelerator": take_model_part(ctx.accelerator.state_dict()),
        "extra": get_extra_states(ctx.model),
        **describe_left_out(ctx.model),
    }

    def make() -> tuple[object, dict[str, Tensor]]:
        plan, tensors = flatten(state)
        return plan, {name: own.cpu().contiguous() for name, own in tensors.items()}

    manifest = describe_checkpoint(ctx, position)
    return write_and_commit(temporary, ctx.accelerator.rank, manifest, make)
