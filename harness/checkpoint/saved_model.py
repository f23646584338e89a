"""Saved models: a folder with tensors (safetensors) and JSON, read without running code."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from harness.errors import CheckpointError
from tracking.durable import replace_folder

FORMAT = 1
"""Version of the folder written by ``write_saved``."""

WEIGHTS, ABOUT = "model.safetensors", "fitted.json"


def write_saved(
    path: Path, weights: Mapping[str, Tensor], about: Mapping[str, object]
) -> None:
    """Write a saved model into a folder, put in place by one rename.

    Parameters
    ----------
    path
        Folder; an earlier saved model there is replaced, anything else is left alone.
    weights
        Tensors by name.
    about
        What JSON can hold; see ``Fitted.save``.

    Raises
    ------
    CheckpointError
        If `path` holds something else, or `about` cannot be written as JSON.
    """
    if path.exists() and not (path / ABOUT).is_file():
        msg = f"save({str(path)!r}): expected a new path or an earlier saved model."
        raise CheckpointError(f"{msg} Found something else; choose another path.")
    try:
        text = json.dumps({"format": FORMAT, **about}, indent=1)
    except TypeError as exc:
        msg = f"save({str(path)!r}): expected hparams and records as JSON, got: {exc}."
        raise CheckpointError(f"{msg} Use numbers, strings, lists and dicts.") from exc
    with replace_folder(path) as temporary:
        tensors = {name: value.contiguous().clone() for name, value in weights.items()}
        save_file(tensors, temporary / WEIGHTS)
        (temporary / ABOUT).write_text(text, encoding="utf-8")


def read_saved(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and description of a saved model.

    Raises
    ------
    CheckpointError
        If the folder is missing, torn or of another format.
    """
    about = _read_about(path)
    try:
        return load_file(path / WEIGHTS), about
    except (SafetensorError, OSError) as exc:
        msg = f"load({str(path)!r}): expected whole weights in {WEIGHTS}, got: {exc}."
        raise CheckpointError(f"{msg} Take another copy.") from exc


def import_module_class(path: Path, name: str) -> Callable[..., nn.Module]:
    """The model class of a saved name; only a subclass of ``nn.Module`` is accepted.

    Raises
    ------
    CheckpointError
        If there is no such class.
    """
    where, _, qualname = name.partition(":")
    try:
        found: object = importlib.import_module(where)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as exc:
        msg = f"load({str(path)!r}): expected to import {name!r}, got: {exc}."
        raise CheckpointError(f"{msg} Give the class as module=.") from exc
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        msg = f"load({str(path)!r}): expected {name!r} to be an nn.Module class."
        raise CheckpointError(f"{msg} Give the class as module=.")
    return found


def _read_about(path: Path) -> dict[str, Any]:
    """The checked JSON part."""
    try:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as exc:
        msg = f"load({str(path)!r}): expected a saved model, could not read it: {exc}."
        raise CheckpointError(f"{msg} Give a folder that Fitted.save() wrote.") from exc
    needed = {"format", "module", "hparams", "opt_hparams", "records"}
    if not isinstance(about, dict) or not needed <= about.keys():
        msg = f"load({str(path)!r}): expected the keys {sorted(needed)} in {ABOUT}."
        raise CheckpointError(f"{msg} Save the model again.")
    for key in ("hparams", "opt_hparams", "records"):
        if not isinstance(about[key], dict):
            msg = f"load({str(path)!r}): expected {key!r} by name, got {about[key]!r}."
            raise CheckpointError(f"{msg} Save the model again.")
    if about["format"] != FORMAT:
        msg = f"load({str(path)!r}): expected format {FORMAT}, got {about['format']!r}."
        raise CheckpointError(f"{msg} Load it with the version that wrote it.")
    return about
