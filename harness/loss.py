"""The loss of a fit: its own copy of what `setup` was given, trained and saved with the model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.checkpoint.held.search import find_loss_modules
from harness.checks.model import get_method
from harness.model_copy import copy_with_hooks

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator

Loss = Callable[..., Tensor]

_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType, type)
"""Kinds of losses that are not copied: a copy of a function shares what it refers to."""


def make_loss(loss: Loss | None, model: nn.Module, device: torch.device) -> Loss | None:
    """Make the loss of one fit, on the device, so that fits share no state.

    Parameters
    ----------
    loss
        As passed to ``setup``; None: the model's own ``loss``, if it has one.
    device
        Where its parameters and buffers go.
    """
    if loss is None:
        own: Loss | None = get_method(model, "loss")
        return own
    modules = [] if isinstance(loss, _FUNCTIONS) else find_loss_modules(loss, model)
    if not modules:
        return loss
    try:
        made: Loss = copy_with_hooks(loss, modules)
    except Exception as error:
        msg = f"setup(loss): expected a loss that can be copied for each fit, got {error!r}."
        raise TypeError(
            f"{msg} Make it a submodule of the model named 'loss'."
        ) from error
    for module in find_loss_modules(made, model):
        module.to(device)
    return made


def list_parameters(loss: object, model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of a loss by name, without those of the model."""
    of_model = {id(param) for param in model.parameters()}
    return {
        name: param
        for module in find_loss_modules(loss, model)
        for name, param in module.named_parameters()
        if id(param) not in of_model
    }


def check_parameters(loss: object, model: nn.Module, accelerator: Accelerator) -> None:
    """Check that an accelerator can train the parameters of a loss."""
    trained = [n for n, p in list_parameters(loss, model).items() if p.requires_grad]
    if trained and not getattr(accelerator, "trains_loss", True):
        msg = "setup(loss): expected a loss without parameters under DeepSpeed"
        advice = (
            "Make it a submodule of the model named 'loss', which is used as the loss."
        )
        raise ValueError(f"{msg}, got {trained}. {advice}")


def use_copies(
    optimizers: object, original: object, made: object, model: nn.Module
) -> None:
    """Let optimizers step the parameters of a fit's loss instead of those it is a copy of."""
    then, now = (list_parameters(loss, model) for loss in (original, made))
    copies = {id(then[name]): now[name] for name in then.keys() & now.keys()}
    for group in _iter_groups(optimizers):
        group["params"][:] = [copies.get(id(p), p) for p in group["params"]]


def warn_of_untrained(optimizers: object, loss: object, model: nn.Module) -> None:
    """Warn of parameters of a loss that no optimizer steps."""
    stepped = {id(p) for group in _iter_groups(optimizers) for p in group["params"]}
    names = [
        name
        for name, param in list_parameters(loss, model).items()
        if param.requires_grad and id(param) not in stepped
    ]
    if names:
        place = f"{type(model).__name__}.set_optimizers"
        msg = f"{place}: expected an optimizer for the parameters of the loss"
        advice = "Add those of self.ctx.loss_fn, or freeze them."
        warnings.warn(f"{msg}, got none for {names[:5]}. {advice}", stacklevel=2)


def _iter_groups(optimizers: object) -> Iterator[dict[str, Any]]:
    found = optimizers.values() if isinstance(optimizers, Mapping) else [optimizers]
    for opt in found:
        yield from getattr(opt, "param_groups", ())
