"""A validation: in an epoch, by steps, or an evaluation by itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from harness.checkpoint.state import get_generators
from harness.checkpoint.validation_start import mark_validation
from harness.checks.hints import add_hint
from harness.checks.model import get_method
from harness.context import Context
from harness.data.workers import iter_batches
from harness.events import FIT_EVENTS
from harness.loop.contexts import get_step
from harness.loop.handling import (
    add_handlers,
    fetch,
    report_exceptions,
    suppress_all_handled,
)
from harness.metrics.split import count_batch_values
from harness.rng import get_rng_state, set_rng_state
from harness.steps import StepContext, begin_batch, get_reader


def validate_within(ctx: StepContext) -> None:
    """Validate between two training batches; what training continues with is untouched."""
    assert ctx.train_pass is not None
    if not ctx.train_pass.is_paused:
        ctx.batch_values = None
        ctx.call_callbacks("on_train_end")
        ctx.train_pass.is_paused = True
    validate(ctx)
    ctx.training, ctx.data, ctx.iter = True, ctx.train_data, ctx.trained


def validate_last(ctx: StepContext) -> None:
    """Validate after the training of an epoch; by steps, a resume knows that it has begun."""
    if ctx.pace.unit == "step" and ctx.train_pass is not None:
        ctx.train_pass.is_due = ctx.train_pass.is_paused = True
    validate(ctx)


def validate(ctx: StepContext) -> None:
    """Validate on each set of data.

    If the user chose how often, the random state is put back, so that training does not
    depend on it.
    """
    if not ctx.valid_sets:
        return
    generators = get_generators(ctx) if ctx.pace.is_given else []
    if ctx.pace.is_given:
        ctx.train_random = get_rng_state(generators, ctx.device)
    try:
        mark_validation(ctx)
        for ctx.valid_name, ctx.valid_data in ctx.valid_sets.items():
            valid_epoch(ctx)
    finally:
        if ctx.train_random is not None:
            set_rng_state(ctx.train_random, generators, ctx.device)
            ctx.train_random = None


def valid_epoch(ctx: StepContext) -> None:
    """Make one pass over a set of validation data."""
    assert ctx.valid_data is not None
    read, fire, step = get_reader(ctx), ctx.call_callbacks, get_step(ctx)
    ctx.training, ctx.data = False, ctx.valid_data
    fire("on_valid_begin")
    with torch.no_grad(), counting_values(ctx), _advising_sanity_check(ctx):
        batches = fetch(ctx, iter_batches(ctx.valid_data))
        for number, loaded in enumerate(batches, 1):
            begin_batch(ctx, number, loaded, read)
            fire("on_valid_batch_begin")
            step()
            fire("on_valid_batch_end")
            if ctx.batch_values:
                count_batch_values(ctx)
    warn_of_silence(ctx, "valid")
    fire("on_valid_end")


def evaluate(ctx: StepContext) -> None:
    """Log the losses and metrics of ``ctx.valid_sets`` as epoch 1 of those sets."""
    add_handlers(ctx)
    with report_exceptions(ctx), suppress_all_handled(ctx):
        validate(ctx)


@contextmanager
def _advising_sanity_check(ctx: Context) -> Iterator[None]:
    """Tell, where validation fails for the first time, how to know it before an epoch."""
    try:
        yield
    except Exception as error:
        if ctx.epoch == 1 and ctx.train_data is not None:
            advice = "callbacks.SanityCheck() validates before the first epoch."
            add_hint(error, lambda: advice)
        raise


@contextmanager
def counting_values(ctx: Context) -> Iterator[None]:
    """Count what the last batch logged, also where it ends early; then no batch is open."""
    try:
        yield
    finally:
        count_batch_values(ctx)
        ctx.batch_values = None


def warn_of_silence(
    ctx: StepContext, split: str, steps: Mapping[str, int] | None = None
) -> None:
    """Warn once in a fit of an own step that steps nothing, or keeps callbacks from events.

    Parameters
    ----------
    split
        ``train`` or ``valid``.
    steps
        Steps of each optimizer before the epoch; None: it trains nothing.
    """
    if split in ctx.has_warned or get_method(ctx.model, "step") is None:
        return
    name = f"{type(ctx.model).__name__}.step"
    silent = ctx.listeners.list_silent(STEP_EVENTS[split])
    if steps is not None and steps == ctx.steps:
        msg = f"{name}: expected an optimizer step in epoch {ctx.epoch}, got none."
        advice = "Call ctx.optimize(loss), or return the loss."
    elif silent:
        msg = (
            f"{name}: expected the events of a step, got none for {', '.join(silent)}."
        )
        advice = "Call ctx.optimize(loss) in it, or ctx.call_callbacks(event)."
    else:
        return
    ctx.has_warned.add(split)
    warnings.warn(f"{msg} {advice}", stacklevel=2)


STEP_EVENTS = {
    split: [
        event
        for event in FIT_EVENTS
        if event.startswith(f"on_{split}_batch_")
        and not event.endswith(("_begin", "_end"))
    ]
    for split in ("train", "valid")
}
"""Events that a step fires, by split."""
