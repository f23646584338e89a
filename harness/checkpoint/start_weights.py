"""The weights that a fit starts from: those of another model, of a file, or of a state dict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from harness.checkpoint.held.objects import get_extra_states, set_extra_states
from harness.checkpoint.ranks.errors import raise_together
from harness.checkpoint.weights import (
    WeightsReport,
    choose_weights,
    find_tensors,
    get_tensors,
    put_weights,
    read_chosen,
)
from harness.errors import CheckpointError
from harness.reshard.consolidated import shape_lazy_parameters

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator

REFUSED_ELSEWHERE = (
    "expected weights that each rank can load, got some that another rank refuses. "
    "See its message."
)
"""What a rank says that could load weights which another one could not."""

Weights = nn.Module | Mapping[str, object] | str | Path
"""A model, a state dict, or the path of weights."""


def load_start(
    model: nn.Module, start: Weights, accelerator: Accelerator, *, strict: bool
) -> WeightsReport:
    """Load the weights that a fit starts from into its new model, before it is prepared.

    Every rank must call it.

    Parameters
    ----------
    model
        Changed in place, unless the weights are refused.
    start
        A model; a state dict; or the path of a safetensors file, a file of ``torch.save``
        with plain tensors, a folder of ``Fitted.save``, a checkpoint, or a folder of
        checkpoints, of which the newest is used. Rank 0 reads it.
    accelerator
        If one rank refuses the weights, all do.
    strict
        Refuse different names or shapes; otherwise load what fits.

    Raises
    ------
    CheckpointError
        If there are no weights, none that fit, or, with `strict`, not all fit.
    """
    place = f"fit(start={_describe(start)})"
    if isinstance(start, str | Path):
        path = Path(start)
        chosen = choose_weights(path, place, accelerator)

        def load() -> WeightsReport:
            saved = read_chosen(path, chosen, model, place)
            return _put(model, saved, place, strict=strict)

        return load_on_main(model, load, accelerator)
    with raise_together(accelerator, f"{place}: {REFUSED_ELSEWHERE}"):
        return _load(model, start, place, strict=strict)


def load_on_main(
    model: nn.Module, load: Callable[[], WeightsReport], accelerator: Accelerator
) -> WeightsReport:
    """Load weights into a new model on rank 0, which sends them to the others.

    Every rank must call it. So files are read once, however many ranks there are. If the
    model is divided over the ranks, each rank loads its own part.
    """
    report, had_lazy = WeightsReport(loaded=()), _has_lazy(model)
    is_divided = any(hasattr(param, "ds_id") for param in model.parameters())
    with raise_together(accelerator, f"fit: {REFUSED_ELSEWHERE}"):
        if accelerator.is_main or is_divided:
            report = load()
    if had_lazy:
        live = get_tensors(model).items()
        shapes = {name: own.shape for name, own in live if not is_lazy(own)}
        specs = accelerator.broadcast(shapes).items()
        shaped = {name: torch.empty(shape, device="meta") for name, shape in specs}
        shape_lazy_parameters(model, shaped)
    if not _has_lazy(model):  # or else prepare refuses the model on several ranks
        accelerator.share_weights(model)
    sent: WeightsReport = accelerator.broadcast(report)
    return sent


def _has_lazy(model: nn.Module) -> bool:
    return any(map(is_lazy, [*model.parameters(), *model.buffers()]))


def _load(
    model: nn.Module,
    start: nn.Module | Mapping[str, object],
    place: str,
    *,
    strict: bool,
) -> WeightsReport:
    if isinstance(start, Mapping):
        return _put(model, find_tensors(start), place, strict=strict)
    saved = {name: value.detach() for name, value in get_tensors(start).items()}
    report = _put(model, saved, place, strict=strict)
    if report.is_complete:
        set_extra_states(model, get_extra_states(start))
    return report


def _put(
    model: nn.Module, saved: Mapping[str, Tensor], place: str, *, strict: bool
) -> WeightsReport:
    live = get_tensors(model)
    if not saved or saved.keys().isdisjoint(live):
        got = f"got {list(saved)[:5]}" if saved else "got none"
        msg = f"{place}: expected weights with names such as {list(live)[:5]}, {got}."
        raise CheckpointError(f"{msg} {_advise(saved, live)}")
    report = put_weights(model, saved, place, strict=strict)
    if not report.loaded:
        msg = f"{place}: expected weights that fit this model, got {report}."
        raise CheckpointError(f"{msg} Pass weights of a similar model.")
    return report


def _describe(start: Weights) -> str:
    if isinstance(start, Mapping):
        return f"a dict of {len(start)}"
    return type(start).__name__ if isinstance(start, nn.Module) else repr(str(start))


def _advise(saved: Mapping[str, Tensor], live: Mapping[str, Tensor]) -> str:
    """How to rename weights, if a wrapper has put the same before each name, or taken it."""
    for name in live:
        for other in saved:
            if other.endswith(f".{name}"):
                text = f"name.removeprefix({other.removesuffix(name)!r})"
                return f"Rename them: {{{text}: value for name, value in weights.items()}}."
            if name.endswith(f".{other}"):
                return f"Put {name.removesuffix(other)!r} before each name."
    return "Pass weights of a similar model."
