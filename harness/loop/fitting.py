"""The loop of a fit: epochs, and the training in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from harness.checkpoint.state import get_generators, get_pass_generators, mark_pass
from harness.context import Context
from harness.data.pace import NO_LIMIT, validates_now
from harness.data.train_pass import TrainPass
from harness.loop.contexts import get_step
from harness.loop.handling import (
    add_handlers,
    fetch,
    noting_interrupt,
    report_exceptions,
    suppress_handled,
)
from harness.loop.validation import (
    counting_values,
    validate_last,
    validate_within,
    warn_of_silence,
)
from harness.metrics.split import count_batch_values
from harness.rng import get_rng_state
from harness.steps import StepContext, begin_batch, get_reader, switch_optimizers


def fit(ctx: StepContext) -> None:
    """Train and validate, until the last epoch or step, or a handled exception.

    References
    ----------
    luz 0.5.0, ``fit.luz_module_generator``.
    """
    add_handlers(ctx)
    run_callback_checks(ctx)
    # Gradients are off where it is called in an event of another fit.
    with torch.enable_grad(), report_exceptions(ctx):
        with suppress_handled(ctx, lambda: ctx.handlers), noting_interrupt(ctx):
            ctx.call_callbacks("on_fit_begin")
            for ctx.epoch in iter_epochs(ctx):
                with suppress_handled(ctx, lambda: ctx.epoch_handlers):
                    begin_epoch(ctx)
                    train_epoch(ctx)
                    if validates_now(ctx):
                        validate_last(ctx)
                    ctx.call_callbacks("on_epoch_end")
                    continue
                drop_gradients(ctx)
        drop_gradients(ctx)
        ctx.call_callbacks("on_fit_end")


def iter_epochs(ctx: Context) -> Iterator[int]:
    """Yield the epochs of a fit; after a resume, from the one that it continues with."""
    epoch, num_idle = start_epoch(ctx), 0
    while epoch <= ctx.max_epochs and not ctx.pace.is_over(ctx.step):
        before = ctx.accelerator.num_backwards, ctx.step
        yield epoch
        is_idle = before == (ctx.accelerator.num_backwards, ctx.step)
        num_idle = num_idle + 1 if is_idle else 0
        if num_idle == MAX_IDLE and ctx.max_epochs == NO_LIMIT:
            msg = f"fit(max_steps): expected optimizer steps, got none in {MAX_IDLE}"
            advice = "The data may be exhausted: pass data that can be read again."
            raise ValueError(f"{msg} epochs. {advice}")
        epoch += 1


MAX_IDLE = 3
"""Epochs without a step after which a fit ends that waits for steps alone."""


def begin_epoch(ctx: StepContext) -> None:
    """Fire ``on_epoch_begin`` with nothing of the epoch before, as after a resume."""
    ctx.iter = ctx.batch = ctx.pred = ctx.loss = ctx.loss_grad = None
    ctx.training = True
    if ctx.resume is not None:
        ctx.resume.restore_before_epoch(ctx)
    if ctx.is_saved:
        ctx.epoch_start = get_rng_state(get_generators(ctx), ctx.device)
    ctx.call_callbacks("on_epoch_begin")


def train_epoch(ctx: StepContext) -> None:
    """Train on all batches of an epoch, with the validations that are due within it."""
    read, fire, step = get_reader(ctx), ctx.call_callbacks, get_step(ctx)
    ctx.training, ctx.data, ctx.trained = True, ctx.train_data, 0
    pace = ctx.pace
    by_steps, is_limited = pace.unit == "step", pace.max_steps is not None
    train_pass = TrainPass(
        ctx.train_data,
        ctx.accelerator,
        ctx.epoch or 1,
        get_pass_generators(ctx) if ctx.is_saved or ctx.resume is not None else None,
        is_saved=ctx.is_saved,
        is_after_end=ctx.is_data_at_end,
    )
    ctx.train_pass, ctx.is_data_at_end = train_pass, False
    fire("on_train_begin")
    is_whole, before = ctx.resume is None, dict(ctx.steps)
    phase = None if ctx.resume is None else ctx.resume.position.phase
    batches = start_batches(ctx)
    is_closed = phase == "valid" and not train_pass.is_paused
    if train_pass.is_due and not (phase == "train" and train_pass.is_paused):
        # It was due, or was interrupted, when the checkpoint was taken.
        validate_within(ctx)
    ctx.iter = ctx.trained or None
    with counting_values(ctx):
        for number, loaded in enumerate(fetch(ctx, batches), start=ctx.trained + 1):
            if train_pass.is_paused:
                train_pass.is_paused, ctx.iter = False, number
                fire("on_train_begin")
            begin_batch(ctx, number, loaded, read)
            at = ctx.step if by_steps else 0
            fire("on_train_batch_begin")
            step()
            ctx.trained = number
            if by_steps:
                train_pass.is_due = pace.is_crossed(at, ctx.step)
            fire("on_train_batch_end")
            if ctx.batch_values:
                count_batch_values(ctx)
            if train_pass.is_due:
                validate_within(ctx)
            if is_limited and pace.is_over(ctx.step):
                break
    ctx.accelerator.drop_window()
    ctx.is_data_at_end = train_pass.is_at_end
    if is_whole:
        warn_of_silence(ctx, "train", before)
    if not train_pass.is_paused and not is_closed:
        fire("on_train_end")


def start_epoch(ctx: Context) -> int:
    """Return the first epoch to run, after restoring a checkpoint taken between epochs.

    A checkpoint taken inside an epoch is restored by ``start_batches``.
    """
    resume = ctx.resume
    if resume is None:
        return 1
    if resume.is_exact and resume.position.phase != "epoch":
        return int(resume.position.epoch)
    ctx.resume = None
    resume.restore(ctx)
    if not resume.is_exact:
        return 1
    resume.restore_data(ctx)
    resume.restore_random(ctx)
    return int(resume.position.epoch) + 1


def start_batches(ctx: Context) -> Iterator[Any]:
    """Return the training batches of the epoch; after a resume, only the remaining ones."""
    resume, ctx.resume = ctx.resume, None
    train_pass = ctx.train_pass
    assert train_pass is not None
    if resume is None:
        mark_pass(ctx)
        return train_pass.start()
    if resume.is_after_training(ctx):
        switch_optimizers(ctx, is_training=False)  # as they were when it was saved
    resume.restore(ctx)
    ctx.trained = resume.position.iter
    if resume.position.phase == "valid" and not resume.has_pass(ctx):
        resume.restore_data(ctx)
        resume.restore_random(ctx)
        return iter(())
    resume.restore_pass(ctx)
    mark_pass(ctx)
    batches = train_pass.start()
    resume.restore_random(ctx)
    # The saved fit may have ended by a number of steps.
    return iter(()) if ctx.pace.is_over(ctx.step) else batches


def drop_gradients(ctx: Context) -> None:
    """Clear what an epoch leaves behind that was ended early."""
    ctx.accelerator.drop_window()
    for opt in ctx.optimizers.values():
        opt.zero_grad()


def run_callback_checks(ctx: Context) -> None:
    """Let each callback refuse a fit that it cannot work in."""
    for callback in ctx.callbacks:
        try:
            callback.check(ctx)
        except Exception as exc:
            exc.add_note(f"in {type(callback).__name__}.check, before the first epoch")
            raise
