"""Capture and restore the state of a fit: everything that the rest of it depends on."""

from __future__ import annotations

import copy
import hashlib
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from harness.callback import Callback
from harness.checkpoint.format import Phase, Position
from harness.checkpoint.hparams import encode_hparams
from harness.context import Context
from harness.data.loaders import unwrap_tensors
from harness.pytree import StateDict
from harness.records import RecordBook
from harness.reshard.consolidated import option_groups, weights_dtype
from harness.rng import Generator, find_generators, get_rng_state

VALIDATION_EVENTS = (
    "on_valid_begin",
    "on_valid_batch_begin",
    "on_valid_batch_after_pred",
    "on_valid_batch_after_loss",
    "on_valid_batch_end",
)
"""Events that fire again when a fit that stopped in validation resumes."""


def get_position(ctx: Context, phase: Phase) -> Position:
    """Where in the fit this is."""
    assert ctx.epoch is not None
    return Position(epoch=ctx.epoch, iter=ctx.trained, step=ctx.step, phase=phase)


def get_generators(ctx: Context) -> list[Generator]:
    """Random generators that the fit's loaders and model hold as attributes."""
    return find_generators(ctx.train_data, ctx.valid_data, ctx.model)


def capture_state(ctx: Context, phase: Phase) -> StateDict:
    """Capture all that the rest of a fit depends on; tensors are live.

    Parameters
    ----------
    ctx
        Context of a running fit.
    phase
        Where in the epoch this is; see ``Position``.

    Returns
    -------
    dict
        ``records``, ``ctx`` (hparams and opt_hparams), ``position``, ``accelerator``
        (weights, optimizers, gradients of an open window), ``extra`` (state of modules
        beside tensors), ``callbacks`` (metrics among them), ``random``, ``pass`` (position
        and order of the loader), ``journal`` (position in the run) and ``run`` (its id).
    """
    assert ctx.accelerator is not None and ctx.train_pass is not None
    state = {
        "records": ctx.records,
        "ctx": {
            "hparams": encode_hparams(ctx.hparams),
            "opt_hparams": encode_hparams(ctx.opt_hparams),
        },
        "position": asdict(get_position(ctx, phase)),
        "accelerator": ctx.accelerator.state_dict(),
        "extra": get_extra_states(ctx.model),
        "callbacks": {
            name: callback.state_dict()
            for name, callback in name_callbacks(ctx.callbacks)
        },
        "random": get_rng_state(get_generators(ctx)),
        "pass": ctx.train_pass.state_dict() if phase == "train" else None,
        "journal": ctx.run.position(),
        "run": ctx.run.id,
    }
    if phase == "valid" and ctx.valid_start is not None:
        ctx.valid_start.rewind(state)
    return state


def restore_state(ctx: Context, state: StateDict, parts: Iterable[str]) -> list[str]:
    """Restore what ``capture_state`` returned; loader and random state are not restored.

    Parameters
    ----------
    ctx
        Context of a fit.
    state
        From ``capture_state`` or a checkpoint.
    parts
        Any of ``model``, ``optimizers``, ``records`` and ``callbacks``. Step counters
        belong to the optimizers.

    Returns
    -------
    list of str
        What did not match: callbacks without a state, and states without a callback.

    Raises
    ------
    CheckpointError
        If weights or optimizers do not fit.
    """
    assert ctx.accelerator is not None
    wanted = set(parts)
    accelerator_parts = [part for part in ("model", "optimizers") if part in wanted]
    ctx.accelerator.load_state_dict(state["accelerator"], accelerator_parts)
    if "model" in wanted:
        set_extra_states(ctx.model, state["extra"])
    if "records" in wanted:
        ctx.record_book = RecordBook(state["records"])
    notes = []
    if "callbacks" in wanted:
        notes = _restore_callbacks(ctx.callbacks, state["callbacks"])
    if "records" in wanted:  # last: nothing above may fail once the run is rewound
        _restore_journal(ctx, state["run"], state["journal"])
    return notes


def _restore_journal(ctx: Context, run_id: str | None, position: int) -> None:
    """Go back in the run that recorded the fit; record everything again in another one."""
    if run_id is not None and run_id == ctx.run.id:
        ctx.run.rewind(position)
        return
    for what, sets in ctx.records.items():
        for split, series in sets.items():
            for index, value in enumerate(series, start=1):
                if value is not None:
                    ctx.run.log(what, split, value, index, epoch=index)


def _restore_callbacks(callbacks: Iterable[Callback], saved: StateDict) -> list[str]:
    """Restore each callback by its name; return what is left over."""
    named = dict(name_callbacks(callbacks))
    notes = []
    for name, callback in named.items():
        if name in saved:
            callback.load_state_dict(saved[name])
        elif callback.state_dict():
            notes.append(f"{name} is new and has no saved state")
    gone = (name for name in saved if saved[name] and name not in named)
    return notes + [f"{name} was saved, but this fit has none" for name in gone]


# ------------------------------------------------------------------ description


