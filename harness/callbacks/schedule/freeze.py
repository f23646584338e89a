"""Freezes parts of the model, and trains them from an epoch on."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.callback import Callback
from harness.context import Context
from harness.events import nearest
from harness.setup_checks import check_at_least


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

    Raises
    ------
    ValueError
        Before the first epoch, if the model has no such name, an optimizer has nothing to
        train or does not have what is unfrozen, or an engine steps the weights.

    Notes
    -----
    For another learning rate of what is unfrozen, give it its own parameter group in
    ``set_optimizers``. Schedulers and resuming then know this group from the beginning.
    """

    weight = -60  # after TrainValid

    def __init__(self, *names: str, until: int | None = None) -> None:
        if not names or not all(isinstance(name, str) for name in names):
            msg = f"Freeze(names): expected names of modules, got {names!r}."
            raise TypeError(f"{msg} Write for example Freeze('body').")
        if until is not None:
            check_at_least("Freeze(until)", until, 2, "Leave it out to freeze always.")
        self.names, self.until = names, until

    def is_frozen(self, name: str, epoch: int) -> bool:
        """Whether this callback freezes a parameter in an epoch."""
        is_named = any(f"{name}.".startswith(f"{own}.") for own in self.names)
        return is_named and (self.until is None or epoch < self.until)

    def check(self, ctx: Context) -> None:
        """Refuse names that the model does not have, and a fit that could not train."""
        assert ctx.accelerator is not None
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
        self._freeze(1)

    def on_epoch_begin(self) -> None:
        """Unfreeze what this epoch trains."""
        self._freeze(self.ctx.epoch or 1)

    def _freeze(self, epoch: int) -> None:
        for name, param in self.ctx.model.named_parameters():
            if self.is_frozen(name, 0):
                param.requires_grad_(not _is_frozen(self.ctx, name, epoch))

    def on_train_begin(self) -> None:
        """Keep the statistics of frozen BatchNorm layers."""
        epoch = self.ctx.epoch or 1
        for name, module in self.ctx.model.named_modules():
            if isinstance(module, _BatchNorm) and self._has_frozen(name, module, epoch):
                module.eval()

    def _has_frozen(self, name: str, module: nn.Module, epoch: int) -> bool:
        """Whether all weights of a layer are frozen; one without any goes by its name."""
        names = [f"{name}.{own}" for own, _ in module.named_parameters()] or [name]
        return all(self.is_frozen(own, epoch) for own in names)


def _is_frozen(ctx: Context, name: str, epoch: int) -> bool:
    """Whether any callback freezes a parameter in an epoch."""
    frozen = (c for c in ctx.callbacks if isinstance(c, Freeze))
    return any(callback.is_frozen(name, epoch) for callback in frozen)
