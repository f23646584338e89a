"""Weights without the rest of a fit: weight files, and saved models of ``Fitted.save``.

A saved model is a folder of tensors (safetensors) and JSON. Reading one runs no code.
"""

from __future__ import annotations

import importlib
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import msgspec
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.accelerators.single import SingleDevice
from harness.checkpoint.format import (
    MANIFEST,
    FileInfo,
    Manifest,
    list_checkpoints,
    verify_file,
    write_each_tensor,
)
from harness.checkpoint.ranks.choose import choose_checkpoint
from harness.checkpoint.ranks.merge import MergedWeights
from harness.errors import CheckpointError
from harness.pytree import Options, flatten, restore
from harness.records import Packed
from harness.reshard.consolidated import (
    STATE_ERRORS,
    copy_into,
    shape_lazy_parameters,
    whole_shape,
)
from tracking.durable import replace_file, replace_folder
from tracking.errors import describe_mismatch, describe_path

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator

ReadTensor = Callable[[str], Tensor]

NO_TENSORS: Mapping[str, Tensor] = {}

SAVED_MODEL_FORMAT = 1
"""Version of the folder of a saved model."""

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".tar"})
"""Endings of files of ``torch.save``, if their content does not tell it."""

RUN_MANIFEST, WEIGHTS_OF_RUN = "run.json", ("model", "checkpoints")
"""File of the folder of a run, and where a run may have weights: the saved model first."""

NESTED = ("state_dict", "model_state_dict", "model")
"""Keys below which programs save the state dict of a model, beside other things."""

SAVED_WEIGHTS, SAVED_MODEL = "model.safetensors", "fitted.json"
"""Files of a saved model."""


@dataclass(frozen=True, kw_only=True)
class WeightsReport:
    """What became of each tensor when weights were loaded into a model, by name.

    Attributes
    ----------
    loaded
        Tensors that were loaded.
    missing
        Tensors of the model that the file does not have; they are unchanged.
    unexpected
        Tensors of the file that the model does not have.
    mismatched
        Tensors of both whose shapes differ; they are unchanged.
    """

    loaded: tuple[str, ...]
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether every tensor of the model was loaded, and none of the file is left over."""
        return not (self.missing or self.unexpected or self.mismatched)

    def __str__(self) -> str:
        parts = [f"{len(self.loaded)} loaded"]
        for kind in ("missing", "unexpected", "mismatched"):
            names = getattr(self, kind)
            if names:
                more = f" and {len(names) - 10} more" if len(names) > 10 else ""
                parts.append(f"{kind}: {', '.join(names[:10])}{more}")
        return "; ".join(parts)


# ---------------------------------------------------------------------- weights


def save_weights(
    model: nn.Module, path: Path, read: ReadTensor = NO_TENSORS.__getitem__
) -> None:
    """Write the state dict of a model into a safetensors file, completely or not at all.

    Parameters
    ----------
    read
        Returns the values of a parameter that has no memory, by its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path) as temporary:
        _write_each(temporary, get_tensors(model), read)


def _write_each(
    path: Path, tensors: Mapping[str, Tensor], read: ReadTensor
) -> FileInfo:
    """Write tensors one after another."""

    def read_any(name: str) -> Tensor:
        value = tensors[name].detach()
        return (read(name) if value.is_meta else value).cpu().contiguous()

    return write_each_tensor(path, tensors, read_any)


def load_weights(model: nn.Module, path: Path, *, strict: bool = True) -> WeightsReport:
    """Load weights into a model, by name.

    Parameters
    ----------
    model
        Changed in place, unless `strict` refuses.
    path
        File of ``save_weights`` or any other safetensors file, file of ``torch.save`` with
        plain tensors, folder of ``Fitted.save``, checkpoint, saved on any number of ranks,
        or folder of checkpoints, of which the newest is used.
    strict
        Refuse names or shapes that differ; False loads what fits.

    Raises
    ------
    CheckpointError
        If there are no weights at `path`, or, with `strict`, they do not fit.
    """
    place = f"load_weights({str(path)!r})"
    saved = read_chosen(path, choose_weights(path, place), model, place)
    return put_weights(model, saved, place, strict=strict)


def put_weights(
    model: nn.Module, saved: Mapping[str, Tensor], place: str, *, strict: bool
) -> WeightsReport:
    """Copy weights into a model, by name; `place` and errors as of ``load_weights``."""
    specs = saved.specs if isinstance(saved, MergedWeights) else saved
    shape_lazy_parameters(model, specs)
    live = get_tensors(model)
    both = [name for name in live if name in specs]
    taken = {id(live[name]) for name in both}  # tied weights have several names
    shapes = {name: whole_shape(value) for name, value in live.items()}
    report = WeightsReport(
        loaded=tuple(n for n in both if specs[n].shape == shapes[n]),
        missing=tuple(n for n in live if n not in saved and id(live[n]) not in taken),
        unexpected=tuple(name for name in saved if name not in live),
        mismatched=tuple(n for n in both if specs[n].shape != shapes[n]),
    )
    if strict and not report.is_complete:
        msg = f"{place}: expected weights of this model, got {report}."
        raise CheckpointError(f"{msg} Set strict=False to load what fits.")
    with torch.no_grad():
        for name in report.loaded:
            copy_into(live[name], saved[name])
    return report


