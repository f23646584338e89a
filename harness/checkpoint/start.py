"""The weights that a fit starts from: those of another model, of a file, or of a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from harness.checkpoint.state import get_extra_states, set_extra_states
from harness.checkpoint.weights import (
    WeightsReport,
    find_tensors,
    get_tensors,
    put_weights,
    read_weights,
)
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator

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
        A model; a state dict; a safetensors file, a file of ``torch.save`` with plain
        tensors, a folder of ``Fitted.save``, a checkpoint, or a folder of checkpoints, of
        which the newest is used.
    accelerator
        If one rank refuses the weights, all do.
    strict
        Refuse different names or shapes; otherwise load what fits.

    Raises
    ------
    CheckpointError
        If there are no weights, none that fit, or, with `strict`, not all fit.
    """
    report, error = WeightsReport(loaded=()), None
    try:
        report = _load(model, start, strict=strict)
    except CheckpointError as found:
        error = found
    if accelerator.any(error is not None):
        msg = "fit(start): expected weights that each rank can load, got some that"
        raise error or CheckpointError(f"{msg} another rank refuses. See its message.")
    return report


def _load(model: nn.Module, start: Weights, *, strict: bool) -> WeightsReport:
    place = f"fit(start={_describe(start)})"
    if isinstance(start, nn.Module):
        saved = {name: value.detach() for name, value in get_tensors(start).items()}
    elif isinstance(start, Mapping):
        saved = find_tensors(start)
    else:
        saved = read_weights(Path(start), model, place)
    live = get_tensors(model)
    if not saved or saved.keys().isdisjoint(live):
        got = f"got {list(saved)[:5]}" if saved else "got none"
        msg = f"{place}: expected weights with names such as {list(live)[:5]}, {got}."
        raise CheckpointError(f"{msg} {_advise(saved, live)}")
    report = put_weights(model, saved, place, strict=strict)
    if not report.loaded:
        msg = f"{place}: expected weights that fit this model, got {report}."
        raise CheckpointError(f"{msg} Pass weights of a similar model.")
    if isinstance(start, nn.Module) and report.is_complete:
        set_extra_states(model, get_extra_states(start))
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
