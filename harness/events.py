"""The events of a fit and of a prediction, in firing order, and what listens to them."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from types import FunctionType
from typing import Final

FIT_EVENTS: Final[dict[str, str]] = {
    "on_fit_begin": "once, after model, optimizers and loaders are ready",
    "on_epoch_begin": "before each epoch; `ctx.epoch` is set",
    "on_train_begin": "before a training part of an epoch; model in training mode",
    "on_train_batch_begin": "`ctx.batch` holds a training batch on the device",
    "on_train_batch_after_pred": "`ctx.pred` is set; once for each optimizer",
    "on_train_batch_after_loss": "`ctx.loss_grad` and `ctx.loss` are set",
    "on_train_batch_before_backward": "last event that can change `ctx.loss_grad`",
    "on_train_batch_before_step": "gradients of all accumulated batches are ready: clip here",
    "on_train_batch_after_step": "the optimizer has stepped: step a scheduler here",
    "on_train_batch_end": "the training batch is done",
    "on_train_end": "all training batches of the part are done; metrics are logged",
    "on_valid_begin": "before a set of validation data; model in evaluation mode",
    "on_valid_batch_begin": "`ctx.batch` holds a validation batch on the device",
    "on_valid_batch_after_pred": "`ctx.pred` is set",
    "on_valid_batch_after_loss": "`ctx.loss` is set",
    "on_valid_batch_end": "the validation batch is done",
    "on_valid_end": "all batches of the set are done; metrics are logged",
    "on_epoch_end": "metrics of the epoch are logged: decide, save or print here",
    "on_fit_end": "once, after the last epoch, and after an early stop or interrupt",
}
"""Events of ``fit`` and when they fire; ``evaluate`` fires the validation ones."""

PREDICT_EVENTS: Final[dict[str, str]] = {
    "on_predict_begin": "once, before the first batch; model in evaluation mode",
    "on_predict_batch_begin": "`ctx.batch` holds a batch on the device",
    "on_predict_batch_end": "`ctx.pred` is set",
    "on_predict_end": "once, after the last batch",
}
"""Events of ``predict`` and when they fire."""

EXTRA_EVENTS: Final[dict[str, str]] = {
    "on_interrupt": "after a signal such as Ctrl-C ended the fit at the end of a batch",
    "on_early_stopping": "after `EarlyStop` ended the fit",
    "on_exception": "before an exception leaves the loop, in every callback",
}
"""Events that fire at any time."""

EVENTS: Final[dict[str, str]] = {**FIT_EVENTS, **PREDICT_EVENTS, **EXTRA_EVENTS}
"""All events; the key is the name of the callback's method."""


WITH_GRADIENTS: Final = frozenset(
    {
        "on_train_batch_after_pred",
        "on_train_batch_after_loss",
        "on_train_batch_before_backward",
    }
)
"""Events between forward and backward. Callbacks run with gradients only in these."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the most similar choice, or an empty string.

    Initials are similar too, such as ``lr`` to ``learning_rate``.
    """
    choices = [choice for choice in choices if choice != name]
    found = difflib.get_close_matches(name, choices, n=1)
    found += [c for c in choices if c == _initials(name) or _initials(c) == name]
    return f" Did you mean {found[0]!r}?" if found else ""


def _initials(name: str) -> str:
    return "".join(word[:1] for word in name.split("_"))


def check_event(place: str, name: str, own: Iterable[str] = ()) -> None:
    """Check that `name` is an event.

    Parameters
    ----------
    own
        Events that callbacks have declared.
    """
    own = list(own)
    if name not in EVENTS and name not in own:
        msg = (
            f"{place}: expected an event, got {name!r}.{nearest(name, [*EVENTS, *own])}"
        )
        advice = (
            "harness.events.EVENTS lists all events. A callback declares its own in"
        )
        raise ValueError(f"{msg} {advice} 'events'.")


def check_own_events(place: str, names: object) -> None:
    """Check the events that a class of callbacks declares."""
    is_list = isinstance(names, tuple | list)
    if not is_list or not all(isinstance(name, str) for name in names):  # type: ignore[attr-defined]
        msg = f"{place}.events: expected a tuple of names, got {names!r}."
        raise TypeError(f'{msg} Write for example ("on_my_event",).')
    for name in names:  # type: ignore[attr-defined]
        if not name.startswith("on_") or not name.isidentifier() or name in EVENTS:
            what = "a name that is new and begins with 'on_'"
            raise ValueError(
                f"{place}.events: expected {what}, got {name!r}. Rename it."
            )


def check_listeners(cls: type) -> None:
    """Check that the methods of a class of callbacks for events need no arguments."""
    for name, method in vars(cls).items():
        if name.startswith("on_") and isinstance(method, FunctionType):
            _, *parameters = inspect.signature(method).parameters.values()
            needed = [
                one.name
                for one in parameters
                if one.default is one.empty
                and one.kind not in {one.VAR_POSITIONAL, one.VAR_KEYWORD}
            ]
            if needed:
                msg = f"{cls.__name__}.{name}: expected no arguments but self, got"
                advice = "The model, the batch and all else are fields of self.ctx."
                raise TypeError(f"{msg} {', '.join(needed)}. {advice}")
