"""Freezes parts of the model, and trains them from an epoch on."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.callback import Callback
from harness.checks.values import check_at_least, check_more_than
from harness.context import Context
from harness.events import nearest


class Freeze(Callback):
    """Freezes modules or parameters, until an epoch or for the whole fit.

    Frozen weights do not change: they get no gradient, and BatchNorm layers whose weights
    are frozen keep their statistics. Several callbacks unfreeze a model step by step.

    Parameters
    ----------
    *names
        Modules or parameters, such as ``"body"`` or ``"body.0.weight"``; everything below
        them is frozen too.
    until : >= 2
        First epoch that trains them; None: they are never trained.
    lr : > 0
        Learning rate of the unfrozen weights, in a separate parameter group; None: that of
        their group. If several callbacks name a weight, the longest name decides.

    Raises
    ------
    ValueError
        Before the first epoch, if the model has no such name, an optimizer has nothing to
        train or does not have what is unfrozen, or an engine steps the weights.

    Notes
    -----
    The group exists from the beginning, so schedulers change its rate like the others. At
    the end of the fit, everything that could be trained before it can be trained again.
    """

    weight = -60  # after TrainValid

    def __init__(
        self, *names: str, until: int | None = None, lr: float | None = None
    ) -> None:
        if not names or not all(isinstance(name, str) for name in names):
            msg = f"Freeze(names): expected names of modules, got {names!r}."
            raise TypeError(f"{msg} Write for example Freeze('body').")
        if until is not None:
            check_at_least("Freeze(until)", until, 2, "Leave it out to freeze always.")
        if lr is not None:
            check_more_than("Freeze(lr)", lr, 0, "Leave it out for that of the group.")
            if until is None:
                msg = f"Freeze(lr): expected until=... with it, got lr={lr!r} alone."
                raise ValueError(f"{msg} Frozen weights have no learning rate.")
        self.names, self.until, self.lr = names, until, lr
        self._trained: list[str] = []

    def is_frozen(self, name: str, epoch: int) -> bool:
        """Whether this callback freezes a parameter in an epoch."""
        is_named = self._match(name) > 0
        return is_named and (self.until is None or epoch < self.until)

    def _match(self, name: str) -> int:
        """Length of the longest of the names that a parameter is below; 0 if it is not."""
        found = (own for own in self.names if f"{name}.".startswith(f"{own}."))
        return max(map(len, found), default=0)

    def prepare(self, ctx: Context) -> None:
        """Put what is unfrozen into a parameter group of its own."""
        if self.lr is None:
            return
        rivals = [
            c for c in ctx.callbacks if isinstance(c, Freeze) and c.lr is not None
        ]
        own = {
            id(param)
            for name, param in ctx.model.named_parameters()
            if self._match(name)
            and self is max(rivals, key=lambda rival: rival._match(name))
        }
        for opt_name, opt in ctx.optimizers.items():
            for group in list(opt.param_groups):
                if own.isdisjoint(map(id, group["params"])):
                    continue
                if "lr" not in group or isinstance(opt, torch.optim.LBFGS):
                    kind = type(opt).__name__
                    msg = "Freeze(lr): expected an optimizer with a rate for each group at"
                    raise ValueError(f"{msg} {opt_name!r}, got {kind}. Leave lr out.")
                move_to_new_group(opt, group, own, self.lr)

    def check(self, ctx: Context) -> None:
        """Refuse names that the model does not have, and a fit that could not train."""
        known = [name for name, _ in ctx.model.named_parameters()]
        modules = [name for name, _ in ctx.model.named_modules() if name]
        for name in self.names:
            if not any(f"{one}.".startswith(f"{name}.") for one in known):
                guess = nearest(name, [*modules, *known])
                msg = f"Freeze({name!r}): expected a module or parameter with weights"
                raise ValueError(
                    f"{msg} of {type(ctx.model).__name__}, got none.{guess}"
                )
        state = ctx.accelerator.state_dict()
        if "stage" in state:
            msg = "Freeze: expected one device, got ranks that an engine steps."
            raise ValueError(f"{msg} Set requires_grad in the model's __init__.")
        owned = {
            opt_name: [known[n] for group in groups for n in group]
            for opt_name, groups in state["members"].items()
        }
        self._check_owned(ctx, known, {name for own in owned.values() for name in own})
        for opt_name, own in owned.items():
            if own and all(_is_frozen(ctx, name, 1) for name in own):
                msg = (
                    f"Freeze: expected something to train with {opt_name!r} in epoch 1"
                )
                raise ValueError(f"{msg}, got only frozen weights. Freeze less.")

    def _check_owned(self, ctx: Context, known: Iterable[str], owned: set[str]) -> None:
        if self.until is None or self.until > ctx.max_epochs:
            return
        for name in known:
            if self.is_frozen(name, 1) and name not in owned:
                msg = f"Freeze(until={self.until}): expected {name!r} in an optimizer"
                advice = "Give all parameters to the optimizer, also frozen ones."
                raise ValueError(f"{msg}, got it in none. {advice}")

    def on_fit_begin(self) -> None:
        """Freeze what the first epoch does not train."""
        params = self.ctx.model.named_parameters()
        self._trained = [name for name, param in params if param.requires_grad]
        self._freeze(1)

    def on_fit_end(self) -> None:
        """Leave the model as it was: the next fit may train everything."""
        params = dict(self.ctx.model.named_parameters())
        for name in self._trained:
            params[name].requires_grad_(True)
        self._trained = []

    def on_epoch_begin(self) -> None:
        self._freeze(self.ctx.epoch or 1)

    def _freeze(self, epoch: int) -> None:
        for name, param in self.ctx.model.named_parameters():
            if self.is_frozen(name, 0):
                param.requires_grad_(not _is_frozen(self.ctx, name, epoch))

    def on_train_begin(self) -> None:
        epoch = self.ctx.epoch or 1
        for name, module in self.ctx.model.named_modules():
            if isinstance(module, _BatchNorm) and self._has_frozen(name, module, epoch):
                module.eval()

    def _has_frozen(self, name: str, module: nn.Module, epoch: int) -> bool:
        """Whether all weights of a layer are frozen; one without any goes by its name."""
        names = [f"{name}.{own}" for own, _ in module.named_parameters()] or [name]
        return all(self.is_frozen(own, epoch) for own in names)


def move_to_new_group(
    opt: Any, group: dict[str, Any], moved: Collection[int], lr: float
) -> None:
    """Give some parameters of a group another learning rate, in a group of their own.

    Parameters
    ----------
    opt
        Optimizer of the group, changed in place.
    lr : > 0
        Learning rate of the new group; its other options are those of the old one.
    """
    rate = torch.full_like(group["lr"], lr) if isinstance(group["lr"], Tensor) else lr
    places = [n for n, param in enumerate(group["params"]) if id(param) in moved]
    if len(places) == len(group["params"]):
        group["lr"] = rate
        return
    new = {key: value for key, value in group.items() if key != "param_names"}
    new |= {"lr": rate, "params": [group["params"][n] for n in places]}
    if "param_names" in group:
        names = [group["param_names"][n] for n in places]
        new["params"] = list(zip(names, new["params"], strict=True))
    for key in ("params", "param_names"):
        for n in reversed(places) if key in group else ():
            del group[key][n]
    opt.add_param_group(new)


def _is_frozen(ctx: Context, name: str, epoch: int) -> bool:
    """Whether any callback freezes a parameter in an epoch."""
    frozen = (c for c in ctx.callbacks if isinstance(c, Freeze))
    return any(callback.is_frozen(name, epoch) for callback in frozen)
