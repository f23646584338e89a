"""luz's cases about resuming: ``test-callbacks-resume``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

import harness
from harness.callbacks import (
    AutoResume,
    EarlyStopping,
    LRScheduler,
    ModelCheckpoint,
    ResumeFromCheckpoint,
)
from tests.luz.parts import Fail, assert_same, linear, rows
from tests.luz.test_callbacks import TwoOptimizers


class Watch(harness.Callback):
    """Copies weights and optimizer states at the beginning of each epoch that runs."""

    def __init__(self) -> None:
        self.weights: dict[int, Any] = {}
        self.opts: dict[int, Any] = {}
        self.rates: dict[int, float] = {}

    def on_epoch_begin(self) -> None:
        ctx = self.ctx
        epoch = ctx.epoch or 1
        self.weights[epoch] = copy.deepcopy(ctx.model.state_dict())
        opts = {name: opt.state_dict() for name, opt in ctx.optimizers.items()}
        self.opts[epoch] = copy.deepcopy(opts)
        self.rates[epoch] = next(iter(ctx.optimizers.values())).param_groups[0]["lr"]


def fit(learner: harness.Learner, *callbacks: Any, epochs: int = 8) -> harness.Fitted:
    return learner.fit(rows(), epochs, callbacks=callbacks, tracker=False)


def test_resume_a_simple_model(tmp_path):
    learner = linear().set_opt_hparams(lr=0.01)
    resume, fail, before, after = AutoResume(tmp_path), Fail(5), Watch(), Watch()
    with pytest.raises(RuntimeError, match="failed on epoch 5"):
        fit(learner, before, resume, fail)
    resumed = fit(learner, after, resume, fail)
    metrics = resumed.get_metrics()
    assert len(metrics) == 8
    assert metrics.iloc[:4].equals(fail.metrics.iloc[:4])
    # The failed epoch is not saved, so it runs again, from the same weights.
    assert min(after.weights) == 5
    assert_same(after.weights[5], before.weights[5])
    assert_same(after.opts[5], before.opts[5])
    assert metrics["value"][4] == fail.metrics["value"][4]

    again = fit(learner, resume)  # a finished fit is not resumed
    assert list(again.get_metrics()["value"]) != list(metrics["value"])


def test_resume_a_model_with_more_than_one_optimizer(tmp_path):
    learner = harness.setup(TwoOptimizers, loss=torch.nn.MSELoss())
    learner = learner.set_hparams(in_features=10, out_features=1)
    resume, fail, before, after = AutoResume(tmp_path), Fail(5), Watch(), Watch()
    with pytest.raises(RuntimeError, match="failed on epoch 5"):
        fit(learner, before, resume, fail)
    fit(learner, after, resume, fail)
    assert list(before.opts[5]) == ["weight", "bias"]
    assert_same(after.opts[5], before.opts[5])


class Count(harness.Callback):
    """Counts epochs, over restarts."""

    def __init__(self) -> None:
        self.epochs = 0

    def on_epoch_end(self) -> None:
        self.epochs += 1

    def state_dict(self) -> dict[str, Any]:
        return {"epochs": self.epochs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.epochs = state["epochs"]


def test_resume_a_model_with_learning_rate_scheduler(tmp_path):
    learner = linear().set_opt_hparams(lr=0.01)
    resume, fail, before, after = AutoResume(tmp_path), Fail(5), Count(), Count()
    with pytest.raises(RuntimeError, match="failed on epoch 5"):
        fit(learner, resume, before, fail)
    fit(learner, resume, after, fail)
    assert before.epochs == 5
    assert after.epochs == 8  # 4 that were saved, and 4 more


def test_resume_works_when_model_has_been_explicitly_interrupted(tmp_path):
    learner = linear().set_opt_hparams(lr=0.01)
    resume = AutoResume(tmp_path)
    early = EarlyStopping("train/loss", min_delta=100)
    first = fit(learner, resume, early, epochs=100)
    second = fit(learner, resume, early, epochs=100)
    # A fit that stopped early is finished, so the second one starts anew.
    assert first.get_metrics()["value"][0] != second.get_metrics()["value"][0]


def test_can_use_the_resume_from_callback(tmp_path):
    learner = linear().set_opt_hparams(lr=0.01)
    trained = fit(learner, ModelCheckpoint(tmp_path))
    watch = Watch()
    longer = fit(learner, watch, ResumeFromCheckpoint(tmp_path), epochs=9)
    assert list(watch.weights) == [9]
    assert_same(dict(watch.weights[9]), dict(trained.model.state_dict()))
    assert len(longer.get_metrics()) == 9


def test_resuming_a_model_with_a_lr_scheduler_callback_is_correct(tmp_path):
    learner = linear().set_opt_hparams(lr=0.01)

    def run(fail: Fail) -> dict[int, float]:
        watch = Watch()
        schedule = LRScheduler(StepLR, step_size=1)
        try:
            fit(learner, AutoResume(tmp_path), schedule, watch, fail)
        except RuntimeError:
            assert fail.has_failed
        return watch.rates

    before = run(Fail(5, "on_epoch_begin"))
    after = run(Fail(11, "on_epoch_begin"))
    # A tenth from epoch to epoch, as if the fit had not been interrupted.
    expected = {epoch: pytest.approx(0.01 / 10 ** (epoch - 1)) for epoch in range(1, 9)}
    assert before | after == expected
    assert list(after) == [5, 6, 7, 8]
