"""The events that a fit must fire, in order; written out once for all tests."""

from __future__ import annotations

from itertools import chain

# One epoch with one training batch and one validation batch.
ONE_EPOCH_FIT = [
    "on_fit_begin",
    "on_epoch_begin",
    "on_train_begin",
    "on_train_batch_begin",
    "on_train_batch_after_pred",
    "on_train_batch_after_loss",
    "on_train_batch_before_backward",
    "on_train_batch_before_step",
    "on_train_batch_after_step",
    "on_train_batch_end",
    "on_train_end",
    "on_valid_begin",
    "on_valid_batch_begin",
    "on_valid_batch_after_pred",
    "on_valid_batch_after_loss",
    "on_valid_batch_end",
    "on_valid_end",
    "on_epoch_end",
    "on_fit_end",
]

BATCH = [name for name in ONE_EPOCH_FIT if name.startswith("on_train_batch_")]
STEP = BATCH[1:-1]  # what repeats for each optimizer
ACCUMULATED_BATCH = [*BATCH[:4], BATCH[-1]]  # no optimizer step
VALID_BATCH = [name for name in ONE_EPOCH_FIT if name.startswith("on_valid_batch_")]
VALID_STEP = VALID_BATCH[1:-1]


def train_part(*batches: list[str]) -> list[str]:
    """The training part of an epoch."""
    return ["on_train_begin", *chain.from_iterable(batches), "on_train_end"]


def valid_part(*batches: list[str]) -> list[str]:
    """The validation part of an epoch."""
    return ["on_valid_begin", *chain.from_iterable(batches), "on_valid_end"]


def epoch(*parts: list[str]) -> list[str]:
    """An epoch of these parts."""
    return ["on_epoch_begin", *chain.from_iterable(parts), "on_epoch_end"]


def whole_fit(*epochs: list[str]) -> list[str]:
    """A fit of these epochs."""
    return ["on_fit_begin", *chain.from_iterable(epochs), "on_fit_end"]
