"""What engines hold that a checkpoint needs, as tensors and JSON: one part for each rank.

DeepSpeed's own checkpoints are read back by pickle, which runs code, and are not atomic.
Here each rank writes plain tensors into a folder that the caller puts in place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.errors import CheckpointError

FORMAT = 1
"""Version of the files written by ``save_state``."""

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""Counters of an engine."""

_SCALES = (
    "cur_scale",
    "cur_iter",
    "last_overflow_iter",
    "cur_hysteresis",
)
"""Numbers of a loss scaler, which some wrappers keep on themselves."""


def save_state(
    folder: Path, model: nn.Module, engines: Mapping[str, Any], about: Mapping[str, Any]
) -> None:
    """Write this rank's part of model and engines.

    Parameters
    ----------
    folder
        An existing folder, the same for all ranks.
    model
        The model that the engines train.
    engines
        Engines by optimizer name.
    about
        ``rank``, ``world_size``, ``stage`` and whatever else JSON holds; given back by
        ``load_state``.
    """
    shared, own = _tensors(model, engines, int(about["stage"]))
    rank = int(about["rank"])
    if rank == 0 and shared:
        save_file(_copied(shared), folder / "shared.safetensors")
    save_file(_copied(own), folder / f"rank-{rank}.safetensors")
    facts = {
        "format": FORMAT,
        "about": dict(about),
        "engines": {name: _facts(engine) for name, engine in engines.items()},
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(facts), encoding="utf-8")


def load_state(
    folder: Path, model: nn.Module, engines: Mapping[str, Any], about: Mapping[str, Any]
) -> dict[str, Any]:
    """Take back what ``save_state`` wrote; gives its `about`.

    Raises
    ------
    CheckpointError
        If a file is missing or torn, or the state is of another number of ranks, ZeRO
        stage, or model.
    """
    rank, stage = int(about["rank"]), int(about["stage"])
    facts = _read_json(folder / f"rank-{rank}.json")
    for name in ("world_size", "stage"):
        if facts["about"].get(name) != about[name]:
            msg = f"load({str(folder)!r}): expected a state of {name} {about[name]}"
            advice = (
                f"Resume with {name} {facts['about'].get(name)}, or take weights only."
            )
            raise CheckpointError(f"{msg}, got {facts['about'].get(name)}. {advice}")
    if set(facts["engines"]) != set(engines):
        msg = f"load({str(folder)!r}): expected optimizers {sorted(engines)}"
        advice = "Resume with the learner that was saved."
        raise CheckpointError(f"{msg}, got {sorted(facts['engines'])}. {advice}")
    found = _read_tensors(folder / f"rank-{rank}.safetensors")
    if stage < 3:
        found |= _read_tensors(folder / "shared.safetensors")
    for name, engine in engines.items():
        _make_state(name, engine, found, facts["engines"][name])
    shared, own = _tensors(model, engines, stage)
    _copy_in(folder, {**shared, **own}, found)
    for name, engine in engines.items():
        _take_facts(engine, facts["engines"][name])
    return dict(facts["about"])


# ---------------------------------------------------------------------- tensors


