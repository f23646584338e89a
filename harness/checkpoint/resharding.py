"""Convert the states of a checkpoint for a fit on other ranks.

The rest of an interrupted epoch is divided again; each sample is seen exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint.format import Position
from harness.checkpoint.held.search import OPTIMIZERS
from harness.checkpoint.ranks.states import SavedRanks
from harness.context import Context
from harness.errors import CheckpointError
from harness.metrics.state import drop_samples
from harness.pytree import StateDict, has_state, iter_tensors, map_tensors
from harness.reshard.convert import convert_model_part, convert_state, is_convertible
from harness.reshard.model_part import MODEL_PART
from harness.rng import derive_rng_state

WEIGHTS_ONLY_ADVICE = (
    "restore only the weights: ResumeFromCheckpoint(path, restore_optimizers=False, "
    "restore_records=False, restore_callbacks=False)."
)
"""Advice that works for every checkpoint."""

EPOCH_END_ADVICE = (
    "Save at the ends of epochs, or resume on as many ranks as it was saved on."
)


def check_convertible(parts: SavedRanks, live: StateDict, *, is_exact: bool) -> None:
    """Raise if the states of a checkpoint cannot be converted for the live accelerator.

    Raises
    ------
    CheckpointError
        If an accelerator is a custom one, or an accumulation window is open.
    """
    for state in (parts.accelerators[0], live):
        if not is_convertible(state):
            msg = f"resume: expected states of one device or of engines, got {sorted(state)}"
            raise CheckpointError(f"{msg}. Resume with the accelerator that was saved.")
    if is_exact and parts.index.is_open:
        msg = "resume: expected the end of an accumulation window, got an open one."
        advice = f"Resume on {len(parts.states)} ranks as it was saved, or"
        raise CheckpointError(f"{msg} {advice} {WEIGHTS_ONLY_ADVICE}")


def has_same_batches(world_size: int, about: Mapping[str, Any], ctx: Context) -> bool:
    """Whether each rank continues with the batches that the same rank would have had."""
    is_same_size = about["batch_size"] == ctx.about["batch_size"]
    return ctx.accelerator.world_size == world_size and is_same_size


def convert_position(
    position: Position,
    states: Sequence[StateDict],
    about: Mapping[str, Any],
    ctx: Context,
) -> Position:
    """Convert a position to batches of this fit, whose ranks or batch size differ."""
    saved_size = _rows_per_batch(len(states), about)
    size = _rows_per_batch(ctx.accelerator.world_size, ctx.about)
    rows = position.iter * saved_size
    is_over = position.phase == "valid" and states[0]["pass"] is None
    if not is_over:
        _check_order(states, about, ctx)
    if is_over or (about["rows"] and rows >= about["rows"]):
        return replace(position, iter=-(-rows // size))
    _check_whole_steps(position.iter, saved_size, size, ctx.accelerator.accumulate)
    return replace(position, iter=rows // size)


def _rows_per_batch(world_size: int, about: Mapping[str, Any]) -> int:
    """Rows in a batch of all ranks together."""
    return world_size * int(about["batch_size"] or 1)


def _check_whole_steps(
    num_batches: int, saved_size: int, size: int, accumulate: int
) -> None:
    """Raise if the finished batches are not a whole number of new optimizer steps."""
    if num_batches * saved_size % (size * accumulate):
        msg = f"resume: expected finished samples to fill whole steps of {size} rows"
        got = f"{num_batches} batches of {saved_size}"
        advice = f"Change batch_size. {EPOCH_END_ADVICE}"
        raise CheckpointError(f"{msg}, got {got}. {advice}")


def _check_order(
    states: Sequence[StateDict], about: Mapping[str, Any], ctx: Context
) -> None:
    """Raise if the order of the samples depends on the number of ranks."""
    has_workers = about["num_workers"] or ctx.about["num_workers"]
    now = getattr(ctx.train_data, "undivided", ctx.train_data)
    if states[0]["pass"]["loader"] is not None or has_state(now):
        got = "a loader that keeps its own position"
    elif about["rows"] is None and has_workers:
        got = "a stream that worker processes read"
    else:
        return
    msg = "resume: expected an order of samples that does not depend on the ranks"
    raise CheckpointError(f"{msg}, got {got}. {EPOCH_END_ADVICE}")


def reshard_state(
    parts: SavedRanks,
    live: StateDict,
    ctx: Context,
    wanted: Sequence[str],
    *,
    keeps_batches: bool,
) -> StateDict:
    """Convert the states of a checkpoint to the state of this rank.

    Parameters
    ----------
    parts
        Parts of the ranks that saved. Those are opened whose metrics this rank merges, and
        those that have pieces of its own, one after another.
    wanted
        What is restored; of it ``model``, ``optimizers`` and ``callbacks`` are converted.
    keeps_batches
        Whether each rank continues with the batches that it would have had.
    """
    accelerator = ctx.accelerator
    rank, states = accelerator.rank, parts.states
    first, has_saved = states[0], rank < len(states)
    own = states[rank] if has_saved else first
    train_pass = own["pass"] if keeps_batches else first["pass"]
    before = own.get("epoch_random")
    if before is not None and not has_saved:
        before = derive_rng_state(before, rank)
    if train_pass is not None and not keeps_batches:
        train_pass = {**train_pass, "window": accelerator.accumulate, "ahead": 0}
        if "parts" in train_pass:  # other ranks may read further ahead
            train_pass["parts"] = {**train_pass["parts"], "now": {}}
    is_plain = "shared" not in first["accelerator"] and "shared" not in live
    kept = {
        **(first if is_plain else _leave_out_parts(first)),
        "groups": first.get("groups", {}) if is_plain else {},  # engines have their own
        "accelerator": {},
        "callbacks": {
            name: {key: value for key, value in state.items() if key != MODEL_PART}
            for name, state in first["callbacks"].items()
        },
        "random": own["random"] if has_saved else derive_rng_state(own["random"], rank),
        "epoch_random": before,
        "pass": train_pass,
        "data": own.get("data"),
        "journal": own["journal"] if has_saved else -1,
        "indices": own.get("indices") if has_saved else None,
    }
    # The rest is made of the parts, which close again.
    found: StateDict = _copy(kept)
    found["accelerator"] = convert_state(
        parts.accelerators, ctx.model, live, rank, wanted, parts.index
    )
    for name, state in first["callbacks"].items() if "callbacks" in wanted else ():
        if state.get(MODEL_PART):
            saved, index = parts.open_model_parts(name), parts.index
            part = convert_model_part(saved, ctx.model, live, rank, index)
            found["callbacks"][name][MODEL_PART] = part
    found["callbacks"]["Metrics"] = _merge_metrics(parts, ctx)
    return found


def _leave_out_parts(state: StateDict) -> StateDict:
    """A state without what optimizers hold for the weights of a rank, which ``lost`` names."""
    kept: dict[str, StateDict] = {"held": {}, "fields": {}}
    lost, why = dict(state.get("lost", {})), "belongs to the ranks that saved it"
    for part, of_part in kept.items():
        for root, owners in state.get(part, {}).items():
            if not root.startswith(f"{OPTIMIZERS}."):
                of_part[root] = owners
            elif part == "held":
                lost |= {f"{root}{path}": why for path in owners}
            else:
                of_part[root] = {path: {} for path in owners}
                for path, fields in owners.items():
                    for name, value in fields.items():
                        if [*iter_tensors(value)]:
                            lost[f"{root}{path}.{name}"] = why
                        else:
                            of_part[root][path][name] = value
    return {**state, **kept, "lost": lost}


def _merge_metrics(parts: SavedRanks, ctx: Context) -> StateDict:
    """List the metric states that this rank merges, by split; without any, an empty one."""
    places = range(ctx.accelerator.rank, len(parts.states), ctx.accelerator.world_size)
    mine = [_copy(parts.callbacks[place].get("Metrics", {})) for place in places]
    if mine:
        return {split: [state[split] for state in mine] for split in mine[0]}
    first = _copy(parts.callbacks[0].get("Metrics", {}))
    return {split: [_empty_metrics(state)] for split, state in first.items()}


def _copy(state: StateDict) -> StateDict:
    """A state whose tensors are no views into files."""
    found: StateDict = map_tensors(state, Tensor.clone)
    return found


def _empty_metrics(state: StateDict) -> StateDict:
    """Copy metric states without their samples."""
    if "loss" not in state:
        return dict(state)
    nothing = {"waiting": [], "rows": [], "sums": torch.zeros(2, dtype=torch.float64)}
    return {
        **{key: state[key] for key in ("changed", "due") if key in state},
        "loss": dict.fromkeys(state["loss"], nothing),
        "metrics": {
            name: drop_samples(item) for name, item in state["metrics"].items()
        },
        "waiting": [],
    }
