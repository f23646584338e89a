"""The loop of a prediction."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch

from harness.accelerators.base import Accelerator
from harness.checks.model import get_method
from harness.data.batch import clone_to_cpu, copy_by_value, num_rows
from harness.data.workers import iter_batches
from harness.loop.handling import add_handlers, report_exceptions, suppress_all_handled
from harness.steps import StepContext, add_model_note, call_model, get_reader


def predict(
    ctx: StepContext, arguments: Mapping[str, object] = MappingProxyType({})
) -> list[tuple[Any, int | None]]:
    """Return the output for each batch of ``ctx.data``, detached, of all ranks, and its rows.

    The model's own ``predict`` gets `arguments` too.
    """
    assert ctx.data is not None
    own, read = get_method(ctx.model, "predict"), get_reader(ctx)
    preds: list[Any] = []
    waiting: list[list[Any]] = []
    add_handlers(ctx)
    with report_exceptions(ctx), suppress_all_handled(ctx), torch.no_grad():
        ctx.call_callbacks("on_predict_begin")
        for ctx.iter, batch in enumerate(iter_batches(ctx.data), start=1):
            ctx.batch = read(batch)
            ctx.call_callbacks("on_predict_batch_begin")
            try:
                if own:
                    ctx.pred = own(ctx.input, **arguments)
                else:
                    ctx.pred = call_model(ctx.model, ctx.input)
            except Exception as error:
                add_model_note(ctx, error)
                raise
            ctx.call_callbacks("on_predict_batch_end")
            pred = copy_by_value(ctx.pred, clone_to_cpu)
            found = pred, num_rows(ctx.input, ctx.target)
            waiting.append([found] if ctx.accelerator.counted != 0 else [])
            if len(waiting) == GATHER_BATCHES:
                preds += gather_outputs(waiting, ctx.accelerator)
        ctx.call_callbacks("on_predict_end")
    return preds + gather_outputs(waiting, ctx.accelerator)


GATHER_BATCHES = 64
"""Batches whose predictions are sent to the other ranks at once."""


def gather_outputs(waiting: list[list[Any]], accelerator: Accelerator) -> list[Any]:
    """Return the waiting outputs of all ranks, in order of batches, and forget them.

    Parameters
    ----------
    waiting
        For each batch, a list with its output; empty if the batch does not count.
    """
    of_ranks = accelerator.gather_objects(list(waiting))
    waiting.clear()
    return [
        pred
        for batches in zip(*of_ranks, strict=True)
        for found in batches
        for pred in found
    ]
