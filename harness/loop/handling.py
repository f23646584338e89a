"""How a loop ends early: exceptions that have a handler, signals, and notes on errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from harness.checks.hints import add_hint, find_loader_hint, find_state_hint
from harness.context import Context, Handlers
from harness.errors import EarlyStop, Interrupted, SkipEpoch


def add_handlers(ctx: Context) -> None:
    """Add the handlers of signals to those of the user."""
    ctx.handlers |= {EarlyStop: lambda _: ctx.call_callbacks("on_early_stopping")}
    ctx.handlers |= {Interrupted: lambda _: ctx.call_callbacks("on_interrupt")}
    ctx.epoch_handlers |= {SkipEpoch: lambda _: None}


@contextmanager
def noting_interrupt(ctx: Context) -> Iterator[None]:
    """Note in the context which signal ends the fit, before a handler runs."""
    try:
        yield
    except Interrupted as exc:
        ctx.stop_signal = exc.signum
        raise


@contextmanager
def suppress_all_handled(ctx: Context) -> Iterator[None]:
    """Suppress what has a handler in an evaluation or prediction, which is one epoch."""
    whole, epoch = (lambda: ctx.handlers), (lambda: ctx.epoch_handlers)
    with suppress_handled(ctx, whole), suppress_handled(ctx, epoch):
        yield


@contextmanager
def suppress_handled(
    ctx: Context, get_handlers: Callable[[], Handlers]
) -> Iterator[None]:
    """Suppress exceptions that have a registered handler, after calling the handler."""
    try:
        yield
    except BaseException as exc:
        handlers = get_handlers()
        kinds = (kind for kind in handlers if isinstance(exc, kind))
        kind = next(kinds, None)
        if kind is None:
            raise
        place = f"epoch {ctx.epoch}, batch {ctx.iter}"
        ctx.accelerator.meet(f"{type(exc).__name__} in {place}")
        handlers[kind](exc)


@contextmanager
def report_exceptions(ctx: Context) -> Iterator[None]:
    """Fire ``on_exception`` for an exception, and add a note of where it happened."""
    try:
        yield
    except BaseException as exc:
        notes = getattr(exc, "__notes__", [])
        has_note = any(note.startswith("in ") for note in notes)
        if isinstance(exc, Exception) and not has_note:
            ctx.add_note(exc, "the loop")
        add_hint(exc, find_state_hint, exc)
        ctx.call_callbacks("on_exception")
        raise


def fetch(ctx: Context, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches; if they fail after a signal, end the fit as the signal asks.

    A signal to the whole process group may have ended what the loader reads from. On several
    ranks the error stays, because the other ranks do not know of it.
    """
    try:
        yield from batches
    except Exception as error:
        signum = ctx.buffers.get("signal")
        after = f", after batch {ctx.trained}" if ctx.training else ""
        error.add_note(
            f"in the loader of {ctx.split} batches, epoch {ctx.epoch}{after}"
        )
        add_hint(error, find_loader_hint, error)
        if signum is None or ctx.accelerator.world_size > 1:
            raise
        raise Interrupted(signum) from error
