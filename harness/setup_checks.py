"""What is refused before training starts. Each check raises an error that says what to do.

Options of a single callback are checked in its constructor, with ``check_at_least``; what
a callback needs of the fit is checked in its ``check`` method.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from numbers import Integral
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer

from harness.callback import Callback
from harness.events import nearest


def check_setup(module: object, loss: object, optimizer: object) -> None:
    """Check the arguments of ``setup`` that a model is built from.

    Raises
    ------
    TypeError
        If the module or the optimizer is an instance, the loss is a class, or one of them
        cannot be called.
    """
    if isinstance(module, nn.Module):
        name = type(module).__name__
        msg = f"setup(module): expected a class or factory, got an instance of {name}."
        raise TypeError(
            f"{msg} Pass {name} itself, and its arguments to set_hparams()."
        )
    if not callable(module):
        msg = f"setup(module): expected an nn.Module class or factory, got {module!r}."
        raise TypeError(f"{msg} Pass the class of your model.")
    if isinstance(optimizer, Optimizer):
        name = type(optimizer).__name__
        msg = f"setup(optimizer): expected a class, got an instance of {name}."
        raise TypeError(
            f"{msg} Pass torch.optim.{name}, and its options to set_opt_hparams()."
        )
    if optimizer is not None and optimizer != "config" and not callable(optimizer):
        msg = f"setup(optimizer): expected a class or 'config', got {optimizer!r}."
        raise TypeError(f"{msg} Pass for example torch.optim.AdamW.")
    if isinstance(loss, type):
        msg = f"setup(loss): expected an instance, got the class {loss.__name__}."
        raise TypeError(f"{msg} Write {loss.__name__}().")


def check_model(model: object) -> nn.Module:
    """Return what ``setup(module=...)`` built, if it is a model.

    Raises
    ------
    TypeError
        If it is not an ``nn.Module``.
    """
    if not isinstance(model, nn.Module):
        msg = f"setup(module): expected it to return an nn.Module, got {model!r}."
        raise TypeError(f"{msg} Pass the class, or a function that returns a model.")
    return model


def check_loss(place: str, model: nn.Module | type, loss: object) -> None:
    """Check that the learner or the model defines a loss.

    Parameters
    ----------
    place
        Where the model is used, for the message.
    model
        The model or its class.
    loss
        What ``setup(loss=...)`` was given.

    Raises
    ------
    ValueError
        If there is no loss.
    """
    if loss is None and not hasattr(model, "loss") and not hasattr(model, "step"):
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        msg = f"{place}: expected a loss, got none, and {name} has no loss or step."
        advice = f"Pass setup(loss=...), or define {name}.loss(pred, target)."
        raise ValueError(f"{msg} {advice}")


def check_definition(model: nn.Module | type, loss: object, optimizer: object) -> None:
    """Check that the learner or the model defines a loss and an optimizer.

    Raises
    ------
    ValueError
        If there is no loss or no optimizer.
    """
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    check_loss(f"setup({name})", model, loss)
    if optimizer is None and not hasattr(model, "set_optimizers"):
        msg = f"setup({name}): expected an optimizer, got none."
        raise ValueError(
            f"{msg} Pass optimizer=..., or define {name}.set_optimizers()."
        )


def check_config_optimizer(optimizer: object, accelerator: object) -> None:
    """Check that the accelerator's config has the optimizer that ``"config"`` asks for.

    Raises
    ------
    ValueError
        If it has none.
    """
    if optimizer == "config" and not getattr(accelerator, "has_optimizer", False):
        msg = "fit: expected an optimizer in the accelerator's config, got none."
        raise ValueError(
            f"{msg} Add one to the config of DeepSpeedAccelerator, or pass a class to"
            " setup(optimizer=...)."
        )


def check_callbacks(callbacks: Iterable[object]) -> tuple[Callback, ...]:
    """Return the callbacks in running order: by weight, ties in the order given.

    Raises
    ------
    TypeError
        If one is not a ``Callback``, or is a class instead of an instance.
    """
    if not isinstance(callbacks, Iterable):
        msg = f"callbacks: expected a list of callbacks, got {callbacks!r}."
        raise TypeError(f"{msg} Write [...] around it.")
    found = []
    for place, item in enumerate(callbacks):
        if isinstance(item, type) and issubclass(item, Callback):
            msg = f"callbacks[{place}]: expected an instance, got the class {item.__name__}."
            raise TypeError(f"{msg} Write {item.__name__}(...).")
        if not isinstance(item, Callback):
            msg = f"callbacks[{place}]: expected a harness.Callback, got {item!r}."
            raise TypeError(f"{msg} Derive its class from harness.Callback.")
        found.append(item)
    return tuple(sorted(found, key=lambda callback: callback.weight))


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
        msg = f"epochs: expected a pair (min_epochs, max_epochs), got {epochs!r}."
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
        msg = f"epochs: expected at least 1 epoch, got ({low}, {high})."
        raise ValueError(f"{msg} Pass an int from 1, or a pair (min, max).")
    if low > high:
        msg = f"epochs: expected min_epochs <= max_epochs, got {low} > {high}."
        raise ValueError(f"{msg} Swap them.")
    return low, high


def _check_whole_number(name: str, value: object) -> int:
    if not isinstance(value, Integral) or isinstance(value, bool):
        msg = f"epochs: expected {name} as a whole number, got {value!r}."
        raise TypeError(f"{msg} Pass an int, or a pair (min_epochs, max_epochs).")
    return int(value)


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
    "records": "Use ctx.log() or ctx.log_metric().",
    "step": "Change ctx.steps.",
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
    """Return a number of rows as an int.

    Raises
    ------
    ValueError
        If it is not a whole number from 0.
    """
    try:
        rows = operator.index(new)  # type: ignore[arg-type]
    except TypeError:
        rows = -1
    if rows < 0:
        msg = f"ctx.rows: expected a whole number >= 0, got {new!r}."
        raise ValueError(f"{msg} Pass how many rows the batch counts for.")
    return rows


def check_optimizers(optimizers: object) -> dict[str, Any]:
    """Return the optimizers by name; a single one gets the name ``opt``.

    Raises
    ------
    TypeError
        If several come without names, one is not an optimizer, or there is none.
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
            raise TypeError(f"{msg} Return for example torch.optim.AdamW(params).")
    if not optimizers:
        msg = "set_optimizers(): expected at least one optimizer, got none."
        raise TypeError(f"{msg} Return one, or a dict of named ones.")
    return dict(optimizers)


