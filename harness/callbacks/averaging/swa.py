"""Averages the weights of the last epochs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import get_swa_multi_avg_fn, update_bn

from harness.callbacks.averaging.averaged_weights import AveragedWeights
from harness.callbacks.keep_best_model import KeepBestModel
from harness.checks.values import check_at_least
from harness.context import Context
from harness.data.batch import input_of
from harness.data.pace import count_epochs
from harness.steps import StepContext, call_model, get_reader


class StochasticWeightAveraging(AveragedWeights):
    """Returns the mean of the weights after each of the last epochs.

    At the end of the fit, BatchNorm's statistics are computed again in one pass over the
    training data, without gradients. Validation uses the weights of training, and so does
    the result of a fit that a signal interrupts.

    Parameters
    ----------
    start : >= 1, or in (0, 1)
        First epoch that counts, or the fraction of the epochs that comes before it.
    opt_name
        Optimizer whose weights are averaged; None: all.

    Raises
    ------
    ValueError
        Before the first epoch, if `start` is after the last epoch, another callback decides
        about the weights of the result, or several ranks train BatchNorm layers.

    Notes
    -----
    The method trains the last epochs with a constant or cyclic learning rate. Use torch's
    ``SWALR`` in ``LRScheduler`` for it.

    References
    ----------
    Izmailov et al. 2018, "Averaging Weights Leads to Wider Optima and Better
    Generalization"; torch 2.13, ``torch.optim.swa_utils``.
    """

    def __init__(self, start: float = 0.75, *, opt_name: str | None = None) -> None:
        super().__init__(opt_name=opt_name)
        place = "StochasticWeightAveraging(start)"
        advice = "Pass an epoch from 1, or a fraction below 1."
        is_fraction = isinstance(start, float) and 0 < start < 1
        if not is_fraction:
            check_at_least(place, start, 1, advice)
        self.start = start

    def _first_epoch(self, ctx: Context) -> int:
        if self.start >= 1:
            return int(self.start)
        return int(self.start * (count_epochs(ctx) or 1)) + 1

    def check(self, ctx: Context) -> None:
        """Refuse what cannot be averaged, and what else would decide the result."""
        super().check(ctx)
        name = type(self).__name__
        epochs = count_epochs(ctx)
        if epochs is None and self.start < 1:
            msg = f"{name}(start): expected a known number of epochs, got {self.start}"
            raise ValueError(f"{msg} of an unknown one. Pass an epoch from 1.")
        if epochs is not None and self._first_epoch(ctx) > epochs:
            msg = f"{name}(start): expected an epoch up to {epochs}"
            raise ValueError(f"{msg}, got {self.start!r}. Start earlier.")
        if any(isinstance(callback, KeepBestModel) for callback in ctx.callbacks):
            msg = f"{name}: expected to decide the weights of the result"
            raise ValueError(f"{msg}, got KeepBestModel too. Remove one of them.")
        has_batch_norm = any(isinstance(m, _BatchNorm) for m in ctx.model.modules())
        if has_batch_norm and ctx.accelerator.world_size > 1:
            msg = f"{name}: expected one rank for a model with BatchNorm layers"
            advice = "Train on one rank, or use GroupNorm or LayerNorm."
            got = f"got {ctx.accelerator.world_size}"
            raise ValueError(f"{msg}, {got}. {advice}")

    def on_train_end(self) -> None:
        if self.ctx.pace.unit == "epoch":
            self._add()

    def on_epoch_end(self) -> None:
        """Add the weights of an epoch whose training part validations have divided."""
        if self.ctx.pace.unit == "step":
            self._add()

    def _add(self) -> None:
        if (self.ctx.epoch or 0) >= self._first_epoch(self.ctx):
            average = get_swa_multi_avg_fn()  # type: ignore[no-untyped-call]
            for name in self._names:
                self.update(name, average)

    def on_fit_end(self) -> None:
        """Put the mean into the result, and compute BatchNorm's statistics for it."""
        if self.ctx.stop_signal is None and self.averages:
            super().on_fit_end()
            self._update_batch_norm()

    def _update_batch_norm(self) -> None:
        model = self.ctx.model
        modes = {module: module.training for module in model.modules()}
        # torch's function calls a model with the first item of a list.
        update_bn(self._list_inputs(), _WithInput(model))
        for module, mode in modes.items():
            module.training = mode

    def _list_inputs(self) -> Iterator[list[Any]]:
        ctx = self.ctx
        assert isinstance(ctx, StepContext)
        read = get_reader(ctx)
        for batch in ctx.train_data or ():
            yield [input_of(read(batch))]


class _WithInput(nn.Module):
    """A model that is called with the input of a batch, of any form."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    @torch.no_grad()
    def forward(self, input: object) -> object:
        return call_model(self.model, input)
