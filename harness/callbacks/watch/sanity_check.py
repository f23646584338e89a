"""Validates a few batches before the first epoch, so that a mistake there shows at once."""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from harness.callback import Callback, Listeners
from harness.callbacks.metrics import Metrics
from harness.callbacks.train_valid import TrainValid
from harness.checkpoint.state import get_generators
from harness.checks.values import check_at_least
from harness.context import Context
from harness.loop.validation import valid_epoch
from harness.records import NullRun, RecordBook
from harness.reshard.consolidated import copy_into
from harness.rng import get_rng_state, set_rng_state
from harness.steps import StepContext

KEPT = (
    *("run", "record_book", "listeners", "metrics", "data", "training"),
    *("valid_data", "valid_name"),
    *("epoch", "pred", "loss", "loss_grad", "batch_values"),
    *("_iter", "_batch", "_rows", "_has_warned_of_rows", "_opt", "_opt_name"),
)
"""Fields of the context that a validation changes."""


class SanityCheck(Callback):
    """Validates a few batches before the first epoch, with the step, loss and metrics.

    An error in validation then appears before an epoch is trained. The fit is not affected:
    records, metrics, random state, buffers of the model and the step counters are as
    without the check, and no other callback is called. A resumed fit is not checked.

    Parameters
    ----------
    batches : >= 1
        Validation batches to try.

    Raises
    ------
    ValueError
        Before the first epoch, if there is no validation data, the loader keeps worker
        processes for all epochs, or the model has lazy layers.

    References
    ----------
    Lightning 2.6, ``num_sanity_val_steps``. Differs from it: metrics are computed too, and
    callbacks are not called.
    """

    weight = 900  # after other callbacks are ready

    def __init__(self, batches: int = 2) -> None:
        check_at_least("SanityCheck(batches)", batches, 1, "Leave it out for 2.")
        self.batches = batches

    def check(self, ctx: Context) -> None:
        """Refuse a fit in which the check would leave something behind."""
        if not ctx.valid_sets:
            msg = "SanityCheck: expected validation data, got none."
            raise ValueError(f"{msg} Pass valid_data=..., or remove the callback.")
        loaders = ctx.valid_sets.values()
        if any(getattr(loader, "persistent_workers", False) for loader in loaders):
            msg = "SanityCheck: expected a validation loader without persistent_workers"
            advice = "Set persistent_workers=False for it, or remove the callback."
            raise ValueError(f"{msg}, got one with them. {advice}")
        if any(is_lazy(param) for param in ctx.model.parameters()):
            msg = "SanityCheck: expected a model with shapes, got lazy layers."
            raise ValueError(f"{msg} Give the layers their sizes.")

    def on_fit_begin(self) -> None:
        """Validate the first batches, and put everything back."""
        ctx = self.ctx
        if ctx.resume is not None:
            return
        assert isinstance(ctx, StepContext)
        kept = {name: getattr(ctx, name) for name in KEPT}
        warned = set(ctx.has_warned)
        modes = [(module, module.training) for module in ctx.model.modules()]
        buffers = [(buffer, buffer.clone()) for buffer in ctx.model.buffers()]
        generators = get_generators(ctx)
        random = get_rng_state(generators, ctx.device)
        names = ("state_dict", "load_state_dict")
        loaders: list[Any] = [
            loader
            for loader in ctx.valid_sets.values()
            if all(hasattr(loader, name) for name in names)
        ]
        positions = [loader.state_dict() for loader in loaders]
        try:
            self._validate(ctx)
        except Exception as exc:
            exc.add_note(f"in {type(self).__name__}, before the first epoch")
            raise
        finally:
            for name, value in kept.items():
                setattr(ctx, name, value)
            ctx.has_warned = warned
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for buffer, value in buffers:
                    copy_into(buffer, value)
            for loader, position in zip(loaders, positions, strict=True):
                loader.load_state_dict(position)
            set_rng_state(random, generators, ctx.device)

    def _validate(self, ctx: StepContext) -> None:
        own: list[Callback] = [TrainValid()]
        own += [Metrics(c.metric_set) for c in ctx.callbacks if isinstance(c, Metrics)]
        for callback in own:
            callback.ctx = ctx
        ctx.run, ctx.record_book = NullRun(), RecordBook()
        ctx.listeners, ctx.metrics, ctx.epoch = Listeners(own), None, 1
        for name, loader in ctx.valid_sets.items():
            first: Any = list(islice(loader, self.batches))
            ctx.valid_name, ctx.valid_data = name, first
            valid_epoch(ctx)
