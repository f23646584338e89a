"""One batch: prediction, loss, backward, optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from harness.accelerators.base import default_step_opt
from harness.context import Context


def call_model(model: Callable[..., Any], input: object) -> Any:
    """Call the model; a tuple or list becomes arguments, a mapping keyword arguments."""
    if isinstance(input, Tensor):
        return model(input)
    if isinstance(input, tuple | list):
        return model(*input)
    if isinstance(input, Mapping):
        return model(**input)
    return model(input)


def train_step(ctx: Context) -> None:
    """Run one training step of the current optimizer."""
    name, accelerator, fire = ctx.opt_name, ctx.accelerator, ctx.call_callbacks
    assert accelerator and ctx.loss_fn and ctx.backward
    with accelerator.optimizing(name):
        ctx.pred = call_model(ctx.model, ctx.input)
        fire("on_train_batch_after_pred")
        loss = ctx.loss_grad = ctx.loss_fn(ctx.pred, ctx.target)
        ctx.loss[name] = loss.detach()
        fire("on_train_batch_after_loss")
        fire("on_train_batch_before_backward")
        ctx.backward(ctx.loss_grad)
    if accelerator.is_boundary(name):
        fire("on_train_batch_before_step")
        if accelerator.step(name, ctx.step_opt or default_step_opt):
            fire("on_train_batch_after_step")


def valid_step(ctx: Context) -> None:
    """Compute the loss of one validation batch under the name of the current optimizer."""
    assert ctx.loss_fn is not None
    ctx.pred = call_model(ctx.model, ctx.input)
    ctx.call_callbacks("on_valid_batch_after_pred")
    ctx.loss_grad = ctx.loss_fn(ctx.pred, ctx.target)
    ctx.loss[ctx.opt_name] = ctx.loss_grad.detach()
    ctx.call_callbacks("on_valid_batch_after_loss")


def default_step(ctx: Context) -> None:
    """Run the step of a model that defines none: once for each named optimizer.

    References
    ----------
    luz 0.5.0, default ``step`` of ``luz_module``. Differs from luz: gradients are cleared
    after the step, so that they can accumulate over a window of batches.
    """
    one_step = train_step if ctx.training else valid_step
    for ctx.opt_name, ctx.opt in ctx.optimizers.items():
        one_step(ctx)
