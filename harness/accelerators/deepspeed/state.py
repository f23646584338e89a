"""Capture and restore the state of engines as live tensors and plain values.

DeepSpeed's own checkpoints are not atomic, and pickle reads them, which can run code. Here
each rank saves its own part, and rank 0 also saves what all ranks share.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from harness.accelerators.base import HOW_TO_STEP, counts_on_device, restore_named_state
from harness.errors import CheckpointError
from harness.pytree import StateDict
from harness.reshard.consolidated import copy_tensors, is_master_name, weights_dtype
from harness.reshard.index import select_named

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""Attributes of an engine that count."""

_SAME_CODE = "Resume with the code that was saved."

_SCALES = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""Attributes of a dynamic loss scale."""


def capture_state(
    model: nn.Module, engines: Mapping[str, object], stage: int, done: Mapping[str, int]
) -> StateDict:
    """Capture the state of model and engines on this rank.

    Parameters
    ----------
    model, engines, stage
        The model, DeepSpeed's engines by name of their optimizer, and the ZeRO stage.
    done
        Micro-batches of each optimizer since its last step.

    Returns
    -------
    dict
        ``shared``: tensors that are the same on all ranks. ``own``: those of this rank. Both
        are by kind (``weights``, ``buffers``, ``optimizers``) and name. ``facts``: plain values
        of the engines by optimizer name. ``grads``: gradients of an open window.
    """
    live = collect_tensors(model, engines)
    shared = {0: ("weights", "optimizers"), 1: ("weights",), 2: ("weights",), 3: ()}[
        stage
    ]
    return {
        "shared": {kind: live[kind] for kind in shared},
        "own": {kind: live[kind] for kind in live if kind not in shared},
        "facts": {name: _capture_facts(engine) for name, engine in engines.items()},
        "grads": {
            name: capture_open_gradients(engine, stage, is_open=bool(done[name]))
            for name, engine in engines.items()
        },
    }


def check_closed_window(config: Mapping[str, Any], engines: Iterable[Any]) -> None:
    """Check that no open gradients are in memory that cannot be captured.

    Raises
    ------
    RuntimeError
        In an open window with offloaded optimizer states.
    """
    offload = config.get("zero_optimization", {}).get("offload_optimizer", {})
    is_open = any(engine.done for engine in engines)
    if is_open and offload.get("device", "none") != "none":
        msg = "state_dict: expected the end of a window with offload_optimizer"
        raise RuntimeError(f"{msg}, got an open one. Save after an optimizer step.")


def check_origin(state: StateDict, here: StateDict) -> None:
    """Check that a rank's state fits the number of ranks and the stage."""
    for name, wanted in here.items():
        found = state.get(name)
        if found != wanted:
            msg = f"resume: expected a state of {name} {wanted}, got {found}."
            advice = f"Resume with {name} {found}, or restore only the weights."
            raise CheckpointError(f"{msg} {advice}")


def fetch_persistent(engine: Any) -> None:
    """Gather the small parameters again that each rank keeps whole at ZeRO 3."""
    kept = getattr(engine.optimizer, "persistent_parameters", None)
    if kept:
        engine.empty_partition_cache()
        kept[0].all_gather(kept)


def restore_state(
    model: nn.Module,
    engines: Mapping[str, object],
    stage: int,
    state: StateDict,
    parts: Sequence[str],
) -> None:
    """Restore what ``capture_state`` returned.

    On other ranks than 0, ``shared`` has tensors without memory. They take the place of those
    of rank 0, which are sent afterwards; see ``list_restored``.
    """
    found = {**state["shared"], **state["own"]}
    kinds = [kind for kind in ("weights", "buffers") if "model" in parts]
    if "optimizers" in parts:
        if set(state["facts"]) != set(engines):
            have, want = sorted(state["facts"]), sorted(engines)
            msg = f"resume: expected optimizers {want}, got {have}."
            raise CheckpointError(f"{msg} Resume with the learner that was saved.")
        for name, engine in engines.items():
            _create_entries(name, engine, found["optimizers"], state["facts"][name])
    live = collect_tensors(model, engines)
    for kind in kinds:
        copy_tensors(live[kind], found[kind], _SAME_CODE)
    # Master weights, which optimizers step instead of the weights, belong to the model.
    for is_master, part in ((True, "model"), (False, "optimizers")):
        if part in parts and "optimizers" in found:  # see take_model_part
            now, then = (
                {n: value for n, value in of.items() if is_master == is_master_name(n)}
                for of in (live["optimizers"], found["optimizers"])
            )
            copy_tensors(now, then, _SAME_CODE)
    if "optimizers" in parts:
        for name, engine in engines.items():
            _restore_facts(engine, state["facts"][name])
            restore_open_gradients(engine, stage, state["grads"][name])


def list_restored(
    model: nn.Module,
    engines: Mapping[str, object],
    shared: Mapping[str, Mapping[str, Tensor]],
    parts: Sequence[str],
) -> dict[str, Tensor]:
    """The live tensors whose values ``restore_state`` took from ``shared``."""
    live = collect_tensors(model, engines)
    return {
        f"{kind}/{name}": live[kind][name]
        for kind, own in shared.items()
        for name in own
        if ("model" if kind == "weights" or is_master_name(name) else "optimizers")
        in parts
    }


