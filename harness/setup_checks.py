"""What is refused before training starts. Each check raises an error that says what to do.

Options of a single callback are checked in its constructor, with ``check_at_least``; what
a callback needs of the fit is checked in its ``check`` method.
"""

from __future__ import annotations

import functools
import inspect
import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from numbers import Integral, Real
from pathlib import Path
from types import GeneratorType
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from harness.callback import Callback
from harness.events import nearest

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


def check_setup(
    module: object,
    loss: object,
    optimizer: object,
    backward: object = None,
    batch: object = None,
) -> None:
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
    _check_optimizer(optimizer)
    if isinstance(loss, type):
        msg = f"setup(loss): expected an instance, got the class {loss.__name__}."
        raise TypeError(f"{msg} Write {loss.__name__}().")
    if loss is not None and not callable(loss):
        msg = f"setup(loss): expected a function or module, got {loss!r}."
        raise TypeError(f"{msg} Pass for example torch.nn.MSELoss().")
    _check_function(
        "setup(backward)",
        backward,
        "loss",
        "Leave it out for the accelerator's backward.",
    )
    _check_function("setup(batch)", batch, "batch", "It returns (input, target).")


def _check_optimizer(optimizer: object) -> None:
    """Check that it is a class, a function, ``"config"`` or None."""
    if hasattr(optimizer, "param_groups") and not isinstance(optimizer, type):
        kind = type(optimizer)
        options = ", ".join(f"{n}={v!r}" for n, v in _list_options(optimizer).items())
        where = "torch.optim." if kind.__module__.startswith("torch.optim") else ""
        msg = f"setup(optimizer): expected a class, got an instance of {kind.__name__}."
        why = "Each fit trains a model of its own, with an optimizer of its own."
        way = f"Pass {where}{kind.__name__}, and set_opt_hparams({options})."
        raise TypeError(f"{msg} {why} {way}")
    if isinstance(optimizer, Mapping | list | tuple):
        kind = type(optimizer)
        msg = f"setup(optimizer): expected a class or function, got a {kind.__name__}."
        advice = (
            "For several optimizers, pass a function of the model that returns them"
        )
        raise TypeError(f"{msg} {advice} by name.")
    if optimizer is not None and optimizer != "config" and not callable(optimizer):
        near = ""
        if isinstance(optimizer, str):
            names = {name.lower(): name for name in dir(torch.optim)}
            near = names.get(optimizer.lower(), "")
        msg = f"setup(optimizer): expected a class or 'config', got {optimizer!r}."
        raise TypeError(f"{msg} Pass for example torch.optim.{near or 'AdamW'}.")


def _list_options(optimizer: object) -> dict[str, object]:
    """Options that an optimizer was made with, where they are not the default ones."""
    defaults = getattr(optimizer, "defaults", {})
    known = _get_parameters(type(optimizer)) or {}
    return {
        name: value
        for name, value in defaults.items()
        if name in known and repr(known[name].default) != repr(value)
    }


def takes_model(build: Callable[..., object]) -> bool:
    """Whether the first parameter of a function that makes optimizers is called ``model``."""
    return next(iter(_get_parameters(build) or {}), None) == "model"


def _check_function(place: str, function: object, argument: str, advice: str) -> None:
    """Check that an option is a function of one argument, or None."""
    if function is None:
        return
    if not callable(function):
        msg = f"{place}: expected a function of the {argument}, got {function!r}."
        raise TypeError(f"{msg} {advice}")
    check_call(place, function, argument)


def check_compile(options: object) -> dict[str, Any]:
    """Check ``setup(compile=...)``; return the options of ``torch.compile``.

    Raises
    ------
    TypeError, ValueError
        If it is neither a bool nor options that ``torch.compile`` has.
    """
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


def _defines(model: nn.Module | type, name: str) -> bool:
    """Whether a model has something under a name, or its class may set it when it is built."""
    if getattr(model, name, None) is not None:
        return True
    return isinstance(model, type) and _names_in_code(model, name)


