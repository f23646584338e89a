"""Checks of the fields of a context."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from numbers import Integral
from typing import TYPE_CHECKING, NoReturn

from torch import nn

from harness.events import nearest

if TYPE_CHECKING:
    from harness.context import Context


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


def check_stepped(ctx: Context, field: str, new: Iterable[object]) -> None:
    """Refuse an optimizer that a running fit would not step."""
    if ctx.train_data is None:
        return
    for opt in new:
        if opt is None or any(opt is own for own in ctx.optimizers.values()):
            continue
        kind = type(opt).__name__
        msg = f"ctx.{field}: expected an optimizer of the fit, got another {kind}."
        advice = "Change ctx.opt.param_groups, or return several by name from"
        raise ValueError(f"{msg} {advice} set_optimizers, and choose in an own step.")


def check_trained_model(ctx: Context, new: nn.Module) -> None:
    """Refuse a model with weights that a running fit does not have."""
    if ctx.train_data is None or new is ctx.model:
        return
    if not set(ctx.model.parameters()).issuperset(new.parameters()):
        msg = "ctx.model: expected the weights of the fit's model, got others."
        advice = "Change layers in Callback.prepare, or copy weights into the model."
        raise ValueError(f"{msg} {advice}")


_READ_ONLY = {
    "device": "Change ctx.accelerator.",
    "index": "Change ctx.epoch.",
    "records": "Use ctx.log() or ctx.log_metric().",
    "split": "Change ctx.training or ctx.valid_name.",
    "step": "Change ctx.steps.",
    "total_steps": "Change ctx.max_epochs.",
}
"""What to do instead of setting a read-only field of the context."""


def describe_moment(ctx: Context) -> str:
    """Return where a call is, as the end of a note: ``, epoch 1, iter 3, training``."""
    counts = {"epoch": ctx.epoch, "iter": ctx.iter}
    parts = [f"{name} {at}" for name, at in counts.items() if at is not None]
    if ctx.training:
        parts.append("training")
    elif parts and ctx.valid_sets:
        parts.append("evaluation" if ctx.train_data is None else "validation")
    return "".join(f", {part}" for part in parts)


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
