"""Checks of what is put into the context."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any

from torch.optim import Optimizer

from harness.callback import Callback


def check_callbacks(callbacks: Iterable[Any]) -> tuple[Callback, ...]:
    """The callbacks in running order: by weight, ties as given.

    Raises
    ------
    TypeError
        If one is no ``Callback``, a class instead of an instance included.
    """
    if not isinstance(callbacks, Iterable):
        msg = f"callbacks: expected a list of callbacks, got {callbacks!r}."
        raise TypeError(f"{msg} Write [...] around it.")
    found = tuple(callbacks)
    for place, item in enumerate(found):
        if isinstance(item, type) and issubclass(item, Callback):
            msg = f"callbacks[{place}]: expected an instance, got the class {item.__name__}."
            raise TypeError(f"{msg} Write {item.__name__}(...).")
        if not isinstance(item, Callback):
            msg = f"callbacks[{place}]: expected a harness.Callback, got {item!r}."
            raise TypeError(f"{msg} Derive its class from harness.Callback.")
    return tuple(sorted(found, key=lambda callback: callback.weight))


def as_pair(epochs: Any) -> tuple[Any, Any]:
    """``(min_epochs, max_epochs)`` of a number or pair, not checked further.

    Raises
    ------
    ValueError
        If there are other than two.
    """
    if not isinstance(epochs, tuple | list):
        return 0, epochs
    if len(epochs) != 2:
        msg = f"epochs: expected a pair (min_epochs, max_epochs), got {epochs!r}."
        raise ValueError(f"{msg} Give an int, or a pair.")
    return epochs[0], epochs[1]


def check_epochs(min_epochs: Any, max_epochs: Any) -> tuple[int, int]:
    """Whole numbers with ``0 <= min_epochs <= max_epochs`` and at least one epoch.

    Raises
    ------
    TypeError
        If one is no whole number.
    ValueError
        If they are out of range or order.
    """
    for name, value in (("min_epochs", min_epochs), ("max_epochs", max_epochs)):
        if not isinstance(value, Integral) or isinstance(value, bool):
            msg = f"epochs: expected {name} as a whole number, got {value!r}."
            raise TypeError(f"{msg} Give an int, or a pair (min_epochs, max_epochs).")
    if min_epochs < 0 or max_epochs < 1:
        msg = f"epochs: expected at least 1 epoch, got ({min_epochs}, {max_epochs})."
        raise ValueError(f"{msg} Give an int from 1, or a pair (min, max).")
    if min_epochs > max_epochs:
        msg = f"epochs: expected min_epochs <= max_epochs, got {min_epochs} > {max_epochs}."
        raise ValueError(f"{msg} Swap them.")
    return int(min_epochs), int(max_epochs)


def check_optimizers(optimizers: Any) -> dict[str, Any]:
    """Optimizers by name; a single one gets the name ``opt``.

    Raises
    ------
    TypeError
        If several come without names, or one is no optimizer.
    """
    if isinstance(optimizers, list | tuple | set):
        kind = type(optimizers).__name__
        msg = f"set_optimizers(): expected a dict of named optimizers, got a {kind}."
        raise TypeError(f'{msg} Return {{"gen": ..., "disc": ...}}, or one optimizer.')
    if not isinstance(optimizers, Mapping):
        optimizers = {"opt": optimizers}
    for name, opt in optimizers.items():
        if not isinstance(opt, Optimizer) and not hasattr(opt, "param_groups"):
            msg = f"set_optimizers(): expected a torch optimizer at {name!r}, got {opt!r}."
            raise TypeError(f"{msg} Build it, for instance torch.optim.AdamW(params).")
    if not optimizers:
        msg = "set_optimizers(): expected at least one optimizer, got none."
        raise TypeError(f"{msg} Return one, or a dict of named ones.")
    return dict(optimizers)
