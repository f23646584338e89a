"""Errors and warnings of tracking that a caller may want to catch."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Final

_CONTROL: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
"""Control characters, those that turn the direction of text, and lone surrogates."""


class TrackingError(Exception):
    """Base class of the errors of this package."""


class RunBusyError(TrackingError):
    """A process, possibly this one, is already writing the run."""


class RunNotFoundError(TrackingError, LookupError):
    """No run matches a name, or more than one does."""


class RunClosedError(TrackingError):
    """The run has finished, or belongs to the process that forked this one."""


class InvalidFileError(TrackingError, ValueError):
    """A file of a run is damaged, or its fields do not have the expected types."""


class DeliveryError(TrackingError):
    """Records were not delivered to MLflow in time."""


class TrackingWarning(UserWarning):
    """A problem that does not stop training."""


def warn(message: str) -> None:
    """Warn without raising, even if filters turn warnings into errors."""
    message = escape_control(message)
    try:
        warnings.warn(message, TrackingWarning, stacklevel=3)
    except Exception:  # noqa: BLE001  also what a replaced stderr raises
        write_stderr(f"{message}\n")


def _spell(letter: str) -> str:
    return letter.encode("unicode_escape").decode()


def escape_control(text: str, spell: Callable[[str], str] = _spell) -> str:
    r"""Spell out the characters that a terminal would obey; tabs and newlines stay.

    Examples
    --------
    >>> escape_control("loss" + chr(27) + "[2J") == r"loss\x1b[2J"
    True
    """
    return _CONTROL.sub(lambda match: spell(match.group()), text)


_SIGNS: Final = {
    "run.json": "run",
    "fitted.json": "saved model",
    "manifest.json": "checkpoint",
}
"""Files by which a folder shows what it is."""


def describe_path(path: Path) -> str:
    """Say what is at a path, for messages, such as ``a checkpoint of run 20261122-...``."""
    what = "a path that does not exist"
    with contextlib.suppress(OSError):
        if path.is_dir():
            kind = _find_kind(path)
            inside = map(_find_kind, itertools.islice(path.iterdir(), 100))
            of = next((f" of {one}s" for one in inside if one), "")
            what = f"a {kind}" if kind else f"a folder{of}"
        elif path.is_file():
            what = "a file"
        elif path.exists():
            what = "a pipe or a device"
        parents = path.absolute().parents
        run = next((one for one in parents if _find_kind(one) == "run"), None)
        if run is not None and path.exists():
            what += f" of run {run.name}"
    return what


def _find_kind(folder: Path) -> str | None:
    found = (kind for name, kind in _SIGNS.items() if (folder / name).is_file())
    return next(found, None)


def write_stderr(text: str) -> None:
    """Write to stderr; nothing happens if it is None, closed or an object that fails."""
    with contextlib.suppress(Exception):
        sys.stderr.write(text)
        sys.stderr.flush()


def is_terminal() -> bool:
    """Whether stderr is a terminal; False for one that cannot tell."""
    with contextlib.suppress(Exception):
        return bool(sys.stderr.isatty())
    return False


DEFAULT_WIDTH: Final = 80
"""Columns of a terminal that does not know its size."""


def get_terminal_width() -> int:
    """Return the columns of the terminal that stderr is."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or DEFAULT_WIDTH
    except (AttributeError, OSError, ValueError):
        return DEFAULT_WIDTH


def describe_mismatch(error: Exception) -> str:
    """Rewrite a message of ``msgspec.ValidationError``: expected what in which field, got."""
    problem, _, where = str(error).replace("`", "").partition(" - at $")
    place = f"field {where.removeprefix('.')!r}" if where else "the whole file"
    if found := re.fullmatch("Expected (.+), got (.+)", problem):
        return f"expected {found[1]} in {place}, got {found[2]}"
    if found := re.fullmatch("Object missing required field (.+)", problem):
        return f"expected field {found[1]!r} in {place}, got none"
    return f"expected other content in {place}, got: {problem}"
