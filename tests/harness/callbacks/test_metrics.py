"""Which batches count, and what the metrics callback tells of a loss that is NaN."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import MeanAbsoluteError

import harness
from harness.metrics.loss import LossAverage
from tests.harness.fakes import At, Line, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}
BATCHES = {"batch_size": 2, "shuffle": False}


def make_loss_nan(epoch, iter, training=True):
    """A learner whose loss is NaN in one batch, with finite gradients."""

    class Broken(Line):
        def loss(self, pred, target):
            ctx = self.ctx
            is_here = (ctx.epoch, ctx.iter, ctx.training) == (epoch, iter, training)
            return nn.functional.mse_loss(pred, target) + (
                float("nan") if is_here else 0
            )

    return harness.setup(Broken, optimizer=torch.optim.SGD).set_opt_hparams(lr=0.0)


@pytest.mark.parametrize(
    ("where", "match"),
    [
        ((1, 1), "train/loss: .* got nan in epoch 1, batch 1"),
        ((2, 3), "train/loss: .* got nan in epoch 2, batch 3"),
        ((2, 1, False), "valid/loss: .* got nan in epoch 2, batch 1"),
    ],
)
def test_nan_loss_is_told_at_its_batch(where, match):
    told = []

    def look(ctx):
        told.append((ctx.epoch, ctx.iter, len(found)))

    callbacks = [At("on_train_batch_end", look), At("on_valid_batch_end", look)]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fitted = make_loss_nan(*where).fit(
            slope(6),
            3,
            slope(4),
            callbacks=callbacks,
            dataloader_options=BATCHES,
            **OFF,
        )
    assert len(found) == 1
    with pytest.warns(UserWarning, match=match):
        warnings.warn(found[0].message, stacklevel=1)
    first = next(place[:2] for place in told if place[2])
    assert first == where[:2]
    assert "nan" not in str(fitted)  # the last epoch had none


def test_nan_is_told_once_and_shown():
    class Broken(Line):
        def forward(self, x):
            return super().forward(x) * float("nan")

    learner = harness.setup(Broken, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.warns(UserWarning, match="got nan") as found:
        fitted = learner.fit(slope(6), 2, dataloader_options=BATCHES, **OFF)
    assert len(found) == 1
    assert str(fitted).splitlines()[-1].split() == ["loss", "nan"]


def test_nan_that_waits_is_found_by_its_place():
    average = LossAverage()
    for value in (1.0, float("nan"), 2.0, float("nan"), 3.0):
        average.update({"opt": torch.tensor(value)}, 1)
    assert average.find_nan() == 3
    average.reset()
    assert average.find_nan() is None


class Picky(Line):
    """Leaves out each batch that begins with a multiple of four."""

    def step(self):
        ctx = self.ctx
        if int(ctx.input[0]) % 4 == 0:
            return None
        ctx.pred = self(ctx.input)
        return nn.functional.mse_loss(ctx.pred, ctx.target)


def test_batches_that_a_step_leaves_out_do_not_count():
    metrics = {"mean": lambda pred, target: target.mean(), "mae": MeanAbsoluteError()}
    learner = harness.setup(Picky, optimizer=torch.optim.SGD, metrics=metrics)
    fitted = learner.set_opt_hparams(lr=0.0).fit(
        slope(7), 1, slope(5), dataloader_options={**BATCHES, "drop_last": False}, **OFF
    )
    # Batches begin with 0, 2, 4 and 6; the last one has a single row.
    train, valid = (fitted.records["metrics"][name][0] for name in ("train", "valid"))
    assert train["mean"] == (4 + 6 + 12) / 3
    assert train["mae"] == pytest.approx((4 + 6 + 12) / 3)
    assert train["loss"] == (4**2 + 6**2 + 12**2) / 3
    assert valid["mean"] == (4 + 6) / 2
