"""Originals of a model and a loss that a fit copies, which a program may use by mistake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from harness.callback import Callback
from harness.checkpoint.held.search import find_loss_modules, list_references
from harness.checkpoint.held.values import SCALARS
from harness.checks.calls import warn_user
from harness.checks.optimizers import is_user_defined


@dataclass(frozen=True)
class Originals:
    """What a fit has copied, because the user may hold it.

    Attributes
    ----------
    by_field
        Modules, by the field of the context that has the copies; without those of torch,
        whose attributes nobody changes.
    model
        The original of the model; None if it is no copy.
    """

    by_field: Mapping[str, list[nn.Module]]
    model: nn.Module | None


def find_originals(
    original: nn.Module, model: nn.Module, given: object, loss: object
) -> Originals:
    """Find what a fit has copied.

    Parameters
    ----------
    original, model
        What the user's function has returned, and the model of the fit.
    given, loss
        The loss as passed to ``setup``, and that of this fit.
    """
    models = [] if original is model else [*original.modules()]
    tops = [] if loss is given else find_loss_modules(given, model)
    losses = [part for top in tops for part in top.modules()]
    if all(type(part).__module__.startswith("torch.") for part in losses):
        losses = []
    found = {"ctx.model": models, "ctx.loss_fn": losses}
    by_field = {field: modules for field, modules in found.items() if modules}
    return Originals(by_field, None if original is model else original)


@contextmanager
def refuse_gradients(originals: Originals) -> Iterator[None]:
    """Refuse a backward that computes gradients of the original of a model.

    Raises
    ------
    ValueError
        In the backward, if the loss, or a hook or step, uses the original.
    """
    hook: Any = Tensor.register_post_accumulate_grad_hook
    params = [] if originals.model is None else [*originals.model.parameters()]
    trained = [param for param in params if param.requires_grad]
    handles = [hook(param, lambda _: _refuse(originals)) for param in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_parameters_of_loss(params: Iterable[Tensor], originals: Originals) -> None:
    """Check that a loss, as passed to ``setup``, has no part of what a fit has copied to train.

    A loss that is an object is copied too, and would have a model of its own.
    """
    if originals.model is None:
        return
    own = set(map(id, originals.model.parameters()))
    if any(param.requires_grad and id(param) in own for param in params):
        _refuse(originals)


def _refuse(originals: Originals) -> None:
    kind = type(originals.model).__name__
    msg = "loss: expected gradients of the model of this fit only, got some of the"
    why = f"{kind} that setup was called with, which each fit copies."
    advice = "Write the loss as a method of the model, or use ctx.model in a callback."
    fixed = "For fixed weights, use copy.deepcopy(model)."
    raise ValueError(f"{msg} {why} {advice} {fixed}")


def warn_of_references(
    originals: Originals, callbacks: Iterable[Callback], data: object
) -> None:
    """Warn of the user's callbacks and data that refer to what a fit trains a copy of."""
    trained = {
        field: {id(part) for part in modules if _has_trained(part)}
        for field, modules in originals.by_field.items()
    }
    if not any(trained.values()):
        return
    dataset = getattr(data, "dataset", None)
    users = [callback for callback in callbacks if is_user_defined(callback)]
    for user in [*users, getattr(dataset, "dataset", dataset)]:
        seen = list_references(user)
        for field, own in trained.items():
            if not seen.isdisjoint(own):
                expected = f"{type(user).__name__}: expected it to use {field}"
                _warn(expected, originals, field)


def _has_trained(module: nn.Module) -> bool:
    return any(param.requires_grad for param in module.parameters(recurse=False))


def _warn(expected: str, originals: Originals, field: str) -> None:
    kind = type(originals.by_field[field][0]).__name__
    msg = f"{expected}, got the {kind} that setup was called with."
    why = "Each fit uses a copy of it, and the original stays as it is."
    warn_user(f"{msg} {why} Use {field}.")


class WatchOriginals(Callback):
    """Warns if an original is changed during a fit, which uses a copy."""

    weight = 900  # after the user's callbacks

    def __init__(self, originals: Originals) -> None:
        self._originals = originals
        self._before = _describe(originals)

    def on_train_begin(self) -> None:
        """Compare the originals with what they were."""
        now = _describe(self._originals)
        for field, found in now.items():
            before = self._before[field]
            changed = [key for key in found if found[key] != before.get(key)]
            if changed:
                name = changed[0].partition(" ")[2]
                expected = f"{field}: expected a change of {name} there"
                _warn(expected, self._originals, field)
        self._before = now

    def on_train_end(self) -> None:
        """As before the epoch."""
        self.on_train_begin()


def _describe(originals: Originals) -> dict[str, dict[str, object]]:
    """Plain attributes, and which parameters are trained, by field and name."""
    return {
        field: {
            f"{n} {name}": value
            for n, module in enumerate(modules)
            for name, value in _list_values(module)
        }
        for field, modules in originals.by_field.items()
    }


def _list_values(module: nn.Module) -> Iterator[tuple[str, object]]:
    for name, value in vars(module).items():
        if type(value) in SCALARS and name != "training":
            yield name, value
    for name, param in module._parameters.items():
        if param is not None:
            yield f"{name}.requires_grad", param.requires_grad
