"""Files of a run: put under ``artifacts/``, whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path, PurePosixPath
from typing import Any


def check_artifact_name(name: str, place: str) -> str:
    """Name of an artifact below its folder, checked not to lead out of it."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(
            f"{place}: expected a relative name without '..', got {name!r}. "
            "Name it as it shall be called below artifacts/."
        )
    return str(path)


def copy_artifact(source: Path, target: Path) -> dict[str, Any]:
    """Copy a file to its place; its size and SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return description(target)


def write_text_artifact(text: str, target: Path) -> dict[str, Any]:
    """Write a text to its place; its size and SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return description(target)


def write_figure_artifact(figure: Any, target: Path) -> dict[str, Any]:
    """Save a figure to its place; its size and SHA-256.

    Parameters
    ----------
    figure
        What has ``savefig`` (matplotlib), ``write_html`` (plotly, for a name that ends
        in ``.html``), ``write_image`` (plotly) or ``save`` (Pillow).
    target
        The suffix tells the format.
    """
    methods = ["savefig", "write_image", "save"]
    if target.suffix == ".html":
        methods = ["write_html", "savefig"]
    save = next((getattr(figure, m) for m in methods if hasattr(figure, m)), None)
    if save is None:
        raise TypeError(
            f"Run.log_figure: expected a figure with savefig, write_html, write_image "
            f"or save, got {figure!r:.200}. Save it yourself and use log_artifact."
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    try:
        save(str(temporary))
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    return description(target)


def description(path: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size_bytes": path.stat().st_size, "sha256": digest}


def _temporary(target: Path) -> Path:
    """Where a file is made before it gets its name; same suffix, which savers read."""
    return target.with_name(f".{os.getpid()}-{target.stem}{target.suffix}")
