"""A checkpoint of some ranks as the state of others: another number, or of another form.

The samples that are left of a broken epoch are dealt out anew, each once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from harness.checkpoint.format import Position
from harness.context import Context
from harness.errors import CheckpointError
from harness.metrics.state import drop_samples
from harness.pytree import StateDict
from harness.reshard.convert import convert_state, is_convertible
from harness.rng import derive_rng_state

WEIGHTS_ALONE = (
    "take the weights alone: ResumeFromCheckpoint(path, restore_optimizers=False, "
    "restore_records=False, restore_callbacks=False)."
)
"""What always works."""


def check_convertible(
    parts: Sequence[StateDict], live: StateDict, *, is_exact: bool
) -> None:
    """Raise if the parts of a checkpoint cannot be given to the live accelerator's ranks.

    Parameters
    ----------
    parts
        States of all ranks.
    live
        State of the live accelerator.
    is_exact
        Whether the fit is to go on where it was.

    Raises
    ------
    CheckpointError
        If an accelerator is not one of the package's, or an optimizer step is under way.
    """
    for state in (*(part["accelerator"] for part in parts), live):
        if not is_convertible(state):
            msg = f"resume: expected states of one device or of engines, got {sorted(state)}"
            raise CheckpointError(f"{msg}. Resume with the accelerator that was saved.")
        if is_exact and any(state["done"].values()):
            msg = "resume: expected the end of an accumulation window, got an open one."
            advice = f"Resume on {len(parts)} ranks as it was saved, or {WEIGHTS_ALONE}"
            raise CheckpointError(f"{msg} {advice}")


def has_same_batches(
    world_size: int, about: Mapping[str, object], ctx: Context
) -> bool:
    """True if each rank goes on with the batches that it would have had."""
    assert ctx.accelerator is not None
    is_same_size = about["batch_size"] == ctx.about["batch_size"]
    return ctx.accelerator.world_size == world_size and is_same_size


def convert_position(
    position: Position,
    parts: Sequence[StateDict],
    about: Mapping[str, Any],
    ctx: Context,
) -> Position:
    """Where a fit goes on whose batches are dealt in another way, counted in these.

    Parameters
    ----------
    position, parts, about
        What the checkpoint says.
    ctx
        Context of the fit.

    Raises
    ------
    CheckpointError
        If the samples done do not make whole batches, or nobody can tell which they were.
    """
    assert ctx.accelerator is not None
    then = len(parts) * (about["batch_size"] or 1)
    now = ctx.accelerator.world_size * (ctx.about["batch_size"] or 1)
    done, rest = divmod(position.iter * then, now)
    rows = about["rows"]
    if position.phase == "valid" or (rows and position.iter * then >= rows):
        return replace(position, iter=done + bool(rest))
    advice = (
        "Save at the ends of epochs, or resume on as many ranks as it was saved on."
    )
    own = parts[0]["pass"]["loader"] is not None
    if own or (rows is None and (about["num_workers"] or ctx.about["num_workers"])):
        msg = "resume: expected an order of samples that does not depend on the ranks"
        kind = "a loader that keeps its own position" if own else "a stream by workers"
        raise CheckpointError(f"{msg}, got {kind}. {advice}")
    if rest or done % ctx.accelerator.accumulate:
        msg = f"resume: expected samples done to fill whole steps of {now} rows"
        got = f"{position.iter} batches of {then}"
        raise CheckpointError(f"{msg}, got {got}. Change batch_size. {advice}")
    return replace(position, iter=done)


def reshard_state(
    parts: Sequence[StateDict],
    live: StateDict,
    ctx: Context,
    wanted: Sequence[str],
    *,
    is_alike: bool,
) -> StateDict:
    """The state of this rank.

    Parameters
    ----------
    parts
        States of all ranks of the checkpoint.
    live
        State of the live accelerator.
    ctx
        Context of the fit.
    wanted
        Parts of the accelerator's state that are wanted.
    is_alike
        Whether each rank goes on with the batches that it would have had.

    Raises
    ------
    CheckpointError
        If it is of another model or other optimizers.
    """
    accelerator = ctx.accelerator
    assert accelerator is not None
    assert ctx.model is not None
    rank, world_size = accelerator.rank, accelerator.world_size
    first, is_old = parts[0], rank < len(parts)
    own = parts[rank] if is_old else first
    random = own["random"] if is_old else derive_rng_state(first["random"], rank)
    metrics = [part["callbacks"].get("Metrics", {}) for part in parts]
    mine = [metrics[n] for n in range(rank, len(parts), world_size)]
    train_pass = own["pass"] if is_alike else first["pass"]
    if train_pass is not None and not is_alike:
        train_pass = {**train_pass, "window": accelerator.accumulate, "ahead": 0}
    states = [part["accelerator"] for part in parts]
    return {
        **first,
        "accelerator": convert_state(states, ctx.model, live, rank, wanted),
        "callbacks": {**first["callbacks"], "Metrics": _joined(mine, metrics[0])},
        "random": random,
        "pass": train_pass,
        "journal": own["journal"] if is_old else -1,
    }


def _joined(mine: Sequence[StateDict], first: StateDict) -> StateDict:
    """States of metrics of several ranks, to be joined; of none, their form alone."""
    if mine:
        return {split: [state[split] for state in mine] for split in mine[0]}
    return {split: [_empty_metrics(state)] for split, state in first.items()}


def _empty_metrics(state: StateDict) -> StateDict:
    """The form of the states, without samples."""
    if "loss" not in state:
        return dict(state)
    nothing = {"waiting": [], "rows": [], "sums": torch.zeros(2, dtype=torch.float64)}
    return {
        "changed": state["changed"],
        "loss": dict.fromkeys(state["loss"], nothing),
        "metrics": {
            name: drop_samples(item) for name, item in state["metrics"].items()
        },
        "waiting": [],
    }