def describe_fit(ctx: Context) -> dict[str, Any]:
    """Describe a fit, so that a resume can report what differs."""
    model, data = ctx.model, ctx.train_data
    assert ctx.accelerator is not None
    precision = ctx.accelerator.precision
    return {
        "model": f"{type(model).__module__}:{type(model).__qualname__}",
        "hparams": str(encode_hparams(ctx.hparams)),
        "opt_hparams": str(encode_hparams(ctx.opt_hparams)),
        "rows": _count_rows(getattr(data, "dataset", None)),
        "data": _digest_data(getattr(data, "dataset", None)),
        "batch_size": getattr(data, "batch_size", None),
        "num_workers": getattr(data, "num_workers", None),
        "accumulate": ctx.accelerator.accumulate,
        "accelerator": type(ctx.accelerator).__name__,
        "dtype": weights_dtype(model),
        "device": describe_device(ctx.accelerator.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        # Checkpoints from before there was a choice do not name it.
        **({} if precision == "fp32" else {"precision": precision}),
    }


def describe_device(device: torch.device) -> str:
    """Name a device by its GPU model or its CPU instruction set, on which bits depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _digest_data(dataset: Any) -> str | None:
    """Hash about a thousand rows of a data set of tensors; None for other data sets."""
    found = unwrap_tensors(dataset)
    if found is None:
        return None
    digest = hashlib.sha256()
    for tensor in found[0]:
        some = tensor[:: max(1, len(tensor) // 1000)].detach().cpu().contiguous()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if some.numel():
            digest.update(some.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _count_rows(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None


# ------------------------------------------------------------------- validation


@dataclass(frozen=True, kw_only=True)
class ValidationStart:
    """What validation changes, as it was before.

    Attributes
    ----------
    random
        State of all random generators.
    journal
        Position in the run.
    lengths
        Length of each series of records.
    callbacks
        States of the callbacks that listen to validation.
    extra
        State of modules beside tensors.
    options
        Options of each parameter group, such as learning rates, by optimizer.
    tensors
        Where each tensor of the model is, and how often it was changed.
    """

    random: StateDict
    journal: int
    lengths: dict[str, dict[str, int]]
    callbacks: dict[str, StateDict]
    extra: StateDict
    options: dict[str, list[StateDict]]
    tensors: list[tuple[int, int]]

    def has_same_tensors(self, model: nn.Module) -> bool:
        """False if validation has changed the model, so that ``rewind`` is not enough."""
        return self.tensors == _mark_tensors(model)

    def rewind(self, state: StateDict) -> None:
        """Take a state captured in the middle of validation back to its beginning."""
        state["random"], state["journal"] = self.random, self.journal
        state["extra"] = self.extra
        for name, groups in option_groups(state["accelerator"]).items():
            for group, options in zip(groups, self.options[name], strict=True):
                group.update(options)
        state["callbacks"] = state["callbacks"] | self.callbacks
        state["records"] = {
            what: {
                split: series[: sets[split]]
                for split, series in found.items()
                if split in sets
            }
            for what, found in state["records"].items()
            if (sets := self.lengths.get(what)) is not None
        }


def mark_validation(ctx: Context) -> None:
    """Remember in a fit what a resume in the middle of validation starts again from."""
    if ctx.train_pass is None:
        return
    ctx.valid_start = ValidationStart(
        random=get_rng_state(get_generators(ctx)),
        journal=ctx.run.position(),
        lengths=ctx.record_book.count(),
        callbacks={
            name: copy.deepcopy(callback.state_dict())
            for name, callback in name_callbacks(ctx.callbacks)
            if any(hasattr(callback, event) for event in VALIDATION_EVENTS)
        },
        extra=copy.deepcopy(get_extra_states(ctx.model)),
        options={
            name: [
                {key: copy.deepcopy(group[key]) for key in group if key != "params"}
                for group in opt.param_groups
            ]
            for name, opt in ctx.optimizers.items()
        },
        tensors=_mark_tensors(ctx.model),
    )


def _mark_tensors(model: nn.Module) -> list[tuple[int, int]]:
    """Address and number of changes of each weight and buffer, to see a change."""
    return [
        (tensor.data_ptr(), tensor._version)
        for tensor in (*model.parameters(), *model.buffers())
        # DeepSpeed moves the weights of stage 3; a lazy layer has none yet.
        if not (hasattr(tensor, "ds_id") or is_lazy(tensor) or tensor.is_inference())
    ]


# ---------------------------------------------------------- callbacks and modules


def name_callbacks(callbacks: Iterable[Callback]) -> Iterator[tuple[str, Callback]]:
    """Pair callbacks with their names in a state: the class, numbered from the second on."""
    counts: dict[str, int] = {}
    for callback in callbacks:
        name = type(callback).__name__
        counts[name] = counts.get(name, 0) + 1
        yield (name if counts[name] == 1 else f"{name}.{counts[name]}"), callback


def get_extra_states(model: nn.Module) -> StateDict:
    """State of modules beside tensors, by module name: their ``get_extra_state``."""
    return {
        name: module.get_extra_state() for name, module in _modules_with_extra(model)
    }


def set_extra_states(model: nn.Module, state: StateDict) -> None:
    """Restore what ``get_extra_states`` returned."""
    for name, module in _modules_with_extra(model):
        if name in state:
            module.set_extra_state(state[name])


def _modules_with_extra(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module
