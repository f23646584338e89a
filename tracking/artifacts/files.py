"""Write files below a run's folder of artifacts, and find them again."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, Final

from tracking.durable import replace_file
from tracking.schema import check_name

_PICTURE_SUFFIX: Final = re.compile(
    r"\.(bmp|eps|gif|html|jpe?g|json|pdf|pgf|png|ps|raw|rgba|svgz?|tiff?|webp)",
    re.IGNORECASE,
)
"""Formats that matplotlib, plotly and Pillow know by these suffixes."""


def check_artifact_name(name: str | os.PathLike[str], place: str) -> str:
    """Return an artifact's name relative to its folder, which it must not leave."""
    name = os.fspath(name) if isinstance(name, os.PathLike) else name
    check_name(name, "name", place)
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError(
            f"{place}: expected a relative name without '..', got {name!r}. "
            "Pass the name that it should have below artifacts/."
        )
    return str(path)


def find_artifact(folder: Path, name: str) -> Path | None:
    """Return the file of a recorded artifact; None if the folder has none.

    A link is not followed, and a name may not leave the folder: in a run of somebody else
    they may lead to any file of this user.
    """
    path = folder
    try:
        for part in ("", *PurePosixPath(check_artifact_name(name, "artifact")).parts):
            path = path / part
            if path.is_symlink():
                return None
        return path if path.is_file() else None
    except (OSError, ValueError):  # such as a name that is too long
        return None


def add_picture_suffix(name: str) -> str:
    """Return a picture's name with ``.png`` unless it ends in a format."""
    has_format = _PICTURE_SUFFIX.fullmatch(PurePosixPath(name).suffix)
    return name if has_format else f"{name}.png"


def write_artifact(target: Path, write: Callable[[Path], object]) -> None:
    """Write a file in one step: ``write`` is called with a path of the same suffix."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(target) as temporary:
        write(temporary)


def save_figure(figure: Any, path: Path) -> None:
    """Save a figure.

    Parameters
    ----------
    figure
        Object with ``savefig`` (matplotlib), ``write_html`` (plotly, for a name that
        ends in ``.html``), ``write_image`` (plotly) or ``save`` (Pillow).
    path
        The suffix chooses the format.
    """
    methods = ["savefig", "write_image", "save"]
    if path.suffix == ".html":
        methods = ["write_html", "savefig"]
    save = next((getattr(figure, m) for m in methods if hasattr(figure, m)), None)
    if save is None:
        raise TypeError(
            f"Run.log_figure: expected a figure with savefig, write_html, write_image "
            f"or save, got {figure!r:.200}. Save it yourself and use log_artifact."
        )
    save(str(path))


def describe_file(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size_bytes": path.stat().st_size, "sha256": digest}