def get_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Live tensors of the state dict."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


Chosen = tuple[Path, Manifest]
"""A checkpoint whose files were compared with its manifest."""


def choose_weights(
    path: Path, place: str, ranks: Accelerator | None = None
) -> Chosen | None:
    """Choose the checkpoint that weights are read from; None if they are of another kind.

    With `ranks`, every rank must call it. Rank 0 looks, and each compares its share.
    """
    ranks = ranks or SingleDevice("cpu")
    found: Path | None = None
    if ranks.is_main:
        inner = _enter_run(path)
        has_any = (inner / MANIFEST).is_file() or list_checkpoints(inner)
        found = inner if has_any else None
    found = ranks.broadcast(found)
    if found is None:
        return None
    chosen = choose_checkpoint(found, ranks)
    if chosen is None:
        msg = f"{place}: expected an undamaged checkpoint, got none."
        raise CheckpointError(f"{msg} Pass the path of other weights.")
    return chosen


def _enter_run(path: Path) -> Path:
    """Where the folder of a run has weights; other paths as they are."""
    if (path / RUN_MANIFEST).is_file():
        inner = [path / place for place in WEIGHTS_OF_RUN]
        return next((place for place in inner if place.is_dir()), path)
    return path


def read_chosen(
    path: Path, chosen: Chosen | None, model: nn.Module, place: str
) -> Mapping[str, Tensor]:
    """Read the weights of what ``choose_weights`` chose, or else of the files at a path."""
    if chosen is not None:
        return open_checkpoint_weights(*chosen, model)
    path = _enter_run(path)
    if (path / SAVED_MODEL).is_file():
        return find_tensors(read_saved_model(path)[0])
    advice = "Pass a file of safetensors or torch.save, a saved model or a checkpoint."
    if path.is_dir():
        msg = f"{place}: expected weights, got a folder without a model or checkpoint."
        raise CheckpointError(f"{msg} {advice}")
    is_of_torch = zipfile.is_zipfile(path) or path.suffix in TORCH_SUFFIXES
    if path.is_file() and is_of_torch:
        return _read_torch(path, place)
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        msg = f"{place}: expected weights, got: {error}."
        raise CheckpointError(f"{msg} {advice}") from error


