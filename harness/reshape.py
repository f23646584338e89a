"""A checkpoint of some ranks as the state of another number of them.

It can be done where each rank holds all weights and optimizer states: on one device and at
ZeRO 0. The samples that are left of a broken epoch are dealt out anew, each once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from harness.checkpoint import Position
from harness.context import Context
from harness.errors import CheckpointError
from harness.randomness import other_random_state

WEIGHTS_ALONE = (
    "take the weights alone: ResumeFromCheckpoint(path, restore_optimizers=False, "
    "restore_records=False, restore_callbacks=False)."
)
"""What always works."""


def check_shapes(place: str, parts: Sequence[Mapping[str, Any]], live: Any) -> None:
    """Raise if the parts of a checkpoint cannot be given to the live accelerator's ranks.

    Parameters
    ----------
    place
        Which resume, for the error.
    parts
        States of all ranks.
    live
        State of the live accelerator.

    Raises
    ------
    CheckpointError
        If weights or optimizer states are divided, or an optimizer step is under way.
    """
    advice = f"Resume on {len(parts)} ranks as it was saved, or {WEIGHTS_ALONE}"
    for what, state in (("was saved", parts[0]["accelerator"]), ("is", live)):
        if not any(form <= state.keys() for form in _FORMS) and not state.get("stage"):
            msg = f"{place}: expected the state of one device or of engines, got"
            raise CheckpointError(
                f"{msg} {sorted(state)}. Resume with the accelerator that was saved."
            )
        if state.get("stage", 0) or _has_masters(state):
            msg = f"{place}: expected one ZeRO stage and number of ranks, or ZeRO 0 in"
            got = f"full precision, got stage {state.get('stage', 0)} where it {what}"
            raise CheckpointError(f"{msg} {got}. {advice}")
    for part in parts:
        if any(part["accelerator"]["done"].values()):
            msg = (
                f"{place}: expected the end of an accumulation window, got an open one."
            )
            raise CheckpointError(f"{msg} {advice}")


_FORMS = (
    {"model", "optimizers", "steps", "done"},
    {"shared", "own", "facts", "steps", "done"},
)
"""What accelerators' states have: one device, and engines."""


def _has_masters(state: Mapping[str, Any]) -> bool:
    """True if an engine steps copies of the weights, as in bf16 and fp16."""
    kinds = {**state.get("shared", {}), **state.get("own", {})}
    return any(name.endswith("/master") for name in kinds.get("optimizers", {}))