def _names_in_code(model: type, name: str) -> bool:
    """Whether the methods of a model's class use a name."""
    functions = [
        getattr(value, "__code__", None)
        for cls in model.__mro__
        if not cls.__module__.startswith("torch.")
        for value in vars(cls).values()
    ]
    return any(name in (*code.co_names, *code.co_consts) for code in functions if code)


def check_arguments(
    place: str, function: Callable[..., object], names: Iterable[str]
) -> None:
    """Check that a function takes keyword arguments of these names.

    Raises
    ------
    TypeError
        If it does not take one; the message offers the nearest name.
    """
    known = _get_parameters(function)
    if known is None or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    choices = [
        name
        for name, p in known.items()
        if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}
    ]
    for name in map(str, names):
        if name not in choices:
            called = getattr(function, "__name__", type(function).__name__)
            msg = f"{place}: expected an argument of {called}, got {name!r}."
            raise TypeError(
                f"{msg}{nearest(name, choices)} It takes: {', '.join(choices)}."
            )


def check_numbers(
    place: str, function: Callable[..., object], options: Mapping[str, object]
) -> None:
    """Check that an option of one of torch's classes is no text or list where it is a number.

    Raises
    ------
    TypeError
        If it is; torch itself would fail at a comparison, or in the middle of the fit.
    """
    function = getattr(function, "func", function)  # of a partial
    known = _get_parameters(function) or {}
    if not str(getattr(function, "__module__", "")).startswith("torch."):
        return
    for name, value in options.items():
        if not isinstance(value, str | list | dict) or name not in known:
            continue
        default, kind = known[name].default, known[name].annotation
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        takes_list = not isinstance(value, str) and "list" in str(kind).lower()
        if (is_number and not takes_list) or kind in {int, float, "int", "float"}:
            called = getattr(function, "__name__", "the class")
            msg = (
                f"{place}({name}): expected a number for {called}, got {value!r:.100}."
            )
            raise TypeError(f"{msg} Pass a number.")


@contextmanager
def explaining_loader(options: Mapping[str, object]) -> Iterator[None]:
    """Name the options of a ``DataLoader`` that torch refuses, in front of torch's reason.

    Raises
    ------
    TypeError, ValueError
        In place of torch's.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        assert last is not None
        if not last.tb_frame.f_globals["__name__"].startswith("torch.utils.data"):
            raise  # of the user's data set or sampler
        given = ", ".join(f"{name}={value!r:.50}" for name, value in options.items())
        msg = "dataloader_options: expected options that DataLoader takes together"
        raise type(error)(f"{msg}, got {given}: {error} Change them.") from error


def check_given(
    place: str,
    function: Callable[..., object],
    names: Iterable[str],
    advice: str,
    num_positional: int = 0,
) -> None:
    """Check that a function is given all the arguments that it needs.

    Parameters
    ----------
    place
        Where the arguments come from, for the message.
    function
        Model, optimizer or scheduler class, or a function that returns one.
    names
        Names of the keyword arguments that it is given.
    advice
        How to give an argument, with ``{}`` for ``name=...``.
    num_positional
        How many arguments it is given before those.

    Raises
    ------
    TypeError
        If one is missing, or it takes fewer positional arguments.
    """
    parameters = _get_parameters(function)
    if parameters is None:
        return
    called = getattr(function, "__name__", type(function).__name__)
    kinds = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    given = _list_positional(parameters)[:num_positional]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if len(given) < num_positional and not takes_any:
        msg = f"{place}: expected a function of {num_positional} argument"
        signature = f"{called}({', '.join(parameters)})"
        raise TypeError(f"{msg}, got {signature}. It is called with what it builds on.")
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in kinds and name not in {*given, *names}
    ]
    if missing:
        msg = f"{place}: expected values for {missing} of {called}, got none."
        ways = advice.format(", ".join(f"{name}=..." for name in missing))
        raise TypeError(f"{msg} {ways}")


def _list_positional(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Names of the parameters that can be given by position."""
    kinds = {
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    }
    return [name for name, p in parameters.items() if p.kind in kinds]


