"""The loops: fit, evaluate, predict. Everything else hangs on the events fired here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from harness.context import Context, Handlers
from harness.data.train_pass import TrainPass
from harness.errors import EarlyStop, Interrupted, SkipEpoch
from harness.metrics.split import detach, each_tensor
from harness.steps import call_model, default_step


def fit(ctx: Context) -> None:
    """Train and validate, epoch by epoch, until ``ctx.max_epochs`` or a handled exception.

    References
    ----------
    luz 0.5.0, ``fit.luz_module_generator``.
    """
    ctx.handlers |= {EarlyStop: lambda _: ctx.call_callbacks("on_early_stopping")}
    ctx.handlers |= {Interrupted: lambda _: ctx.call_callbacks("on_interrupt")}
    ctx.epoch_handlers |= {SkipEpoch: lambda _: None}
    with told(ctx):
        with handled(lambda: ctx.handlers):
            ctx.call_callbacks("on_fit_begin")
            for ctx.epoch in range(first_epoch(ctx), ctx.max_epochs + 1):
                with handled(lambda: ctx.epoch_handlers):
                    ctx.call_callbacks("on_epoch_begin")
                    train_epoch(ctx)
                    if ctx.valid_data is not None:
                        valid_epoch(ctx)
                    ctx.call_callbacks("on_epoch_end")
        ctx.call_callbacks("on_fit_end")


def train_epoch(ctx: Context) -> None:
    """The training part of an epoch."""
    assert ctx.accelerator is not None
    to_device, fire, step = ctx.accelerator.to_device, ctx.call_callbacks, step_of(ctx)
    ctx.training, ctx.data, ctx.trained = True, ctx.train_data, 0
    ctx.train_pass = TrainPass(ctx.train_data, ctx.accelerator, ctx.epoch or 1)
    fire("on_train_begin")
    is_over = ctx.resume is not None and ctx.resume.position.phase == "valid"
    batches = begin_pass(ctx)
    for ctx.iter, batch in enumerate(batches, start=ctx.trained + 1):
        ctx.batch, ctx.loss = to_device(batch), {}
        fire("on_train_batch_begin")
        step()
        ctx.trained = ctx.iter
        fire("on_train_batch_end")
    if not is_over:
        fire("on_train_end")


def valid_epoch(ctx: Context) -> None:
    """The validation part of an epoch, or an evaluation."""
    assert ctx.accelerator is not None and ctx.valid_data is not None
    to_device, fire, step = ctx.accelerator.to_device, ctx.call_callbacks, step_of(ctx)
    ctx.training, ctx.data = False, ctx.valid_data
    ctx.mark_validation()
    fire("on_valid_begin")
    with torch.no_grad():
        for ctx.iter, batch in enumerate(ctx.valid_data, start=1):
            ctx.batch, ctx.loss = to_device(batch), {}
            fire("on_valid_batch_begin")
            step()
            fire("on_valid_batch_end")
    fire("on_valid_end")


def evaluate(ctx: Context) -> None:
    """Losses and metrics of ``ctx.valid_data``, logged as epoch 1 of the set ``valid``."""
    with told(ctx):
        valid_epoch(ctx)


def predict(ctx: Context) -> list[Any]:
    """The model's output for each batch of ``ctx.data``, all ranks' rows, detached."""
    assert ctx.accelerator is not None and ctx.data is not None
    own = getattr(ctx.model, "predict", None)
    preds = []
    with told(ctx), torch.no_grad():
        ctx.call_callbacks("on_predict_begin")
        for ctx.iter, batch in enumerate(ctx.data, start=1):
            ctx.batch = ctx.accelerator.to_device(batch)
            ctx.call_callbacks("on_predict_batch_begin")
            ctx.pred = own(ctx.input) if own else call_model(ctx.model, ctx.input)
            ctx.call_callbacks("on_predict_batch_end")
            preds.append(each_tensor(detach(ctx.pred), ctx.accelerator.gather))
        ctx.call_callbacks("on_predict_end")
    return preds


def step_of(ctx: Context) -> Callable[[], object]:
    """The model's own ``step``, else the default one."""
    own = getattr(ctx.model, "step", None)
    return own or (lambda: default_step(ctx))


def first_epoch(ctx: Context) -> int:
    """The epoch to begin with; what a checkpoint has is put back here or in ``begin_pass``."""
    resume = ctx.resume
    if resume is None:
        return 1
    if resume.is_exact and resume.position.phase != "epoch":
        return int(resume.position.epoch)
    ctx.resume = None
    resume.restore(ctx)
    if not resume.is_exact:
        return 1
    resume.restore_random(ctx)
    return int(resume.position.epoch) + 1


def begin_pass(ctx: Context) -> Iterator[Any]:
    """The training batches of the epoch, or those that a checkpoint left over."""
    resume, ctx.resume = ctx.resume, None
    if resume is None:
        return ctx.train_pass.start()  # type: ignore[no-any-return]
    resume.restore(ctx)
    ctx.trained = resume.position.iter
    if resume.position.phase == "valid":
        resume.restore_random(ctx)
        return iter(())
    ctx.train_pass.load_state_dict(resume.state(ctx)["pass"], ctx.trained)
    batches = ctx.train_pass.start()
    resume.restore_random(ctx)
    return batches  # type: ignore[no-any-return]


@contextmanager
def handled(get_handlers: Callable[[], Handlers]) -> Iterator[None]:
    """End the block quietly on an exception that a handler is for, after it ran."""
    try:
        yield
    except BaseException as exc:
        handlers = get_handlers()
        kinds = (kind for kind in handlers if isinstance(exc, kind))
        kind = next(kinds, None)
        if kind is None:
            raise
        handlers[kind](exc)


@contextmanager
def told(ctx: Context) -> Iterator[None]:
    """Fire ``on_exception`` for what leaves the block, and note where it happened."""
    try:
        yield
    except BaseException as exc:
        notes = getattr(exc, "__notes__", [])
        is_told = any(", epoch " in note for note in notes)
        if isinstance(exc, Exception) and not is_told:
            ctx.add_note(exc, "the loop")
        ctx.call_callbacks("on_exception")
        raise