def refresh_masters(engines: Iterable[Any]) -> None:
    """Copy float32 weights into the master weights, where the model alone was restored.

    At ZeRO 0 the weights are stepped themselves.
    """
    for engine in engines:
        refresh = getattr(engine.optimizer, "refresh_fp32_params", None)
        if refresh is not None:
            refresh()


# ---------------------------------------------------------------------- tensors


def collect_tensors(
    model: nn.Module, engines: Mapping[str, object]
) -> dict[str, dict[str, Tensor]]:
    """Weights (at ZeRO 3 this rank's parts), buffers and optimizer states by name."""
    optimizers: dict[str, Tensor] = {}
    for name, engine in engines.items():
        state = base_optimizer(engine).state
        for prefix, master in _named_masters(engine, name):
            entries = state.get(master, {})
            optimizers |= {
                f"{prefix}/{key}": value
                for key, value in entries.items()
                if torch.is_tensor(value)
            }
            if not any(master is param for param in model.parameters()):
                optimizers[f"{prefix}/master"] = master.data
    return {
        "weights": {
            name: getattr(param, "ds_tensor", param).data
            for name, param in model.named_parameters()
        },
        "buffers": dict(model.named_buffers()),
        "optimizers": optimizers,
    }


def base_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside an engine's wrappers."""
    wrapped = getattr(engine.optimizer, "optimizer", None)
    found = engine.basic_optimizer if wrapped is None else wrapped
    assert isinstance(found, torch.optim.Optimizer)
    return found


def master_weights(engine: Any) -> list[Tensor]:
    """Tensors that the optimizer steps: this rank's parts of the weights in float32."""
    divided = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if divided is not None:
        return list(divided)
    return [
        param
        for group in base_optimizer(engine).param_groups
        for param in group["params"]
    ]


def _named_masters(engine: object, name: str) -> Iterator[tuple[str, Tensor]]:
    """The master weights, each with its own name."""
    for n, master in enumerate(master_weights(engine)):
        yield f"{name}/{n}", master


def _create_entries(
    name: str, engine: object, found: Mapping[str, Tensor], facts: StateDict
) -> None:
    """Create the optimizer's saved entries, which torch creates only at the first step."""
    state = base_optimizer(engine).state
    master_weights = list(_named_masters(engine, name))
    if len(master_weights) != len(facts["state"]):
        msg = f"resume: expected {len(master_weights)} parts of optimizer {name!r}"
        advice = "Resume with the learner that was saved."
        raise CheckpointError(f"{msg}, got {len(facts['state'])}. {advice}")
    by_place: dict[str, StateDict] = {place: {} for place, _ in master_weights}
    for full, value in found.items():
        place, _, key = full.rpartition("/")
        if place in by_place and not is_master_name(full):
            by_place[place][key] = value
    is_moved = any(map(counts_on_device, base_optimizer(engine).param_groups))
    for (place, master), numbers in zip(master_weights, facts["state"], strict=True):
        entries = by_place[place]
        for key, value in entries.items():
            is_counter = value.dim() == 0 and not is_moved
            device = torch.device("cpu") if is_counter else master.device
            if value.is_meta:
                entries[key] = torch.empty_like(value, device=device)
            else:
                entries[key] = value.to(device, copy=True)
        state.pop(master, None)
        if entries or numbers:
            state[master] = {**entries, **numbers}


# ------------------------------------------------------ gradients of an open window


