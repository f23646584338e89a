"""The loops: fit, evaluate, predict. Everything else hangs on the events fired here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch

from harness.context import Context, Handlers
from harness.data import num_batches
from harness.errors import EarlyStop, SkipEpoch
from harness.metrics import detach
from harness.steps import call_model, default_step


def fit(ctx: Context) -> None:
    """Train and validate, epoch by epoch, until ``ctx.max_epochs`` or a handled exception.

    References
    ----------
    luz 0.5.0, ``fit.luz_module_generator``.
    """
    ctx.handlers |= {EarlyStop: lambda _: ctx.call_callbacks("on_early_stopping")}
    ctx.handlers |= {KeyboardInterrupt: lambda _: ctx.call_callbacks("on_interrupt")}
    ctx.epoch_handlers |= {SkipEpoch: lambda _: None}
    with told(ctx):
        with handled(ctx.handlers):
            ctx.call_callbacks("on_fit_begin")
            for ctx.epoch in range(1, ctx.max_epochs + 1):
                with handled(ctx.epoch_handlers):
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
    ctx.training, ctx.data = True, ctx.train_data
    fire("on_train_begin")
    for ctx.iter, batch in enumerate(train_batches(ctx), start=1):
        ctx.batch, ctx.loss = to_device(batch), {}
        fire("on_train_batch_begin")
        step()
        fire("on_train_batch_end")
    fire("on_train_end")


def valid_epoch(ctx: Context) -> None:
    """The validation part of an epoch, or an evaluation."""
    assert ctx.accelerator is not None and ctx.valid_data is not None
    to_device, fire, step = ctx.accelerator.to_device, ctx.call_callbacks, step_of(ctx)
    ctx.training, ctx.data = False, ctx.valid_data
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
    """The model's output for each batch of ``ctx.data``, detached."""
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
            preds.append(detach(ctx.pred))
        ctx.call_callbacks("on_predict_end")
    return preds


def step_of(ctx: Context) -> Callable[[], object]:
    """The model's own ``step``, else the default one."""
    own = getattr(ctx.model, "step", None)
    return own or (lambda: default_step(ctx))


def train_batches(ctx: Context) -> Iterator[Any]:
    """The training batches; the accelerator learns how many the present step averages.

    Without a length the batches of a window are fetched together, to know a short last one.
    """
    accelerator, loader = ctx.accelerator, ctx.train_data
    assert accelerator is not None and loader is not None
    if accelerator.accumulate == 1:
        yield from loader
        return
    left, batches = num_batches(loader), iter(loader)
    group: Iterable[Any]
    while left is None or left > 0:
        if left is None:
            group = fetched = list(islice(batches, accelerator.accumulate))
            size = len(fetched)
        else:
            size = min(accelerator.accumulate, left)
            group, left = islice(batches, size), left - size
        if size == 0:
            return
        accelerator.window = size
        yield from group


@contextmanager
def handled(handlers: Handlers) -> Iterator[None]:
    """End the block quietly on an exception that a handler is for, after it ran."""
    try:
        yield
    except BaseException as exc:
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
    except Exception as exc:
        if not getattr(exc, "__notes__", None):
            ctx.add_note(exc, "the model's step")
        ctx.call_callbacks("on_exception")
        raise
