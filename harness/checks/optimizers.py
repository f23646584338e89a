"""Checks of optimizers and their options."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from harness.checks.calls import get_parameters
from harness.checks.model import defines

_SCHEDULERS = "Schedulers are callbacks: callbacks=[LRScheduler(StepLR, ...)]."


def check_optimizer(optimizer: object) -> None:
    """Check that it is a class, a function, ``"config"`` or None."""
    if hasattr(optimizer, "param_groups") and not isinstance(optimizer, type):
        kind = type(optimizer)
        options = ", ".join(f"{n}={v!r}" for n, v in _list_options(optimizer).items())
        where = "torch.optim." if kind.__module__.startswith("torch.optim") else ""
        msg = f"setup(optimizer): expected a class, got an instance of {kind.__name__}."
        why = "Each fit trains a new model, with a new optimizer."
        way = f"Pass {where}{kind.__name__}, and set_opt_hparams({options})."
        raise TypeError(f"{msg} {why} {way}")
    if getattr(optimizer, "__module__", "") == "torch.optim.lr_scheduler":
        name = getattr(optimizer, "__name__", type(optimizer).__name__)
        msg = f"setup(optimizer): expected an optimizer class, got {name}."
        raise TypeError(f"{msg} {_SCHEDULERS.replace('StepLR', name)}")
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
    known = get_parameters(type(optimizer)) or {}
    return {
        name: value
        for name, value in defaults.items()
        if name in known and repr(known[name].default) != repr(value)
    }


def check_config_optimizer(optimizer: object, accelerator: object) -> None:
    """Check that the accelerator's config has the optimizer that ``"config"`` asks for."""
    if optimizer == "config" and not getattr(accelerator, "has_optimizer", False):
        msg = "fit: expected an optimizer in the accelerator's config, got none."
        raise ValueError(
            f"{msg} Add one to the config of DeepSpeedAccelerator, or pass a class to"
            " setup(optimizer=...)."
        )


@contextmanager
def note_options_on_error(
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
def explain_optimizer_errors(model: nn.Module) -> Iterator[None]:
    """Explain an error of an optimizer without parameters, or with those of lazy layers.

    Also that of a function which expects the model.
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


_PARTS = ("state", "step", "zero_grad", "state_dict", "load_state_dict")


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
        advice = 'Return {"gen": ..., "disc": ...}, or one optimizer.'
        raise TypeError(f"{msg} {advice} {_SCHEDULERS}")
    if not isinstance(optimizers, Mapping):
        optimizers = {"opt": optimizers}
    for name, opt in optimizers.items():
        if not isinstance(name, str) or not name:
            msg = f"{place}: expected names of optimizers, got {name!r}."
            raise TypeError(f'{msg} Return for example {{"gen": ..., "disc": ...}}.')
        if not isinstance(opt, Optimizer) and not hasattr(opt, "param_groups"):
            msg = f"{place}: expected a torch optimizer at {name!r}, got {opt!r:.100}."
            advice = "Return for example torch.optim.AdamW(params)."
            if "scheduler" in f"{name} {type(opt).__module__}":
                advice = _SCHEDULERS
            raise TypeError(f"{msg} {advice}")
        missing = [part for part in _PARTS if not hasattr(opt, part)]
        if missing:
            kind = type(opt).__name__
            msg = f"{place}: expected a torch optimizer at {name!r}, got {kind} without"
            advice = "Make it a subclass of torch.optim.Optimizer."
            raise TypeError(f"{msg} {', '.join(missing)}. {advice}")
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
    may_unfreeze = has_user_defined(callbacks) or defines(model, "step")
    if may_unfreeze or any(param.requires_grad for param in stepped):
        return
    msg = "optimizer: expected parameters with requires_grad, got only frozen ones."
    raise ValueError(f"{msg} Call requires_grad_(True) on what should be trained.")


def has_user_defined(callbacks: Iterable[object]) -> bool:
    """Whether a callback is the user's own."""
    return any(map(is_user_defined, callbacks))


def is_user_defined(callback: object) -> bool:
    """Whether the class of a callback is not of this package."""
    return not type(callback).__module__.startswith("harness.")