def check_call(
    place: str, function: object, *arguments: str, is_partial: bool = False
) -> None:
    """Check that a function can be called with so many positional arguments.

    With `is_partial`, others may be needed beside them.

    Raises
    ------
    TypeError
        If it cannot.
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return  # written in C
    try:
        (signature.bind_partial if is_partial else signature.bind)(*arguments)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        given = ", ".join(arguments)
        msg = f"{place}: expected a function that can be called as f({given})"
        raise TypeError(f"{msg}, got {name}{signature}.") from error


def count_needed(function: object) -> int:
    """How many positional arguments a loss must be given, at least two."""
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(called).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return 2  # written in C
    positional = {
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    }
    needed = [p for p in parameters if p.default is p.empty and p.kind in positional]
    return max(2, len(needed))


def _check_loss_call(place: str, loss: object) -> None:
    """Check that a loss takes prediction and target, and what else a batch may hold."""
    more = (f"item{n}" for n in range(3, count_needed(loss) + 1))
    check_call(place, loss, "pred", "target", *more)


def check_loss_items(model: nn.Module, loss: object, num_items: int) -> None:
    """Check that batches of so many items are enough for the loss of the default step.

    Raises
    ------
    TypeError
        If the loss must be given more.
    """
    if not _defines(model, "step") and count_needed(loss) > max(2, num_items):
        items = (f"item{n}" for n in range(3, num_items + 1))
        check_call("setup(loss)", loss, "pred", "target", *items)


def _get_parameters(
    function: Callable[..., object],
) -> Mapping[str, inspect.Parameter] | None:
    """Parameters of a function without ``self``; None if Python cannot tell them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


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
    if loss is None and not _defines(model, "loss") and not _defines(model, "step"):
        name = model.__name__ if isinstance(model, type) else type(model).__name__
        msg = f"{place}: expected a loss, got none, and {name} has no loss or step."
        advice = f"Pass setup(loss=...), or define {name}.loss(pred, target)."
        raise ValueError(f"{msg} {advice}")


def check_definition(model: nn.Module | type, loss: object, optimizer: object) -> None:
    """Check that the learner or the model defines a loss and an optimizer.

    Raises
    ------
    TypeError
        If the model uses a name of ``harness`` for something else.
    ValueError
        If there is no loss or no optimizer.
    """
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    check_model_names(model)
    check_loss(f"setup({name})", model, loss)
    if not _defines(model, "step"):  # which may call the loss in another way
        if loss is not None:
            _check_loss_call("setup(loss)", loss)
        elif not isinstance(model, type):
            _check_loss_call(f"{name}.loss", model.loss)
    for method, arguments in _ARGUMENTS.items():
        if not isinstance(model, type) and getattr(model, method, None) is not None:
            own, may_need_more = getattr(model, method), method == "predict"
            check_call(f"{name}.{method}", own, *arguments, is_partial=may_need_more)
    if optimizer is None and not _defines(model, "set_optimizers"):
        msg = f"setup({name}): expected an optimizer, got none."
        raise ValueError(
            f"{msg} Pass optimizer=..., or define {name}.set_optimizers()."
        )


def check_start(start: object, strict: object) -> None:
    """Check ``fit(start=..., strict=...)``.

    Raises
    ------
    TypeError
        If `start` is nothing that has weights, or `strict` is no bool.
    """
    has_weights = hasattr(start, "model") or isinstance(
        start, nn.Module | Mapping | str | os.PathLike
    )
    if start is not None and (not has_weights or isinstance(start, type)):
        msg = f"fit(start): expected weights to start from, got {start!r:.100}."
        raise TypeError(f"{msg} Pass a result of fit, a model, a state dict or a path.")
    if strict is not None and not isinstance(strict, bool):
        msg = f"fit(strict): expected True, False or None, got {strict!r}."
        raise TypeError(f"{msg} True refuses weights that do not all fit.")
    if start is None and strict is not None:
        msg = f"fit(strict): expected start=... with it, got strict={strict!r} alone."
        raise ValueError(f"{msg} Pass what the fit starts from.")


