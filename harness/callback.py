"""Base class of callbacks, and how events and the context reach them and the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from harness.errors import EarlyStop, Interrupted, Signal
from harness.events import (
    EVENTS,
    WITH_GRADIENTS,
    check_event,
    check_listeners,
    check_own_events,
)
from harness.pytree import StateDict

if TYPE_CHECKING:
    from torch import nn

    from harness.context import Context


class Callback:
    """Something that acts on named events of a fit, an evaluation or a prediction.

    Define a method for each event that you need. Inside it, ``self.ctx`` is the context.
    Keep only your own counters on ``self``: everything shared lives in the context.

    Gradients are off in these methods, except in the three events between forward and
    backward (``harness.events.WITH_GRADIENTS``), where ``ctx.loss_grad`` may be changed. A
    callback that computes gradients in another event does it in ``torch.enable_grad()``.

    Attributes
    ----------
    weight : float
        Callbacks run in ascending order of weight, ties in the order given. Callbacks that
        others build on (train/valid mode, metrics) have weights below 0, displays above 0.
    event_weights : dict
        Other weights at single events, by their names.
    events : tuple of str
        Your own events, such as ``("on_my_event",)``, which a class fires or listens to.
        ``ctx.call_callbacks`` fires them, without gradients.
    ctx : Context
        Set before the first event.

    Raises
    ------
    ValueError
        When the class is defined, if a method named ``on_...`` is not an event.

    References
    ----------
    luz 0.5.0, ``luz_callback``. Differs from luz: an unknown event is an error.

    Examples
    --------
    >>> class Announce(Callback):
    ...     weight = 10
    ...
    ...     def on_epoch_end(self) -> None:
    ...         print(self.ctx.epoch, self.ctx.get_metric("loss", "train"))
    """

    weight: float = 0
    event_weights: Mapping[str, float] = MappingProxyType({})
    events: Sequence[str] = ()
    ctx: Context

    def __init_subclass__(cls, **kwargs: object) -> None:
        super().__init_subclass__(**kwargs)
        place = f"class {cls.__name__}"
        check_own_events(place, cls.events)
        own = _list_own_events(cls)
        for name in [*vars(cls), *cls.event_weights]:
            if name.startswith("on_") or name in cls.event_weights:
                check_event(place, name, own)
        check_listeners(cls)

    def __getattr__(self, name: str) -> Any:
        """Refuse an attribute that is not there; say when ``ctx`` is."""
        inherited = getattr(super(), "__getattr__", None)
        if inherited is not None:  # of a callback that is a module too
            return inherited(name)
        msg = f"{type(self).__name__!r} object has no attribute {name!r}"
        if name == "ctx":
            msg += ": it is there in events, and not in __init__"
        raise AttributeError(msg, name=name, obj=self)

    def prepare(self, ctx: Context) -> None:
        """Change the model or the optimizers of a fit before the accelerator takes them.

        Called once for each callback when the optimizers are built. This is the place to
        add parameter groups or set their options, to freeze parameters, or to put other
        optimizers into ``ctx.optimizers``. Engines take over what it leaves, and a resume is
        compared with it. The default changes nothing.

        Parameters
        ----------
        ctx
            Context of the fit. ``ctx.model`` and ``ctx.optimizers`` are the user's own, on
            the device where they were made; data and records are not there yet.
        """

    def check(self, ctx: Context) -> None:
        """Refuse a fit that this callback cannot work in.

        Called once for each callback before the first epoch of a fit, with the finished
        context. Override it to raise where something is missing, such as a monitored metric
        or validation data. The default accepts everything.

        Parameters
        ----------
        ctx
            Context of the fit; no event has fired yet.
        """

    def after_fit(self) -> None:
        """Act on a finished fit; this is not an event.

        ``fit`` calls it when every rank has its result, just before it returns. So this is
        the place to delete what only an unfinished fit needs. An exception becomes a
        warning, because the result must reach the caller.
        """

    def state_dict(self) -> StateDict:
        """Return what a checkpoint keeps: numbers, strings, tensors, lists and dicts."""
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what ``state_dict`` returned."""


def _list_own_events(cls: type) -> set[str]:
    """Events that a class of callbacks and its bases declare."""
    return {name for base in cls.__mro__ for name in vars(base).get("events", ())}


def _list_declared(cls: type[Callback] = Callback) -> set[str]:
    """Events that any class of callbacks declares."""
    below = [_list_declared(kind) for kind in cls.__subclasses__()]
    events = vars(cls).get("events", ())
    # Those of a class that has not been refused yet may be anything.
    own = events if isinstance(events, list | tuple | set | frozenset) else ()
    return {event for event in own if isinstance(event, str)}.union(*below)