def capture_open_gradients(engine: Any, stage: int, *, is_open: bool) -> StateDict:
    """Capture the gradients of an open window, wherever DeepSpeed keeps them.

    The memory that holds them is as large as the weights of the rank, and it is zero where
    no window is open. Then None stands for it.

    References
    ----------
    DeepSpeed 0.19.8: ``bf16_optimizer.py``, ``zero/stage_1_and_2.py``, ``zero/stage3.py``.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups_gradients_flat"):
        return {
            "flat": list(wrapper.fp32_groups_gradients_flat) if is_open else None,
            "has": [list(has) for has in wrapper.fp32_groups_has_gradients],
        }
    if stage == 3:
        return {
            "flat": wrapper.grad_partitions_flat_buffer if is_open else None,
            "micro": wrapper.micro_step_id,
            "ran": bool(wrapper._epilogue_ran_this_backward),
        }
    if stage == 2:
        return {
            "lists": [
                grads and list(grads) for grads in _by_group(wrapper.all_grad_tensors)
            ],
            "flat": [
                getattr(buffer, "flat_partition", None)
                for buffer in _by_group(wrapper.averaged_gradients)
            ],
            "micro": wrapper.micro_step_id,
        }
    params = dict(engine.module.named_parameters())
    return {
        kind: {
            name: getattr(param, kind)
            for name, param in params.items()
            if getattr(param, kind, None) is not None
        }
        for kind in ("grad", "grad_accum")
    }


def _by_group(values: Mapping[int, object]) -> list[Any]:
    """List the values by group number; None for a group without a value."""
    return [values.get(n) for n in range(max(values, default=-1) + 1)]


def restore_open_gradients(engine: Any, stage: int, saved: StateDict) -> None:
    """Restore what ``capture_open_gradients`` returned."""
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_groups_gradients_flat"):
        flats = wrapper.fp32_groups_gradients_flat
        for live, flat in zip(flats, saved["flat"] or [None] * len(flats), strict=True):
            _fill_gradients(live, flat)
        for has, was in zip(
            wrapper.fp32_groups_has_gradients, saved["has"], strict=True
        ):
            has[:] = was
    elif stage == 3:
        _fill_gradients(wrapper.grad_partitions_flat_buffer, saved["flat"])
        wrapper.micro_step_id = saved["micro"]
        wrapper._epilogue_ran_this_backward = saved["ran"]
    elif stage == 2:
        _restore_zero2_gradients(engine, saved)
    else:
        params = dict(engine.module.named_parameters())
        for kind in ("grad", "grad_accum"):
            for name, grad in saved[kind].items():
                setattr(params[name], kind, grad.to(engine.device, copy=True))


def _fill_gradients(live: Tensor, saved: Tensor | None) -> None:
    """Restore the gradients of an open window, or none."""
    if saved is None:
        live.zero_()
    else:
        live.copy_(saved)


def _restore_zero2_gradients(engine: Any, saved: StateDict) -> None:
    """Restore gradients of ZeRO 2: whole tensors, or flat ones in another dtype."""
    wrapper = engine.optimizer
    for n, grads in enumerate(saved["lists"]):
        copies = grads and [grad.to(engine.device, copy=True) for grad in grads]
        wrapper.all_grad_tensors[n] = copies
    for n, flat in enumerate(saved["flat"]):
        if flat is not None:
            wrapper._get_compact_grad_partition_buffer(n).flat_partition.copy_(flat)
    wrapper.micro_step_id = saved["micro"]


# ------------------------------------------------------------------------ facts


def _capture_facts(engine: Any) -> StateDict:
    """Capture the plain values of an engine: all but its tensors."""
    state = base_optimizer(engine).state
    numbers = []
    for _, master in _named_masters(engine, ""):
        entries = state.get(master, {})
        numbers.append({k: v for k, v in entries.items() if not torch.is_tensor(v)})
    groups = [
        {
            key: value.item() if torch.is_tensor(value) else value
            for key, value in group.items()
            if key != "params"
        }
        for group in base_optimizer(engine).param_groups
    ]
    scheduler = engine.lr_scheduler
    named = select_named(state)
    return {
        **({"named": named} if named else {}),
        "kind": type(base_optimizer(engine)).__name__,
        "form": [type(engine.optimizer).__name__, weights_dtype(engine.module)],
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "groups": groups,
        "state": numbers,
        "scale": {
            name: getattr(scale, name)
            for scale in _dynamic_scales(engine)
            for name in _SCALES
            if hasattr(scale, name)
        },
        "scalers": [scaler.state_dict() for scaler in _scalers(engine)],
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }


def _restore_facts(engine: Any, facts: StateDict) -> None:
    """Restore the plain values of an engine."""
    for name in _COUNTERS:
        setattr(engine, name, int(facts["counters"][name]))
    groups = base_optimizer(engine).param_groups
    if len(groups) != len(facts["groups"]):
        msg = f"resume: expected {len(groups)} parameter groups, got {len(facts['groups'])}."
        raise CheckpointError(f"{msg} Resume with the learner that was saved.")
    for group, saved in zip(groups, facts["groups"], strict=True):
        _restore_options(group, saved)
    for scale in _dynamic_scales(engine):
        for name in facts["scale"].keys() & vars(scale).keys() & set(_SCALES):
            setattr(scale, name, facts["scale"][name])
    # Another precision may have fewer scalers.
    for scaler, saved in zip(_scalers(engine), facts["scalers"], strict=False):
        scaler.load_state_dict(saved)
    if facts["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(facts["scheduler"])
    named = facts.get("named", {})
    restore_named_state(base_optimizer(engine), named, engine.device)


def _restore_options(group: dict[str, Any], saved: StateDict) -> None:
    """Restore the options of a group, but for how a step is computed."""
    for key, value in saved.items():
        if torch.is_tensor(group.get(key)):
            group[key].fill_(value)
        elif key not in HOW_TO_STEP or key not in group:
            group[key] = value


def _dynamic_scales(engine: Any) -> Iterator[Any]:
    """Objects that hold a dynamic loss scale."""
    for name in ("loss_scaler", "loss_scale_config"):
        scale = getattr(engine.optimizer, name, None)
        if getattr(scale, "last_overflow_iter", None) is not None:
            yield scale


def _scalers(engine: Any) -> Iterator[Any]:
    """Gradient scalers of torch, used for autocast with float16."""
    for holder, name in (
        (engine, "torch_autocast_z0_gradscaler"),
        (engine.optimizer, "torch_autocast_gradscaler"),
    ):
        scaler = getattr(holder, name, None)
        if scaler is not None:
            yield scaler
