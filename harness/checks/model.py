"""Checks of a model, its loss and its methods."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.checks.calls import check_call, count_needed, warn_user
from harness.events import nearest
from harness.variables import unwrap


def check_compile(options: object) -> dict[str, Any]:
    """Check ``setup(compile=...)``; return the options of ``torch.compile``."""
    if isinstance(options, bool):
        return {}
    if not isinstance(options, Mapping):
        msg = f"setup(compile): expected True, False or a dict, got {options!r}."
        raise TypeError(f"{msg} The dict has options of torch.compile, such as mode.")
    known = [
        name for name in inspect.signature(torch.compile).parameters if name != "model"
    ]
    for name in options:
        if name not in known:
            msg = f"setup(compile): expected options of torch.compile, got {name!r}."
            raise ValueError(f"{msg}{nearest(str(name), known)} Choose from {known}.")
    backend = options.get("backend", "inductor")
    backends = torch.compiler.list_backends(exclude_tags=())
    if isinstance(backend, str) and backend not in backends:
        msg = f"setup(compile): expected a backend of torch.compile, got {backend!r}."
        raise ValueError(f"{msg}{nearest(backend, backends)} Choose from {backends}.")
    return dict(options)


_METHODS = {
    "loss": "loss(self, pred, target)",
    "set_optimizers": "set_optimizers(self, **opt_hparams)",
    "step": "step(self)",
    "predict": "predict(self, input)",
    "backward": "backward(self, loss)",
}
"""Methods that a model may define, and how."""


_ARGUMENTS = {"step": (), "predict": ("input",), "backward": ("loss",)}
"""Positional arguments that these methods get; ``predict`` may get more by name."""


def check_model_names(
    model: nn.Module | type, names: Iterable[str] = ("ctx", *_METHODS)
) -> None:
    """Check that the names which ``harness`` uses in a model mean what it expects.

    Parameters
    ----------
    model
        A model or its class. In a class only what its body defines can be checked.
    names
        Names to check.

    Raises
    ------
    TypeError
        If ``ctx`` is taken, or ``step``, ``predict``, ``backward``, ``set_optimizers`` or
        ``loss`` is something else than a method. A submodule ``loss`` is the loss.
    """
    cls = model if isinstance(model, type) else type(model)
    own = {} if isinstance(model, type) else vars(model)
    for name in names:
        value = inspect.getattr_static(cls, name, None)
        if not isinstance(value, property | functools.cached_property):
            value = getattr(model, name, None)
        is_placeholder = value is None and (name != "ctx" or name not in own)
        if is_placeholder or _is_usable(name, value):
            continue
        what = type(value).__name__ if isinstance(value, Tensor | nn.Module) else value
        expected = f"a method {_METHODS.get(name)}"
        if name == "loss":
            expected += " or a loss module"
        if name == "ctx":
            expected = "no such attribute, because it is the context during a fit"
        msg = f"{cls.__name__}.{name}: expected {expected}, got {what!s:.100}."
        raise TypeError(f"{msg} Rename it, for example to 'own_{name}'.")


def _is_usable(name: str, value: object) -> bool:
    """Whether ``harness`` can use an attribute of a model for what its name says."""
    if name == "ctx":
        return hasattr(value, "call_callbacks")  # a context, bound by another fit
    if isinstance(value, type) or not callable(value):
        return False
    if isinstance(value, nn.Module):
        # A container such as ModuleDict has no forward.
        return name == "loss" and type(value).forward is not nn.Module.forward
    return True


def get_method(model: nn.Module, name: str) -> Any:
    """Return a model's method of a name that ``harness`` uses; None if it has none.

    A forward may store a value under such a name, which then stays the model's own.
    """
    value = getattr(model, name, None)
    if value is None or _is_usable(name, value):
        return value
    hidden = inspect.getattr_static(type(model), name, None)
    return hidden.__get__(model) if inspect.isfunction(hidden) else None


def defines(model: nn.Module | type, name: str) -> bool:
    """Whether a model has something under a name, or its class may set it when it is built."""
    if getattr(model, name, None) is not None:
        return True
    return isinstance(model, type) and names_in_code(model, name)


def names_in_code(model: type, name: str) -> bool:
    """Whether the methods of a model's class use a name."""
    functions = [
        unwrap(value)
        for cls in model.__mro__
        if not cls.__module__.startswith("torch.")
        for value in vars(cls).values()
    ]
    codes = [function.__code__ for function in functions if function is not None]
    return any(name in (*code.co_names, *code.co_consts) for code in codes)


def _check_loss_call(place: str, loss: object) -> None:
    """Check that a loss takes prediction and target, and what else a batch may hold."""
    more = (f"item{n}" for n in range(3, count_needed(loss) + 1))
    check_call(place, loss, "pred", "target", *more)


def check_loss_items(model: nn.Module, loss: object, num_items: int) -> None:
    """Check that batches of so many items are enough for the loss of the default step."""
    if not defines(model, "step") and count_needed(loss) > max(2, num_items):
        items = (f"item{n}" for n in range(3, num_items + 1))
        check_call("setup(loss)", loss, "pred", "target", *items)


def check_model(model: object) -> nn.Module:
    """Return what ``setup(module=...)`` built, if it is a model."""
    if not isinstance(model, nn.Module):
        msg = f"setup(module): expected it to return an nn.Module, got {model!r}."
        raise TypeError(f"{msg} Pass the class, or a function that returns a model.")
    return model


def check_loss(place: str, model: nn.Module | type, loss: object) -> None:
    """Check that the learner or the model defines a loss.

    Parameters
    ----------
    loss
        What ``setup(loss=...)`` was given.
    """
    if loss is None and not defines(model, "loss") and not defines(model, "step"):
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        msg = f"{place}: expected a loss, got none, and {name} has no loss or step."
        advice = f"Pass setup(loss=...), or define {name}.loss(pred, target)."
        if hasattr(model, "training_step"):
            advice = f"Turn {name}.training_step into step(self), with self.ctx.batch."
        raise ValueError(f"{msg} {advice}")


def check_definition(model: nn.Module | type, loss: object, optimizer: object) -> None:
    """Check that the learner or the model defines a loss and an optimizer."""
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    check_model_names(model)
    check_loss(f"setup({name})", model, loss)
    is_built = not isinstance(model, type)
    if is_built and hasattr(model, "training_step") and not defines(model, "step"):
        msg = (
            f"{name}.training_step: expected a step(self), got a method of Lightning's"
        )
        advice = "It is never called, and the model is trained on the loss alone."
        warn_user(
            f"{msg}. {advice} Turn it into step, with self.ctx.batch, or remove it."
        )
    if not defines(model, "step"):  # which may call the loss in another way
        if loss is not None:
            _check_loss_call("setup(loss)", loss)
        elif not isinstance(model, type):
            _check_loss_call(f"{name}.loss", model.loss)
    for method, arguments in _ARGUMENTS.items():
        if not isinstance(model, type) and getattr(model, method, None) is not None:
            own, may_need_more = getattr(model, method), method == "predict"
            try:
                check_call(
                    f"{name}.{method}", own, *arguments, is_partial=may_need_more
                )
            except TypeError as error:
                advice = "Everything else that it needs is in self.ctx."
                raise TypeError(f"{error} {advice}") from None
    if optimizer is None and not defines(model, "set_optimizers"):
        msg = f"setup({name}): expected an optimizer, got none."
        raise ValueError(
            f"{msg} Pass optimizer=..., or define {name}.set_optimizers()."
        )