def _read_torch(path: Path, place: str) -> dict[str, Tensor]:
    """Read a file of ``torch.save``; anything but tensors and plain values is refused."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251  runs no code
        if not isinstance(found, Mapping):
            raise TypeError(f"a {type(found).__name__}")
        return find_tensors(found)
    except (pickle.UnpicklingError, EOFError, OSError, *STATE_ERRORS) as error:
        kinds = re.findall(r"GLOBAL (\S+)", str(error))  # torch advises to run its code
        got = f"an object of {kinds[0]}" if kinds else f"{error!r:.100}"
        msg = f"{place}: expected plain tensors, got {got}."
        advice = "Save model.state_dict(), by torch.save or safetensors."
        raise CheckpointError(f"{msg} {advice}") from error


def find_tensors(found: Mapping[str, object]) -> dict[str, Tensor]:
    """Tensors of a state dict by name, also if it is below a key that many programs use."""
    kinds = (Tensor, np.ndarray)
    tensors = {n: torch.as_tensor(v) for n, v in found.items() if isinstance(v, kinds)}
    for key in NESTED if not tensors else ():
        nested = found.get(key)
        if isinstance(nested, Mapping):
            return find_tensors(nested)
    return tensors


def open_checkpoint_weights(
    path: Path, manifest: Manifest, model: nn.Module
) -> MergedWeights:
    """Open the weights in a checkpoint whose files were compared with its manifest."""
    # A checkpoint also holds the buffers that a state dict leaves out.
    kept = get_tensors(model)
    left_out = {name for name, _ in model.named_buffers() if name not in kept}
    return MergedWeights(path, manifest, in_model_dtype=False, skipped=left_out)


# ----------------------------------------------------------------- saved models


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """Content of ``fitted.json`` in a saved model; see ``Fitted``."""

    format: int = SAVED_MODEL_FORMAT  #: version of the folder
    module: str  #: where the model's class can be imported: ``module:qualified.name``
    hparams: Options
    opt_hparams: Options
    records: Packed
    run_id: str | None = None
    best_epoch: int | None = None
    best_step: int | None = None
    unit: Literal["epoch", "step"] = "epoch"
    #: plan of what a weight file cannot hold as it is; see ``harness.pytree.flatten``
    other_weights: dict[str, Any] = field(default_factory=dict)
    #: written by ``encode_object``; the metrics by split and name
    loss: object = None
    batch: object = None
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: size and SHA-256 of the weight file; None in a folder of an earlier version
    weights: FileInfo | None = None


def write_saved_model(
    path: Path,
    weights: Mapping[str, object],
    about: SavedModel,
    read: ReadTensor = NO_TENSORS.__getitem__,
) -> None:
    """Write a saved model into a folder, completely or not at all.

    Parameters
    ----------
    path
        Folder. An earlier saved model is replaced; anything else is left alone.
    weights
        State dict of the model: tensors, and extra states of modules, by name.
    read
        Returns the values of a parameter that has no memory, by its name. Each is written
        before the next one is read.

    Raises
    ------
    CheckpointError
        If `path` holds something else.
    TypeError
        If a module's extra state cannot be written; the message names it.
    """
    if path.exists() and not (path / SAVED_MODEL).is_file():
        msg = f"save({str(path)!r}): expected a new path or an earlier saved model"
        raise CheckpointError(f"{msg}, got {describe_path(path)}. Choose another path.")
    plan, tensors = flatten(
        {name: v for name, v in weights.items() if not _is_plain_tensor(v)}, "$"
    )
    tensors |= {name: v for name, v in weights.items() if _is_plain_tensor(v)}
    with replace_folder(path) as temporary:
        info = _write_each(temporary / SAVED_WEIGHTS, tensors, read)
        about = replace(about, other_weights=plan, weights=info)
        text = json.dumps(vars(about), indent=1, default=vars)
        (temporary / SAVED_MODEL).write_text(text, encoding="utf-8")


def _is_plain_tensor(value: object) -> TypeGuard[Tensor]:
    """Whether a weight file holds the value as it is: no complex tensor, no extra state."""
    return isinstance(value, Tensor) and not value.is_complex()


def read_saved_model(path: Path) -> tuple[dict[str, Any], SavedModel]:
    """Read weights and description of a saved model.

    Raises
    ------
    CheckpointError
        If the folder is missing or damaged, or has another format.
    """
    about = _read_about(path)
    try:
        if about.weights is not None:
            verify_file(path, SAVED_WEIGHTS, about.weights)
        tensors = load_file(path / SAVED_WEIGHTS)
        # Modules keep these as they are: a view into the file is not aligned as torch aligns.
        own = {n: tensor.clone() for n, tensor in tensors.items() if n[:2] == "$/"}
        others = restore(about.other_weights, own)
    except ValueError as exc:
        raise CheckpointError(f"load({str(path)!r}): {exc}") from exc
    except (CheckpointError, SafetensorError, OSError, *STATE_ERRORS) as exc:
        msg = f"load({str(path)!r}): expected complete weights in {SAVED_WEIGHTS}, got: {exc}."
        raise CheckpointError(f"{msg} Take another copy.") from exc
    weights = {n: v for n, v in tensors.items() if not n.startswith("$/")}
    return weights | others, about


def _read_about(path: Path) -> SavedModel:
    try:
        content = json.loads((path / SAVED_MODEL).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as exc:
        is_there = (path / SAVED_MODEL).exists()
        got = f"could not read it: {exc}" if is_there else f"got {describe_path(path)}"
        msg = f"load({str(path)!r}): expected a saved model, {got}."
        advice = "Pass a folder that Fitted.save() wrote."
        if (path / "model" / SAVED_MODEL).exists():
            advice = f"The model is in {str(path / 'model')!r}."
        raise CheckpointError(f"{msg} {advice}") from (exc if is_there else None)
    if isinstance(content, dict) and content.get("format") != SAVED_MODEL_FORMAT:
        msg = f"load({str(path)!r}): expected format {SAVED_MODEL_FORMAT}"
        got = f"got {content.get('format')!r}"
        raise CheckpointError(f"{msg}, {got}. Load it with the version that wrote it.")
    try:
        return msgspec.convert(content, SavedModel)
    except msgspec.ValidationError as exc:
        msg = f"load({str(path)!r}), {SAVED_MODEL}: {describe_mismatch(exc)}."
        raise CheckpointError(f"{msg} Save the model again.") from exc


def find_model_class(
    path: Path, name: str, *, trust: bool = False
) -> Callable[..., nn.Module]:
    """Find the model class of a saved model; it must be a subclass of ``nn.Module``.

    Parameters
    ----------
    name
        Module and name of the class, ``module:Class``.
    trust
        Import the module if it is not imported yet. This runs its code.

    Raises
    ------
    CheckpointError
        If there is no such class, or its module is not imported.
    """
    where, _, qualname = name.partition(":")
    place = f"load({str(path)!r})"
    if where not in sys.modules and not trust:
        msg = f"{place}: expected a model class of a module that is imported, got {name!r}."
        advice = "Pass the class as module=, or trust=True to import it, which runs its code."
        raise CheckpointError(f"{msg} {advice}")
    try:
        found: Any = importlib.import_module(where) if trust else sys.modules[where]
        for part in qualname.split("."):
            # Not getattr: a module may import others, or run code, to find a name.
            found = vars(found)[part]
    except (ImportError, KeyError, SyntaxError, TypeError, ValueError) as exc:
        msg = f"{place}: expected to import {name!r}, got: {exc!r}."
        raise CheckpointError(f"{msg} Pass the class as module=.") from exc
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        msg = f"{place}: expected {name!r} to be an nn.Module class."
        raise CheckpointError(f"{msg} Pass the class as module=.")
    return found
