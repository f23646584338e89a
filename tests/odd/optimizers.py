"""Optimizers, as people build them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn, optim

Built = optim.Optimizer | dict[str, optim.Optimizer]


def parts_of(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Parameters of the last layer, and the others."""
    last = list(model.last.parameters())  # type: ignore[union-attr]
    known = {id(param) for param in last}
    return [param for param in model.parameters() if id(param) not in known], last


def groups(model: nn.Module) -> Built:
    rest, last = parts_of(model)
    return optim.AdamW(
        [{"params": rest, "weight_decay": 0.1}, {"params": last, "lr": 0.05}], lr=0.02
    )


def two(model: nn.Module) -> Built:
    rest, last = parts_of(model)
    return {
        "rest": optim.RMSprop(rest, lr=0.01, momentum=0.5),
        "last": optim.SGD(last, lr=0.1, momentum=0.9),
    }


def only_trained(model: nn.Module) -> Built:
    return optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)


def one_by_name(model: nn.Module) -> Built:
    return {"main": optim.NAdam(model.parameters(), lr=0.02)}


def without_late(model: nn.Module) -> Built:
    """Leave out a layer that a callback adds in training."""
    late = {id(param) for param in model.late.parameters()}  # type: ignore[union-attr]
    own = [param for param in model.parameters() if id(param) not in late]
    return optim.AdamW(own, lr=0.02, amsgrad=True)


CLASSES: dict[str, tuple[type[optim.Optimizer], dict[str, Any]]] = {
    "sgd": (optim.SGD, {"lr": 0.1}),
    "momentum": (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": (optim.Adam, {"lr": 0.02, "amsgrad": True}),
    "adagrad": (optim.Adagrad, {"lr": 0.1}),
    "rprop": (optim.Rprop, {"lr": 0.02}),
    "asgd": (optim.ASGD, {"lr": 0.1, "t0": 2}),
    "adadelta": (optim.Adadelta, {"lr": 1.0}),
    "adamax": (optim.Adamax, {"lr": 0.02}),
    "lbfgs": (optim.LBFGS, {"lr": 0.2, "max_iter": 3, "history_size": 2}),
}
"""Classes for ``setup(optimizer=...)``, and their options."""

METHODS: dict[str, Callable[[nn.Module], Built]] = {
    "groups": groups,
    "two": two,
    "only trained": only_trained,
    "one by name": one_by_name,
    "without late": without_late,
}
"""What a model's own ``set_optimizers`` may return."""

OPTIMIZERS = (*CLASSES, *METHODS)


def build(name: str, model: nn.Module) -> dict[str, optim.Optimizer]:
    """Build the optimizers by name, as the plain loop has them."""
    if name in CLASSES:
        kind, options = CLASSES[name]
        return {"opt": kind(model.parameters(), **options)}
    built = METHODS[name](model)
    return built if isinstance(built, dict) else {"opt": built}