def check_predict(
    model: nn.Module, *, stack: object, mode: object, arguments: Mapping[str, object]
) -> None:
    """Check what ``predict`` alone takes.

    Raises
    ------
    TypeError, ValueError
        If `stack` is no bool, `mode` none of both, or the model's own ``predict`` does not
        take the arguments, or there is none.
    """
    if not isinstance(stack, bool):
        msg = f"predict(stack): expected True or False, got {stack!r}."
        raise TypeError(f"{msg} False returns a list with one item a batch.")
    if mode not in ("eval", "train"):
        msg = f"predict(mode): expected 'eval' or 'train', got {mode!r}."
        raise ValueError(f"{msg} 'train' keeps dropout on.")
    own = get_method(model, "predict")
    if own is None and arguments:
        near = nearest(next(iter(arguments)), _PREDICT_OPTIONS)
        msg = f"predict: expected options of predict, got {list(arguments)}.{near}"
        advice = f"define {type(model).__name__}.predict(self, input, **arguments)."
        raise TypeError(f"{msg} It takes {', '.join(_PREDICT_OPTIONS)}; or {advice}")
    if own is not None:
        check_arguments("predict", own, arguments)
        advice = "Pass them to predict: {}."
        check_given(f"{type(model).__name__}.predict", own, arguments, advice, 1)


_PREDICT_OPTIONS = (
    "callbacks",
    "accelerator",
    "verbose",
    "dataloader_options",
    "stack",
    "mode",
)


def check_call_arguments(
    place: str,
    accelerator: object,
    *,
    seed: object = None,
    verbose: object = None,
    fitted: object = True,
) -> None:
    """Check arguments that ``fit``, ``evaluate`` and ``predict`` have in common.

    Raises
    ------
    TypeError, ValueError
        If the accelerator is none, the seed no whole number, `verbose` no truth value, or
        the result of a fit no result.
    """
    has_parts = hasattr(accelerator, "prepare") and not isinstance(accelerator, type)
    if accelerator is not None and not has_parts:
        msg = f"{place}(accelerator): expected an accelerator, got {accelerator!r}."
        raise TypeError(f"{msg} Pass harness.accelerator(...), or leave it out.")
    if seed is not None:
        check_count(f"{place}(seed)", seed, -(2**63), "Leave it out for no seed.")
    if verbose is not None and not isinstance(verbose, int | np.bool_):
        msg = f"{place}(verbose): expected True, False or None, got {verbose!r:.100}."
        raise TypeError(f"{msg} None shows progress in a terminal or notebook.")
    if fitted is not True and not hasattr(fitted, "learner"):
        msg = f"{place}(fitted): expected the result of fit, got {fitted!r:.100}."
        raise TypeError(f"{msg} Pass what fit or harness.load returned.")


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
        got = (low, high) if low else high
        msg = f"epochs: expected at least 1 epoch, got {got}."
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


@contextmanager
def noting_options(
    function: Callable[..., object], options: Mapping[str, object]
) -> Iterator[None]:
    """Add to an error of a model, optimizer or scheduler the options that it was called with.

    Values are not shown, because they may be secret.
    """
    try:
        yield
    except Exception as error:
        called = getattr(function, "__name__", type(function).__name__)
        given = [f"{name} ({type(value).__name__})" for name, value in options.items()]
        error.add_note(f"in {called}, called with {', '.join(given) or 'no options'}")
        raise


