from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import harness
from harness.callbacks import EMA, KeepBestModel, ModelCheckpoint, ResumeFromCheckpoint
from harness.errors import CheckpointError
from tests.harness.exact import rewritten
from tests.harness.fakes import At, Line, line_learner, slope

NAN = float("nan")
OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def weights(values, callback):
    """Weights after each epoch, and those of the fit, while the metric takes these values."""
    after = []

    def log(ctx):
        ctx.log("metrics", "valid", {"watched": values[ctx.epoch - 1]}, index=ctx.epoch)
        after.append(ctx.model.w.item())

    callbacks = [callback, At("on_train_end", log)]
    fitted = line_learner().fit(slope(4), len(values), callbacks=callbacks, **OFF)
    assert len(set(after)) == len(after)
    return after, fitted.model.w.item()


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([3, 1, 2], "min", 2),
        ([3, 1, 2], "max", 1),
        ([1, 1, 1], "min", 1),
        ([3, -1, 2], "zero", 2),
    ],
)
def test_keep_best_ends_with_the_weights_of_the_best_epoch(values, mode, best):
    after, kept = weights(values, KeepBestModel("valid/watched", mode))
    assert kept == after[best - 1]


def test_layers_that_change_after_the_best_epoch_lose_no_fit():
    def change(ctx):
        ctx.log("metrics", "valid", {"watched": ctx.epoch}, index=ctx.epoch)
        if ctx.epoch == 2:
            prune.identity(ctx.model, "weight")  # its name is "weight_orig" from now on

    given = [KeepBestModel("valid/watched", "min"), EMA(), At("on_train_end", change)]
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD}
    learner = harness.setup(nn.Linear, **options).set_hparams(
        in_features=1, out_features=1
    )
    data = torch.ones(4, 1), torch.zeros(4, 1)
    with (
        pytest.warns(UserWarning, match="EMA: expected weights .'weight'., got none"),
        pytest.warns(UserWarning, match="the weights that the best epoch had, got: "),
    ):
        fitted = learner.fit(data, 3, callbacks=given, **OFF)
    assert hasattr(fitted.model, "weight_orig")
    assert fitted.best_epoch is None


class Counts(Line):
    """A number that no tensor holds."""

    calls = 0

    def forward(self, x):
        self.calls += self.training
        return super().forward(x)

    def get_extra_state(self):
        return {"calls": [self.calls]}

    def set_extra_state(self, state):
        (self.calls,) = state["calls"]


def test_keep_best_restores_the_extra_state_of_modules(tmp_path):
    learner = harness.setup(
        Counts, loss=nn.MSELoss(), optimizer=torch.optim.SGD
    ).set_opt_hparams(lr=10.0)  # diverges: the first epoch is the best

    def fit(*callbacks):
        fitted = learner.fit(
            slope(4), 3, callbacks=[KeepBestModel("train/loss"), *callbacks], **OFF
        )
        return fitted.model.calls

    assert fit() == 1
    assert fit(ModelCheckpoint(tmp_path, every_n_epochs=2)) == 1
    assert fit(ResumeFromCheckpoint(tmp_path)) == 1


def test_keep_best_begins_anew_with_each_fit():
    callback = KeepBestModel("valid/watched", "min")
    weights([0, 5], callback)
    after, kept = weights([9, 8, 10], callback)
    assert kept == after[1]


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [
        ([NAN, 3, 2, 4], "min", 3),
        ([3, NAN, 2, NAN], "min", 3),
        ([1, NAN, 2, 1], "max", 3),
        ([NAN, NAN, NAN], "min", 3),  # no best epoch: the last weights
    ],
)
def test_a_nan_is_never_the_best(values, mode, best):
    after, kept = weights(values, KeepBestModel("valid/watched", mode))
    assert kept == after[best - 1]


