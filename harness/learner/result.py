"""How a call ends: the model is given back, and the result is made."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from harness.accelerators import Accelerator
from harness.callback import Callback
from harness.callbacks import ModelCheckpoint
from harness.checkpoint.full_weights.final import save_final
from harness.checkpoint.full_weights.placement import EVERY_RANK_BYTES, ModelPlacement
from harness.checkpoint.held.objects import get_extra_states, set_extra_states
from harness.checkpoint.held.search import find_loss_modules
from harness.checkpoint.weights import WeightsReport
from harness.checks.calls import warn_user
from harness.context import Context
from harness.export.sample import take_sample
from harness.export.summary import format_size
from harness.fitted import Fitted
from harness.loop import FitContext
from harness.pytree import Options, map_tensors
from harness.reshard.meta_parameters import move_real_tensors

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator
    from harness.learner.learner import Learner


GATHER_BYTES = 32 << 30
"""A model up to this size is gathered by default at the end of a fit on several ranks."""


def decide_gather(
    gather: bool | int,
    num_bytes: int,
    accelerator: Accelerator,
    tracker: object,
    callbacks: Iterable[Callback],
) -> bool:
    """Decide whether the weights come into the memory of rank 0 at the end of a fit.

    Parameters
    ----------
    gather, tracker, callbacks
        As in ``Learner.fit``. A size counts only where there are several ranks.

    Raises
    ------
    ValueError
        If they do not, and there is no place for a final checkpoint: neither a run nor a
        folder of checkpoints.
    """
    is_whole = bool(gather)
    if not isinstance(gather, bool):
        is_whole = accelerator.world_size == 1 or num_bytes <= gather
    has_folder = any(
        isinstance(callback, ModelCheckpoint) and callback.path is not None
        for callback in callbacks
    )
    if not is_whole and tracker is False and not has_folder:
        size = f"a model of {format_size(num_bytes)}"
        msg = f"fit(gather={gather!r}): expected a place for the final checkpoint of {size}"
        advice = "Add ModelCheckpoint(path), track the fit, or pass gather=True."
        raise ValueError(f"{msg}, got a fit without a run. {advice}")
    return is_whole


def choose_placement(
    ctx: FitContext, num_bytes: int, *, gather: bool
) -> ModelPlacement:
    """Choose where the weights will be, and save them if that is a checkpoint.

    Every rank must call it, after the fit and before the accelerator finishes.

    Parameters
    ----------
    gather
        What ``decide_gather`` returned.
    """
    accelerator, model = ctx.accelerator, ctx.model
    checkpoint = None if gather else save_final(ctx, find_folder(ctx).absolute())
    if checkpoint is not None:
        return ModelPlacement(
            module=model,
            holder="checkpoint",
            checkpoint=checkpoint,
            rank=accelerator.rank,
        )
    is_small = num_bytes <= EVERY_RANK_BYTES
    is_alone = accelerator.world_size == 1
    return ModelPlacement(
        module=model,
        holder="each" if is_small or is_alone else "main",
        rank=accelerator.rank,
    )


def find_folder(ctx: FitContext) -> Path:
    """Folder of the fit's checkpoints: that of a callback, or the run's."""
    for callback in ctx.callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.writer is not None:
            return callback.writer.folder
    assert ctx.run.path is not None  # refused by check_place
    return Path(ctx.run.path) / "checkpoints"


def make_fitted(
    learner: Learner,
    ctx: FitContext,
    batch_options: Options,
    start: WeightsReport | None,
    placement: ModelPlacement,
) -> Fitted:
    """Gather the weights and build the result, with the model on the CPU.

    Parameters
    ----------
    learner, ctx
        Learner and context of the fit.
    """
    accelerator, model = ctx.accelerator, ctx.model
    if accelerator.world_size > 1:
        set_extra_states(model, accelerator.broadcast(get_extra_states(model)))
    is_kept = placement.holder == "each" or (
        placement.holder == "main" and accelerator.is_main
    )
    accelerator.finish(keep=is_kept)
    model._compiled_call_impl = None  # torch 2.13 has no public way back
    move_real_tensors(model, torch.device("cpu"))
    for module in find_loss_modules(ctx.loss_fn, model):
        module.cpu()
        # Not one that TrainValid left in both modes, for a further fit.
        if all(part.training for part in module.modules()):
            module.eval()
    model.eval()
    return Fitted(
        placement=placement,
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
    try:
        ctx.accelerator.barrier()
        for callback in ctx.callbacks:
            callback.after_fit()
    except Exception as error:  # noqa: BLE001  any failure, the result is complete
        msg = f"fit: expected after_fit to succeed, got {error!r}. The result is complete."
        warn_user(msg)


@contextmanager
def finish_on_error(ctx: Context) -> Iterator[None]:
    """Finish the accelerator after an error inside, which stays the one that is raised.

    A device that has failed cannot give the weights back either. The graph of the last batch
    is dropped: at ZeRO 3 it refers to the model, in a way that no garbage collection sees.
    """
    accelerator = ctx.accelerator
    try:
        yield
    except BaseException as error:
        ctx.loss_grad, ctx.pred = None, map_tensors(ctx.pred, torch.Tensor.detach)
        try:
            accelerator.finish(failed=True)
        except Exception as second:  # noqa: BLE001  the first error tells why
            error.add_note(f"not finished: {second!r:.300}")
        raise


@contextmanager
def restore_model_after(ctx: Context) -> Iterator[None]:
    """Take the model off the context, with its modes, also after an error."""
    modes = {module: module.training for module in ctx.model.modules()}
    try:
        with finish_on_error(ctx):
            yield
        ctx.accelerator.finish()
    finally:
        ctx.clean()
        ctx.model = None  # unbinds it
        for module, is_training in modes.items():
            module.training = is_training