def moved(
    place: str,
    position: Position,
    parts: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    ctx: Context,
) -> Position:
    """Where the fit goes on, counted in batches of the ranks that there are now.

    Parameters
    ----------
    place
        Which resume, for the error.
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
    if position.phase == "epoch":
        return position
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
        msg = f"{place}: expected an order of samples that does not depend on the ranks"
        kind = "a loader that keeps its own position" if own else "a stream by workers"
        raise CheckpointError(f"{msg}, got {kind}. {advice}")
    if rest or done % ctx.accelerator.accumulate:
        msg = f"{place}: expected samples done to fill whole steps of {now} rows"
        got = f"{position.iter} batches of {then}"
        raise CheckpointError(f"{msg}, got {got}. Change batch_size. {advice}")
    return replace(position, iter=done)


def reshaped(parts: Sequence[Mapping[str, Any]], ctx: Context) -> dict[str, Any]:
    """The state of this rank.

    Parameters
    ----------
    parts
        States of all ranks of the checkpoint.
    ctx
        Context of the fit.
    """
    accelerator = ctx.accelerator
    assert accelerator is not None
    rank, world_size = accelerator.rank, accelerator.world_size
    first, is_old = parts[0], rank < len(parts)
    own = parts[rank] if is_old else first
    random = own["random"] if is_old else other_random_state(first["random"], rank)
    metrics = [part["callbacks"].get("Metrics", {}) for part in parts]
    mine = [metrics[n] for n in range(rank, len(parts), world_size)]
    train_pass = first["pass"]
    if train_pass is not None:
        train_pass = {**train_pass, "window": accelerator.accumulate, "ahead": 0}
    live = accelerator.state_dict()
    to_form = _to_engines if "shared" in live else _to_single
    return {
        **first,
        "accelerator": to_form(first["accelerator"], live, accelerator.is_main),
        "callbacks": {**first["callbacks"], "Metrics": _joined(mine, metrics[0])},
        "random": random,
        "pass": train_pass,
        "journal": own["journal"] if is_old else -1,
    }


def _joined(
    mine: Sequence[Mapping[str, Any]], first: Mapping[str, Any]
) -> dict[str, Any]:
    """States of metrics of several ranks, to be joined; of none, their form alone."""
    if mine:
        return {split: [state[split] for state in mine] for split in mine[0]}
    return {split: [_emptied(state)] for split, state in first.items()}


def _emptied(state: Mapping[str, Any]) -> dict[str, Any]:
    """The lists of samples without their samples.

    Ranks exchange lists tensor by tensor: one without any would leave the others waiting.
    """
    metrics = {}
    for name, item in state["metrics"].items():
        lists = {
            key: [tensor[:0] for tensor in value[:1]]
            for key, value in item["state"].items()
            if isinstance(value, list)
        }
        metrics[name] = {"state": lists, "updates": int(bool(lists))}
    nothing = {"waiting": [], "rows": [], "sums": torch.zeros(2, dtype=torch.float64)}
    losses = dict.fromkeys(state["loss"], nothing)
    return {"loss": losses, "metrics": metrics, "waiting": []}


def _to_engines(
    saved: Mapping[str, Any], live: Mapping[str, Any], is_main: bool
) -> dict[str, Any]:
    """The state as engines at ZeRO 0 take it."""
    found = _whole(saved)
    buffers = live["own"]["buffers"]
    facts: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for name, opt in found["optimizers"].items():
        entries = []
        for n, entry in enumerate(opt["state"]):
            held = {key for key, value in entry.items() if isinstance(value, Tensor)}
            tensors |= {f"{name}/{n}/{key}": entry[key] for key in held}
            entries.append({k: v for k, v in entry.items() if k not in held})
        own = saved.get("facts", live["facts"]).get(name, {})
        facts[name] = {**own, "groups": opt["groups"], "state": entries}
    weights = {name: v for name, v in found["model"].items() if name not in buffers}
    return {
        **live,
        "shared": {"weights": weights, "optimizers": tensors} if is_main else {},
        "own": {"buffers": {name: found["model"][name] for name in buffers}},
        "facts": facts,
        "grads": {name: {"grad": {}, "grad_accum": {}} for name in live["grads"]},
        "steps": found["steps"],
        "overflows": dict.fromkeys(live["overflows"], 0),
        "done": dict.fromkeys(live["done"], 0),
    }


def _to_single(
    saved: Mapping[str, Any], live: Mapping[str, Any], _: bool
) -> dict[str, Any]:
    """The state as one device takes it."""
    found = _whole(saved)
    optimizers = {}
    for name, opt in found["optimizers"].items():
        groups = live["optimizers"].get(name, {"param_groups": []})["param_groups"]
        optimizers[name] = {
            "state": {n: entry for n, entry in enumerate(opt["state"]) if entry},
            "param_groups": [
                {**group, "params": own["params"]}
                for group, own in zip(opt["groups"], groups, strict=False)
            ],
        }
    return {
        **live,
        "model": found["model"],
        "optimizers": optimizers,
        "steps": found["steps"],
        "done": dict.fromkeys(live["done"], 0),
        "grads": {},
    }


def _whole(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Weights and buffers, and by optimizer its groups and an entry for each parameter."""
    if "shared" not in saved:
        optimizers = {
            name: {
                "groups": [
                    {key: value for key, value in group.items() if key != "params"}
                    for group in state["param_groups"]
                ],
                "state": [
                    dict(state["state"].get(n, state["state"].get(str(n), {})))
                    for group in state["param_groups"]
                    for n in group["params"]
                ],
            }
            for name, state in saved["optimizers"].items()
        }
        return {**saved, "optimizers": optimizers}
    shared = {**saved["shared"], **saved["own"]}
    optimizers = {}
    for name, facts in saved["facts"].items():
        entries = [dict(numbers) for numbers in facts["state"]]
        for n, entry in enumerate(entries):
            head = f"{name}/{n}/"
            entry |= {
                full.removeprefix(head): value
                for full, value in shared["optimizers"].items()
                if full.startswith(head)
            }
        optimizers[name] = {"groups": facts["groups"], "state": entries}
    model = {**shared["weights"], **shared["buffers"]}
    return {"model": model, "optimizers": optimizers, "steps": saved["steps"]}