def test_fitted_shows_the_best_epoch():
    values = [3.0, 1.0, 2.0]

    def log(ctx):
        ctx.log("metrics", "valid", {"watched": values[ctx.epoch - 1]}, index=ctx.epoch)

    callbacks = [KeepBestModel("valid/watched", "min"), At("on_train_end", log)]
    fitted = line_learner().fit(slope(4), 3, callbacks=callbacks, **OFF)
    assert fitted.best_epoch == 2
    loss = fitted.records["metrics"]["train"][1]["loss"]
    assert "weights of epoch 2" in str(fitted)
    assert f"{loss:.4g}" in str(fitted)
    assert line_learner().fit(slope(4), 1, **OFF).best_epoch is None


class Remembering(nn.Module):
    """A loss with a weight that is trained, a buffer, an extra state and a plain number."""

    mean: torch.Tensor

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(()), persistent=False)
        self.calls = 0

    def forward(self, pred, target):
        loss = (pred - target).square().mean()
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * loss.detach()
            self.calls += 1
        return loss * self.scale.square() + self.scale

    def tell(self):
        return self.scale.item(), self.mean.item(), self.calls


class Extra(Remembering):
    """The number is an extra state."""

    def get_extra_state(self):
        return [self.calls]

    def set_extra_state(self, state):
        (self.calls,) = state


class Wrapped:
    """A loss that is no module, and holds one."""

    def __init__(self):
        self.inner = Remembering()

    def __call__(self, pred, target):
        return self.inner(pred, target)

    def tell(self):
        return self.inner.tell()


@pytest.mark.parametrize("kind", [Remembering, Extra, Wrapped])
def test_keep_best_restores_the_state_of_the_loss(kind, tmp_path):
    values = [3.0, 1.0, 2.0]

    def fit(*callbacks):
        after = {}

        def log(ctx):
            number = {"watched": values[ctx.epoch - 1]}
            ctx.log("metrics", "valid", number, index=ctx.epoch)
            after[ctx.epoch] = ctx.loss_fn.tell()

        learner = harness.setup(Line, loss=kind(), optimizer=torch.optim.SGD)
        keep = KeepBestModel("valid/watched", "min")
        given = [keep, At("on_train_end", log), *callbacks]
        learner = learner.set_opt_hparams(lr=0.01)
        fitted = learner.fit(slope(4), 3, callbacks=given, **OFF)
        return after, fitted

    after, fitted = fit(ModelCheckpoint(tmp_path, every_n_epochs=2))
    assert len({*after.values()}) == 3
    assert fitted.loss.tell() == after[2]
    _, resumed = fit(ResumeFromCheckpoint(tmp_path))
    assert resumed.loss.tell() == after[2]


def test_best_epoch_is_kept_by_save_and_load(tmp_path):
    fitted = line_learner().fit(
        slope(4), 2, callbacks=[KeepBestModel("train/loss")], **OFF
    )
    fitted.save(tmp_path / "saved")
    loaded = harness.load(tmp_path / "saved", module=Line)
    assert fitted.best_epoch in (1, 2)
    assert loaded.best_epoch == fitted.best_epoch
    assert f"weights of epoch {fitted.best_epoch}" in str(loaded)
    line_learner().fit(slope(4), 1, **OFF).save(tmp_path / "last")
    assert harness.load(tmp_path / "last", module=Line).best_epoch is None


def test_best_weights_of_another_model_are_refused(tmp_path):
    def change(state):
        state["callbacks"]["KeepBestModel"]["model_part"]["model"] = {
            "w": torch.zeros(3)
        }

    def fit(callback):
        keep = KeepBestModel("train/loss")
        return line_learner().fit(slope(4), 2, callbacks=[keep, callback], **OFF)

    fit(ModelCheckpoint(tmp_path))
    rewritten(tmp_path, change)
    with pytest.raises(CheckpointError, match="expected the tensor 'b' of shape"):
        fit(ResumeFromCheckpoint(tmp_path))
