"""Trains on the same few batches in every epoch."""

from __future__ import annotations

from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from harness.callback import Callback
from harness.checks.values import check_at_least
from harness.context import Context
from harness.data.batch import Batch, copy_by_value
from harness.pytree import StateDict


class OverfitBatches(Callback):
    """Trains on the first batches of the data only, the same ones in every epoch.

    A model that can learn at all will memorize them. If the loss does not go to zero, look
    for a mistake in the model, the loss or the learning rate. Validation stays as it is.

    Parameters
    ----------
    batches : >= 1
        Training batches to use. They are drawn once, in the order of the first epoch.

    Raises
    ------
    ValueError
        Before the first epoch, on several ranks.

    Notes
    -----
    Checkpoints contain the batches.

    References
    ----------
    Lightning 2.6, ``overfit_batches``. Differs from it: the batches of a shuffled loader, and
    validation data is not replaced.
    """

    weight = -500  # before callbacks that count the batches of an epoch

    def __init__(self, batches: int = 1) -> None:
        check_at_least("OverfitBatches(batches)", batches, 1, "Leave it out for 1.")
        self.batches = batches
        self._kept: list[Batch] = []

    def check(self, ctx: Context) -> None:
        """Refuse several ranks, whose loaders divide the data."""
        if ctx.accelerator.world_size > 1:
            got = ctx.accelerator.world_size
            msg = f"OverfitBatches: expected one rank, got {got}."
            raise ValueError(f"{msg} Try the model on one rank first.")

    def on_fit_begin(self) -> None:
        """Draw the batches, and train on them instead of the data."""
        batches: Any = islice(self.ctx.train_data or (), self.batches)
        self._kept = [copy_by_value(batch) for batch in batches]
        # A list is a data set, of which this loader takes one item a batch, as it is.
        kept: Any = self._kept
        loader = DataLoader(kept, batch_size=None, collate_fn=copy_by_value)
        self.ctx.train_data = self.ctx.data = loader

    def state_dict(self) -> StateDict:
        """Return the batches."""
        return {"batches": self._kept}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the batches, in the loader too."""
        self._kept[:] = state["batches"]
