"""Weights alone: written to one file, read from a file, a saved model or a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.checkpoint.format import MANIFEST, check, read_part, write_tensors
from harness.checkpoint.saved_model import ABOUT, read_saved
from harness.errors import CheckpointError
from harness.reshard.consolidated import STATE_ERRORS, ConsolidatedState
from tracking.durable import replace_file


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What became of weights that were put into a model, by name of the tensor.

    Attributes
    ----------
    loaded
        Taken.
    missing
        In the model, not in the file; they stay as they were.
    unexpected
        In the file, not in the model.
    misshapen
        In both, of other shapes; they stay as they were.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    misshapen: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """True if each tensor of the model was taken and none was left over."""
        return not (self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} loaded"]
        for kind in ("missing", "unexpected", "misshapen"):
            names = getattr(self, kind)
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                parts.append(f"{kind}: {', '.join(names[:10])}{more}")
        return "; ".join(parts)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state dict of a model into one safetensors file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }
    with replace_file(path) as temporary:
        write_tensors(temporary, state)


def put_weights(model: nn.Module, path: Path, *, strict: bool = True) -> WeightsReport:
    """Put weights into a model, by name.

    Parameters
    ----------
    model
        Changed in place, unless `strict` refuses.
    path
        File of ``save_weights`` or any other safetensors file, folder of ``Fitted.save``,
        or checkpoint, saved on any number of ranks.
    strict
        Refuse names or shapes that differ; False takes what fits.

    Raises
    ------
    CheckpointError
        If there are no weights at `path`, or, with `strict`, they do not fit.
    """
    live = _tensors_of(model)
    saved = _read(path, model)
    both = [name for name in live if name in saved]
    taken = {id(live[name]) for name in both}  # tied weights have several names
    report = WeightsReport(
        loaded=tuple(n for n in both if saved[n].shape == live[n].shape),
        missing=tuple(n for n in live if n not in saved and id(live[n]) not in taken),
        unexpected=tuple(name for name in saved if name not in live),
        misshapen=tuple(n for n in both if saved[n].shape != live[n].shape),
    )
    if strict and not report.is_whole:
        msg = f"load_weights({str(path)!r}): expected weights of this model, got {report}."
        raise CheckpointError(f"{msg} Set strict=False to take what fits.")
    with torch.no_grad():
        for name in report.loaded:
            live[name].copy_(saved[name])
    return report


def _tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """The state dict's tensors, live."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _read(path: Path, model: nn.Module) -> dict[str, Tensor]:
    """The weights at a path."""
    if (path / MANIFEST).is_file():
        return _of_checkpoint(path, model)
    if (path / ABOUT).is_file():
        return read_saved(path)[0]
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        msg = f"load_weights({str(path)!r}): expected weights, got: {error}."
        raise CheckpointError(
            f"{msg} Give a safetensors file, a saved model or a checkpoint."
        ) from error


def _of_checkpoint(place: Path, model: nn.Module) -> dict[str, Tensor]:
    """ConsolidatedState weights of a checkpoint; parts of several ranks are put together."""
    ranks = range(check(place)["world_size"])
    try:
        states = [
            read_part(place, rank, is_mapped=True)["accelerator"] for rank in ranks
        ]
        found = ConsolidatedState(states).state_dict()
    except STATE_ERRORS as error:
        msg = f"load_weights({str(place)!r}): expected weights, got none: {error!r}."
        raise CheckpointError(f"{msg} Take another checkpoint.") from error
    # Buffers that a state dict leaves out are in a checkpoint all the same.
    kept = _tensors_of(model)
    left_out = {name for name, _ in model.named_buffers() if name not in kept}
    return {name: value for name, value in found.items() if name not in left_out}
