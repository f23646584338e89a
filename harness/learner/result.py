"""How a call ends: the model is given back, and the result is made."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from harness.checkpoint.search import find_loss_modules
from harness.checkpoint.state import get_extra_states, set_extra_states
from harness.checkpoint.weights import WeightsReport
from harness.context import Context
from harness.export.sample import take_sample
from harness.fitted import Fitted
from harness.loop import FitContext
from harness.pytree import Options
from harness.reshard.consolidated import load_whole_state

if TYPE_CHECKING:
    from harness.learner.learner import Learner


def make_fitted(
    learner: Learner,
    ctx: FitContext,
    batch_options: Options,
    start: WeightsReport | None,
) -> Fitted:
    """Gather the weights and build the result, with the model on the CPU."""
    accelerator, model = ctx.accelerator, ctx.model
    assert accelerator is not None
    weights = accelerator.full_state_dict(model)
    if accelerator.world_size > 1:
        set_extra_states(model, accelerator.broadcast(get_extra_states(model)))
    accelerator.finish()
    model._compiled_call_impl = None  # torch 2.13 has no public way back
    model.cpu()
    if weights:
        load_whole_state(model, weights)
    for module in find_loss_modules(ctx.loss_fn, model):
        module.cpu().eval()
    return Fitted(
        model=model.eval(),
        loss=None if learner.loss is None else ctx.loss_fn,
        batch_options=batch_options,
        records=ctx.records,
        learner=learner,
        hparams=ctx.hparams,
        opt_hparams=ctx.opt_hparams,
        run_id=ctx.run.id,
        run_path=ctx.run.path,
        run=ctx.run,
        signum=ctx.stop_signal,
        best_epoch=ctx.buffers.get("best_epoch"),
        best_step=ctx.buffers.get("best_step"),
        unit=ctx.pace.unit,
        start=start,
        example=take_sample(ctx.input),
    )


def call_after_fit(ctx: Context) -> None:
    """Call ``after_fit`` of every callback once every rank has its result.

    A failure becomes a warning, because it must not keep the result from the caller.
    """
    assert ctx.accelerator is not None
    try:
        ctx.accelerator.barrier()
        for callback in ctx.callbacks:
            callback.after_fit()
    except Exception as error:  # noqa: BLE001  any failure, the result is complete
        msg = f"fit: expected after_fit to succeed, got {error!r}. The result is complete."
        warnings.warn(msg, stacklevel=3)


@contextmanager
def restore_model_after(ctx: Context) -> Iterator[None]:
    """Take the model off the context and back to the CPU, with its modes, also after an error."""
    modes = {module: module.training for module in ctx.model.modules()}
    failed = True
    try:
        yield
        failed = False
    finally:
        assert ctx.accelerator is not None
        ctx.accelerator.finish(failed=failed)
        ctx.clean()
        ctx.state_dict()["model"].cpu()
        for module, is_training in modes.items():
            module.training = is_training
