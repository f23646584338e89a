"""Checks of the fields of a context."""

from __future__ import annotations

import operator
from numbers import Integral
from typing import NoReturn

from harness.events import nearest


def refuse_field(context: type, name: str, error: AttributeError) -> NoReturn:
    """Raise because setting a field of the context failed with `error`.

    Raises
    ------
    AttributeError
        For an unknown field it offers the nearest name, for a read-only one what to set
        instead. Otherwise it is `error`.
    """
    if name in _READ_ONLY:
        msg = f"ctx.{name}: expected no assignment, the field is read-only."
        raise AttributeError(f"{msg} {_READ_ONLY[name]}") from None
    names = [name for name in dir(context) if not name.startswith("_")]
    if name in names:
        raise error
    msg = f"Context.{name}: expected a field of the context, got {name!r}."
    msg += f"{nearest(name, names)} Put your own values into ctx.buffers."
    raise AttributeError(msg) from None


_READ_ONLY = {
    "device": "Change ctx.accelerator.",
    "index": "Change ctx.epoch.",
    "records": "Use ctx.log() or ctx.log_metric().",
    "split": "Change ctx.training or ctx.valid_name.",
    "step": "Change ctx.steps.",
    "total_steps": "Change ctx.max_epochs.",
}
"""What to do instead of setting a read-only field of the context."""


def check_iter(new: object) -> int:
    """Return a batch number as an int.

    Raises
    ------
    TypeError
        If it is not a whole number.
    """
    if not isinstance(new, Integral) or isinstance(new, bool):
        msg = f"ctx.iter: expected a whole number, got {new!r}."
        raise TypeError(f"{msg} Count batches from 1.")
    return int(new)


def check_rows(new: object) -> int:
    """Return a number of rows as an int."""
    try:
        rows = operator.index(new)  # type: ignore[arg-type]
    except TypeError:
        rows = -1
    if rows < 0:
        msg = f"ctx.rows: expected a whole number >= 0, got {new!r}."
        raise ValueError(f"{msg} Pass how many rows the batch counts for.")
    return rows