def check_monitor(place: str, monitor: str, has_valid_data: bool) -> None:
    """Check that a fit can log a monitored metric.

    Parameters
    ----------
    place
        Callback and option, for the message.
    monitor
        ``<set>/<metric>`` or ``<set>/<metric>/<optimizer>``.
    has_valid_data
        Whether the fit validates. Only the loss is refused without it: a callback may log
        any other metric under ``valid``.

    Raises
    ------
    ValueError
        If the name has no set, or the validation loss has no data.
    """
    if "/" not in monitor:
        msg = f"{place}: expected '<set>/<metric>', got {monitor!r}."
        raise ValueError(f"{msg} Write for example 'valid/{monitor}'.")
    is_valid_loss = monitor == "valid/loss" or monitor.startswith("valid/loss/")
    if is_valid_loss and not has_valid_data:
        msg = f"{place}: expected validation data, got none."
        raise ValueError(f"{msg} Pass valid_data=..., or monitor 'train/loss'.")


def check_at_least(place: str, value: float | None, least: float, advice: str) -> None:
    """Check an option of a callback; None passes.

    Parameters
    ----------
    place
        Class and option, such as ``"StepMetrics(every)"``.
    value
        What was given.
    least
        Smallest value that is allowed.
    advice
        Last sentence of the message.

    Raises
    ------
    ValueError
        If `value` is below `least`.
    """
    if value is not None and not value >= least:
        msg = f"{place}: expected at least {least}, got {value!r}."
        raise ValueError(f"{msg} {advice}")
