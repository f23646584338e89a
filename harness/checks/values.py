"""Checks of single values: numbers, counts, flags, paths, folders."""

from __future__ import annotations

import math
import os
import re
import reprlib
from numbers import Integral, Real
from pathlib import Path
from typing import Literal

_EVERY = re.compile(r"\s*(\d+)\s*(step|epoch)s?\s*", re.IGNORECASE)

_EVERY_ADVICE = "Write '500 steps', '2 epochs', or a number of epochs."


def parse_epochs(epochs: object) -> tuple[int, int]:
    """Return ``(min_epochs, max_epochs)`` of a number or a pair.

    Raises
    ------
    TypeError
        If one is not a whole number.
    ValueError
        If there are more or fewer than two, or they are out of range or order.
    """
    if not isinstance(epochs, tuple | list):
        return check_epochs(0, epochs)
    if len(epochs) != 2:
        msg = f"epochs: expected a pair (min_epochs, max_epochs), got {reprlib.repr(epochs)}."
        raise ValueError(f"{msg} Pass an int, or a pair.")
    return check_epochs(*epochs)


def check_epochs(min_epochs: object, max_epochs: object) -> tuple[int, int]:
    """Return both as ints, if ``0 <= min_epochs <= max_epochs`` and `max_epochs` is not 0.

    Raises
    ------
    TypeError
        If one is not a whole number.
    ValueError
        If they are out of range or order.
    """
    low = _check_whole_number("min_epochs", min_epochs)
    high = _check_whole_number("max_epochs", max_epochs)
    if low < 0 or high < 1:
        got = (low, high) if low else high
        msg = f"epochs: expected at least 1 epoch, got {got}."
        raise ValueError(f"{msg} Pass an int from 1, or a pair (min, max).")
    if low > high:
        msg = f"epochs: expected min_epochs <= max_epochs, got {low} > {high}."
        raise ValueError(f"{msg} Swap them.")
    return low, high


def _check_whole_number(name: str, value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        msg = f"epochs: expected {name} as a whole number, got {reprlib.repr(value)}."
        advice = "Pass an int, or a pair (min_epochs, max_epochs)."
        if getattr(value, "ndim", 0):
            advice = "Data is one argument: fit((input, target), epochs)."
        raise TypeError(f"{msg} {advice}")
    return int(value)


def check_at_least(place: str, value: object, least: float, advice: str) -> None:
    """Check that an option is a number of at least `least`.

    Parameters
    ----------
    place
        Class and option, such as ``"Monitor(min_delta)"``.
    advice
        Last sentence of the message.
    """
    check_number(place, value, advice)
    if not value >= least:  # type: ignore[operator]
        msg = f"{place}: expected at least {least}, got {value!r}."
        raise ValueError(f"{msg} {advice}")


def check_more_than(place: str, value: object, least: float, advice: str) -> None:
    """Check that an option is a number of more than `least`.

    Parameters and errors are those of ``check_at_least``.
    """
    check_number(place, value, advice)
    if not value > least:  # type: ignore[operator]
        msg = f"{place}: expected more than {least}, got {value!r}."
        raise ValueError(f"{msg} {advice}")


def check_count(place: str, value: object, least: int, advice: str) -> None:
    """Check that an option is a whole number of at least `least`.

    Parameters and errors are those of ``check_at_least``.
    """
    if not isinstance(value, Integral) or isinstance(value, bool):
        msg = f"{place}: expected a whole number, got {value!r}."
        raise TypeError(f"{msg} {advice}")
    check_at_least(place, int(value), least, advice)


def check_folder(place: str, folder: Path) -> None:
    """Check that a folder is one or can be made, and that files can be written there.

    Raises
    ------
    NotADirectoryError
        If a file is in its place.
    PermissionError
        If the folder, or the one that it would be made in, cannot be written.
    """
    existing = next((p for p in (folder, *folder.parents) if p.exists()), None)
    if existing is not None and not existing.is_dir():
        msg = f"{place}: expected a folder, got {str(folder)!r}."
        raise NotADirectoryError(f"{msg} {str(existing)!r} is a file: choose another.")
    if existing is not None and not os.access(existing, os.W_OK | os.X_OK):
        msg = f"{place}: expected a folder that can be written, got {str(folder)!r}."
        raise PermissionError(f"{msg} {str(existing)!r} is read-only: choose another.")


def as_path(place: str, value: object, expected: str = "a path") -> Path:
    """Return a path that was given as text or as a ``Path``."""
    if not isinstance(value, str | os.PathLike):
        msg = f"{place}: expected {expected}, got {value!r:.100}."
        raise TypeError(f"{msg} Pass text or a pathlib.Path.")
    return Path(value)


def check_picture(place: str, target: object) -> None:
    """Check that a picture can be saved to a path or an open file; None: it is not saved."""
    if target is not None and not hasattr(target, "write"):
        folder = as_path(place, target).parent
        if not folder.is_dir():
            msg = f"{place}: expected a folder that exists, got {str(folder)!r}."
            raise FileNotFoundError(f"{msg} Create it first.")


def check_number(place: str, value: object, advice: str) -> None:
    """Check that an option of a callback is a number.

    Raises
    ------
    TypeError
        If it is not; ``True`` and ``False`` are not.
    """
    if not isinstance(value, Real) or isinstance(value, bool):
        msg = f"{place}: expected a number, got {value!r}."
        raise TypeError(f"{msg} {advice}")


def parse_every(value: object) -> tuple[int, Literal["epoch", "step"]]:
    """Return the number in ``fit(valid_every)``, and its unit."""
    msg = f"fit(valid_every): expected a number of steps or epochs, got {value!r}."
    found = _EVERY.fullmatch(value) if isinstance(value, str) else None
    if isinstance(value, Integral) and not isinstance(value, bool):
        count, unit = int(value), "epoch"
    elif found is not None:
        count, unit = int(found[1]), found[2].lower()
    elif isinstance(value, str):
        raise ValueError(f"{msg} {_EVERY_ADVICE}")
    else:
        raise TypeError(f"{msg} {_EVERY_ADVICE}")
    if count < 1:
        raise ValueError(f"{msg} {_EVERY_ADVICE}")
    return count, "step" if unit == "step" else "epoch"


def check_limit(place: str, limit: object) -> None:
    """Check a number of batches, or a share of them."""
    advice = "Pass a number of batches from 1, or a fraction below 1, such as 0.1."
    if not isinstance(limit, Real) or isinstance(limit, bool):
        msg = f"{place}: expected a number of batches, got {limit!r}."
        raise TypeError(f"{msg} {advice}")
    least, most = (1.0, math.inf) if isinstance(limit, Integral) else (0.0, 1.0)
    if not least <= float(limit) <= most or limit == 0:
        msg = (
            f"{place}: expected at least 1 batch, or a fraction of them, got {limit!r}."
        )
        raise ValueError(f"{msg} {advice}")


def check_flags(owner: str, **flags: object) -> None:
    """Check that options are True or False.

    Parameters
    ----------
    owner
        What has the options, such as ``"NaNGuard"``.

    Raises
    ------
    TypeError
        If one is neither. A text or number that counts as true is none.
    """
    for name, value in flags.items():
        if not isinstance(value, bool):
            msg = f"{owner}({name}): expected True or False, got {value!r:.100}."
            raise TypeError(f"{msg} Leave it out for the default.")