def _tensors(
    model: nn.Module, engines: Mapping[str, Any], stage: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Live tensors by name: those that all ranks share, and this rank's own."""
    own = {f"buffers/{name}": value for name, value in model.named_buffers()}
    weights = {
        f"weights/{name}": getattr(param, "ds_tensor", param).data
        for name, param in model.named_parameters()
    }
    states: dict[str, Tensor] = {}
    for name, engine in engines.items():
        for n, master in enumerate(masters(engine)):
            states |= _of_master(f"optimizers/{name}/{n}", master, engine, model)
    if stage == 3:
        return {}, {**own, **weights, **states}
    if stage == 0:
        return {**weights, **states}, own
    return weights, {**own, **states}


def _of_master(
    place: str, master: Tensor, engine: Any, model: nn.Module
) -> dict[str, Tensor]:
    """What the optimizer keeps for one tensor, and the tensor if it is no weight itself."""
    state = base_of(engine).state.get(master, {})
    found = {
        f"{place}/{name}": value
        for name, value in state.items()
        if torch.is_tensor(value)
    }
    if not any(master is param for param in model.parameters()):
        found[f"{place}/master"] = master.data
    return found


def base_of(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer that an engine's wrappers step."""
    wrapped = getattr(engine.optimizer, "optimizer", None)
    found = engine.basic_optimizer if wrapped is None else wrapped
    assert isinstance(found, torch.optim.Optimizer)
    return found


def masters(engine: Any) -> list[Tensor]:
    """The tensors that the optimizer steps: this rank's parts of the weights in float32."""
    divided = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    if divided is not None:
        return list(divided)
    return [
        param for group in base_of(engine).param_groups for param in group["params"]
    ]


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU that share no memory, as safetensors asks."""
    return {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in tensors.items()
    }


def _make_state(
    name: str, engine: Any, found: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Give the optimizer the entries it had, to be filled; torch makes them at the first step."""
    state = base_of(engine).state
    for n, master in enumerate(masters(engine)):
        place = f"optimizers/{name}/{n}/"
        entries: dict[str, Any] = {
            full.removeprefix(place): value
            for full, value in found.items()
            if full.startswith(place) and full != f"{place}master"
        }
        for entry, value in entries.items():
            # A counter stays on the CPU, where torch keeps it.
            device = master.device if value.dim() else value.device
            entries[entry] = value.to(device, copy=True)
        numbers = facts["state"].get(str(n), {})
        if entries or numbers:
            state[master] = {**entries, **numbers}


def _copy_in(
    folder: Path, live: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Copy saved tensors into live ones of the same names and shapes."""
    for name in sorted(live.keys() ^ found.keys()):
        have = "an unknown tensor" if name in found else "no tensor"
        msg = f"load({str(folder)!r}): expected the saved model's tensors, got {have}"
        raise CheckpointError(f"{msg} {name!r}. Resume with the code that was saved.")
    for name, value in live.items():
        if value.shape != found[name].shape:
            msg = f"load({str(folder)!r}): expected {name!r} of shape {tuple(value.shape)}"
            advice = "Resume with the code that was saved."
            raise CheckpointError(f"{msg}, got {tuple(found[name].shape)}. {advice}")
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(found[name])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        msg = f"load({str(path)!r}): expected a whole file of tensors, got {error}."
        raise CheckpointError(f"{msg} Take an earlier checkpoint.") from error


# ------------------------------------------------------------------------ facts


def _facts(engine: Any) -> dict[str, Any]:
    """What an engine holds beside tensors."""
    base = base_of(engine)
    numbers = {}
    for n, master in enumerate(masters(engine)):
        state = base.state.get(master, {})
        plain = {k: v for k, v in state.items() if not torch.is_tensor(v)}
        if plain:
            numbers[str(n)] = plain
    groups = [
        {key: _plain(value) for key, value in group.items() if key != "params"}
        for group in base.param_groups
    ]
    scheduler = engine.lr_scheduler
    return {
        "counters": {name: getattr(engine, name) for name in _COUNTERS},
        "groups": groups,
        "state": numbers,
        "scales": [
            {name: getattr(holder, name) for name in _SCALES if hasattr(holder, name)}
            for holder in _scale_holders(engine)
        ],
        "scalers": [scaler.state_dict() for scaler in _scalers(engine)],
        "scheduler": None if scheduler is None else scheduler.state_dict(),
    }


def _take_facts(engine: Any, facts: Mapping[str, Any]) -> None:
    """Put the facts back."""
    for name, value in facts["counters"].items():
        setattr(engine, name, value)
    for group, saved in zip(base_of(engine).param_groups, facts["groups"], strict=True):
        for key, value in saved.items():
            before = group.get(key)
            if torch.is_tensor(before):
                before.fill_(value)
            else:
                group[key] = tuple(value) if isinstance(before, tuple) else value
    for holder, saved in zip(_scale_holders(engine), facts["scales"], strict=True):
        for name, value in saved.items():
            setattr(holder, name, value)
    for scaler, saved in zip(_scalers(engine), facts["scalers"], strict=True):
        scaler.load_state_dict(saved)
    if facts["scheduler"] is not None:
        engine.lr_scheduler.load_state_dict(facts["scheduler"])


def _scale_holders(engine: Any) -> Iterator[Any]:
    """Objects that hold numbers of the loss scaling."""
    yield engine.optimizer
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        yield scaler


def _scalers(engine: Any) -> Iterator[Any]:
    """The gradient scalers of torch under autocast with float16."""
    for holder, name in (
        (engine, "torch_autocast_z0_gradscaler"),
        (engine.optimizer, "torch_autocast_gradscaler"),
    ):
        scaler = getattr(holder, name, None)
        if scaler is not None:
            yield scaler


def _plain(value: Any) -> Any:
    """The value as JSON holds it."""
    return value.item() if torch.is_tensor(value) else value


def _read_json(path: Path) -> dict[str, Any]:
    """The facts of a rank, checked for their form."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        if facts["format"] != FORMAT:
            raise ValueError(f"format {facts['format']!r} instead of {FORMAT}")
        if not isinstance(facts["about"], dict) or not isinstance(
            facts["engines"], dict
        ):
            raise ValueError("facts of another form")
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"load({str(path)!r}): expected the facts of a rank, got {error}."
        raise CheckpointError(f"{msg} Take an earlier checkpoint.") from error
    return dict(facts)