class MetricsListener(Callback):
    """Base of callbacks that act when the metrics of a fit are complete.

    That is at the end of each epoch. In a fit that validates by steps, it is after each
    validation, when the last set of validation data is done.
    """

    def react(self) -> None:
        """Act on the metrics that are logged at ``ctx.index``."""

    def on_epoch_end(self) -> None:
        """React, unless the fit validates by steps."""
        if self.ctx.pace.unit == "epoch":
            self.react()

    def on_valid_end(self) -> None:
        """React after the last set, if the fit validates by steps."""
        if self.ctx.pace.unit == "step" and self._is_last_set:
            self.react()

    @property
    def _is_last_set(self) -> bool:
        return self.ctx.valid_name == next(reversed(self.ctx.valid_sets))


class Listeners:
    """Methods of callbacks that listen to each event.

    Parameters
    ----------
    callbacks
        In running order.

    Attributes
    ----------
    guard
        Entered around the listeners of an event; None for nothing.
    silent : frozenset of str
        Events that nobody listens to.
    """

    def __init__(self, callbacks: Iterable[Callback] = ()) -> None:
        callbacks = tuple(callbacks)
        self.guard: AbstractContextManager[object] | None = None
        self._fired: set[str] = set()
        own = {name for item in callbacks for name in _list_own_events(type(item))}
        self._by_event: dict[str, tuple[Callable[[], object], ...]] = {
            event: tuple(
                getattr(callback, event)
                for callback in sorted(callbacks, key=partial(_weight_at, event))
                if hasattr(callback, event)
            )
            for event in (*EVENTS, *own)
        }
        self.silent = frozenset(
            event for event, methods in self._by_event.items() if not methods
        )

    def list_silent(self, events: Iterable[str]) -> list[str]:
        """List the methods that listen to these events and were never called."""
        return [
            f"{type(getattr(method, '__self__', method)).__name__}.{event}"
            for event in events
            if event not in self._fired
            for method in self._by_event[event]
        ]

    def call(self, event: str) -> None:
        """Call all listeners of an event, without gradients except between forward and backward.

        A signal is raised again when all have been called, ``EarlyStop`` before others. Any
        other exception leaves at once, with a note that names the callback and the event;
        at ``on_exception``, where callbacks put things back, after all have been called.
        ``Interrupted`` gives way to a signal: the fit then ends after the next batch.
        """
        listeners = self._by_event.get(event)
        if not listeners:
            if listeners is None:
                check_event("call_callbacks", event, _list_declared())
            return
        self._fired.add(event)
        if self.guard is not None:
            with (
                self.guard,
                torch.set_grad_enabled(
                    event in WITH_GRADIENTS and torch.is_grad_enabled()
                ),
            ):
                self._call_each(listeners, event)
            return
        if event in WITH_GRADIENTS or not torch.is_grad_enabled():
            self._call_each(listeners, event)
            return
        torch.set_grad_enabled(False)  # no_grad() takes twice the time
        try:
            self._call_each(listeners, event)
        finally:
            torch.set_grad_enabled(True)

    def _call_each(self, listeners: Iterable[Callable[[], object]], event: str) -> None:
        raised: Signal | None = None
        failed: Exception | None = None
        for listener in listeners:
            try:
                listener()
            except Signal as signal:
                if raised is None or isinstance(signal, EarlyStop):
                    raised = signal
            except Interrupted:
                # The end of an epoch or fit comes first: a resume would not know of it.
                if raised is None:
                    raise
            except Exception as exc:
                callback: Callback = listener.__self__  # type: ignore[attr-defined]
                callback.ctx.add_note(exc, f"{type(callback).__name__}.{event}")
                if event != "on_exception":
                    raise
                failed = failed or exc
        if failed is not None:
            raise failed
        if raised is not None:
            raise raised


def _weight_at(event: str, callback: Callback) -> float:
    return callback.event_weights.get(event, callback.weight)


def get_context(model: nn.Module | None) -> Context | None:
    """Return the context that a model is bound to; None without one."""
    found: Context | None = getattr(model, "ctx", None)
    return found if hasattr(found, "call_callbacks") else None


def bind_context(model: nn.Module | None, ctx: Context | None) -> None:
    """Set ``ctx`` of a model, and of the user's own module inside a compiled one.

    None removes it. What a forward has stored under this name stays.
    """
    while model is not None:
        found = getattr(model, "ctx", None)
        is_bound = hasattr(found, "call_callbacks")
        if ctx is None and is_bound:
            model.__dict__.pop("ctx", None)
        is_free = found is None and "ctx" not in model.__dict__
        if ctx is not None and (is_bound or is_free):
            model.__dict__["ctx"] = ctx
        # torch 2.13, OptimizedModule: the methods of the user's module see only that one.
        # A scripted module has another kind of mapping, which only tells what it contains.
        modules = model.__dict__.get("_modules", {})
        model = model.get_submodule("_orig_mod") if "_orig_mod" in modules else None