@contextmanager
def explaining_optimizer(model: nn.Module) -> Iterator[None]:
    """Explain an error of an optimizer without parameters, or with those of lazy layers.

    Also that of a function which expects the model.

    Raises
    ------
    ValueError, TypeError
        In place of torch's.
    """
    try:
        yield
    except AttributeError as error:
        if not isinstance(error.obj, list | GeneratorType) or not hasattr(
            model, str(error.name)
        ):
            raise
        msg = f"setup(optimizer): expected a function of parameters, got one of {error.name}"
        advice = "Call its first parameter 'model', and it gets the model."
        raise TypeError(f"{msg}(). {advice}") from error
    except ValueError as error:
        if "empty parameter list" in str(error):
            msg = f"optimizer: expected parameters of {type(model).__name__}, got none."
            advice = "Pass those that it should train."
            if next(model.parameters(), None) is None:
                advice = "Keep layers as attributes or in an nn.ModuleList."
            raise ValueError(f"{msg} {advice}") from error
        lazy = [name for name, param in model.named_parameters() if is_lazy(param)]
        if not lazy:
            raise
        msg = "optimizer: expected parameters whose sizes are known, got lazy layers"
        advice = "Run a batch through the model where it is made, or use SGD or Adam."
        raise ValueError(f"{msg} {lazy}. {advice}") from error


def check_optimizers(
    optimizers: object, place: str = "set_optimizers()"
) -> dict[str, Any]:
    """Return the optimizers by name; a single one gets the name ``opt``.

    Raises
    ------
    TypeError
        If several come without names, a name is no text, one is not an optimizer, or there
        is none.
    """
    if isinstance(optimizers, list | tuple | set):
        kind = type(optimizers).__name__
        msg = f"{place}: expected a dict of named optimizers, got a {kind}."
        raise TypeError(f'{msg} Return {{"gen": ..., "disc": ...}}, or one optimizer.')
    if not isinstance(optimizers, Mapping):
        optimizers = {"opt": optimizers}
    for name, opt in optimizers.items():
        if not isinstance(name, str) or not name:
            msg = f"{place}: expected names of optimizers, got {name!r}."
            raise TypeError(f'{msg} Return for example {{"gen": ..., "disc": ...}}.')
        if not isinstance(opt, Optimizer) and not hasattr(opt, "param_groups"):
            msg = f"{place}: expected a torch optimizer at {name!r}, got {opt!r}."
            raise TypeError(f"{msg} Return for example torch.optim.AdamW(params).")
    if not optimizers:
        msg = f"{place}: expected at least one optimizer, got none."
        raise TypeError(f"{msg} Return one, or a dict of named ones.")
    return dict(optimizers)


def check_trained(
    optimizers: Mapping[str, Any],
    model: nn.Module,
    find_parameters: Callable[[], Iterable[Tensor]],
    callbacks: Iterable[object],
) -> None:
    """Check that the optimizers of a fit train its model.

    Parameters
    ----------
    optimizers
        As built, before an accelerator prepares them.
    model
        Model of the fit; its own ``step`` may unfreeze parameters.
    find_parameters
        Finds those of the model and its loss, and of what else belongs to the fit. Called
        only if those of the model are not stepped, because it takes long.
    callbacks
        Callbacks of the fit; one of the user's may unfreeze parameters too.

    Raises
    ------
    ValueError
        If they step none of the parameters, or these are all frozen.
    """
    stepped = [
        param
        for opt in optimizers.values()
        for group in opt.param_groups
        for param in group["params"]
    ]
    own = set(map(id, model.parameters()))
    if own.isdisjoint(map(id, stepped)):
        own = set(map(id, find_parameters()))
    if own and stepped and own.isdisjoint(map(id, stepped)):
        msg = "optimizer: expected parameters of the model of this fit, got others."
        advice = "Use those that the factory is called with, or self.parameters()."
        raise ValueError(f"{msg} {advice}")
    may_unfreeze = _has_users(callbacks) or _defines(model, "step")
    if may_unfreeze or any(param.requires_grad for param in stepped):
        return
    msg = "optimizer: expected parameters with requires_grad, got only frozen ones."
    raise ValueError(f"{msg} Call requires_grad_(True) on what should be trained.")


def _has_users(callbacks: Iterable[object]) -> bool:
    """Whether a callback is the user's own."""
    return any(map(is_users, callbacks))


def is_users(callback: object) -> bool:
    """Whether the class of a callback is not of this package."""
    return not type(callback).__module__.startswith("harness.")


def check_monitor(
    place: str, monitor: object, names: Iterable[str], has_valid_data: bool
) -> str | None:
    """Check that a fit can log a monitored metric.

    Parameters
    ----------
    place
        Callback and option, for the message.
    monitor
        ``<set>/<metric>`` or ``<set>/<metric>/<part>``.
    names
        ``<set>/<metric>`` of the losses and metrics that the fit knows.
    has_valid_data
        Whether the fit validates.

    Returns
    -------
    The one of `names` that is monitored; None if a callback must log the metric

    Raises
    ------
    TypeError
        If the name is no text.
    ValueError
        If the name has no set, or the metric has no data.
    """
    if not isinstance(monitor, str):
        msg = f"{place}: expected '<set>/<metric>', got {monitor!r}."
        raise TypeError(f"{msg} Write for example 'valid/loss'.")
    if "/" not in monitor:
        msg = f"{place}: expected '<set>/<metric>', got {monitor!r}."
        near = nearest(monitor, names) or f" Write for example 'valid/{monitor}'."
        raise ValueError(f"{msg}{near}")
    found = [name for name in names if f"{monitor}/".startswith(f"{name}/")]
    if found and monitor.startswith("valid/") and not has_valid_data:
        msg = f"{place}: expected validation data, got none."
        instead = "train" + monitor.removeprefix("valid")
        raise ValueError(f"{msg} Pass valid_data=..., or monitor {instead!r}.")
    sets = dict.fromkeys(name.partition("/")[0] for name in names)
    if monitor.startswith("valid/") and "valid" not in sets:
        ways = [f"{name}/{monitor.removeprefix('valid/')}" for name in sets]
        msg = f"{place}: expected a set of this fit, got {monitor!r}."
        raise ValueError(f"{msg} Choose from {ways}.")
    return max(found, key=len, default=None)


def check_logged_elsewhere(
    place: str,
    monitor: str,
    names: Iterable[str],
    model: object,
    callbacks: Iterable[object],
) -> None:
    """Check that the model or a callback may log a metric that the fit does not know.

    Raises
    ------
    ValueError
        If neither does, and the name is similar to one that the fit knows.
    """
    near = nearest(monitor, names)
    if near and not _has_users(callbacks) and not _names_in_code(type(model), "ctx"):
        msg = f"{place}: expected a metric of this fit, got {monitor!r}."
        raise ValueError(f"{msg}{near} It logs: {', '.join(names)}.")


def check_at_least(place: str, value: object, least: float, advice: str) -> None:
    """Check that an option is a number of at least `least`.

    Parameters
    ----------
    place
        Class and option, such as ``"Monitor(min_delta)"``.
    value
        What was given.
    least
        Smallest value that is allowed.
    advice
        Last sentence of the message.

    Raises
    ------
    TypeError
        If `value` is not a number.
    ValueError
        If `value` is below `least`.
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
    """Check that a folder is one or can be made, because no file is in its place.

    Raises
    ------
    NotADirectoryError
        If a file is.
    """
    existing = next((p for p in (folder, *folder.parents) if p.exists()), None)
    if existing is not None and not existing.is_dir():
        msg = f"{place}: expected a folder, got {str(folder)!r}."
        raise NotADirectoryError(f"{msg} {str(existing)!r} is a file: choose another.")


def as_path(place: str, value: object, expected: str = "a path") -> Path:
    """Return a path that was given as text or as a ``Path``.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if not isinstance(value, str | os.PathLike):
        msg = f"{place}: expected {expected}, got {value!r:.100}."
        raise TypeError(f"{msg} Pass text or a pathlib.Path.")
    return Path(value)


def check_picture(place: str, target: object) -> None:
    """Check that a picture can be saved to a path or an open file; None: it is not saved.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if target is not None and not hasattr(target, "write"):
        as_path(place, target)


def check_accelerator(accelerator: Accelerator | None, place: str) -> Accelerator:
    """Return the accelerator of a context.

    Raises
    ------
    AttributeError
        If there is none.
    """
    if accelerator is None:
        msg = f"{place}: expected an accelerator, got None. Set ctx.accelerator."
        raise AttributeError(msg)
    return accelerator


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
