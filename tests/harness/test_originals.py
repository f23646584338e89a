from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import harness
from tests.harness.stops import Line, X, Y, fit, sgd

NET = Line()
HELD: list[nn.Module] = [NET]


def penalty() -> torch.Tensor:
    return HELD[0].fc.weight.abs().sum()


@pytest.mark.parametrize(
    "term",
    [lambda: penalty(), lambda: NET.fc.weight.abs().sum()],
    ids=["within", "own"],
)
def test_loss_that_would_train_the_original_of_a_model_is_refused(term):
    before = NET.fc.weight.clone()
    learner = sgd(lambda: NET, lambda p, t: nn.functional.mse_loss(p, t) + term())
    with pytest.raises(ValueError, match="some of the Line that setup was called with"):
        fit(learner)
    assert torch.equal(NET.fc.weight, before)
    NET.zero_grad()


class Penalty(nn.Module):
    """A loss that holds the original."""

    def __init__(self) -> None:
        super().__init__()
        self.net = NET

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(pred, target) + self.net.fc.weight.abs().sum()


def test_loss_that_holds_the_original_of_a_model_is_refused():
    with pytest.raises(ValueError, match="some of the Line that setup was called with"):
        fit(sgd(lambda: NET, Penalty()))


class Weighted(nn.Module):
    """A loss with a plain attribute and a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.beta, self.weight = 0.0, nn.Parameter(torch.ones(()))

    def forward(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        error = nn.functional.mse_loss(pred, target)
        return error * (1 + self.beta) + self.weight**2


LOSS, TEACHER = Weighted(), copy.deepcopy(NET)


class Anneals(harness.Callback):
    def __init__(self, loss: Any) -> None:
        self.set = loss.__setattr__

    def on_train_batch_end(self) -> None:
        self.set("beta", self.ctx.epoch / 10)


class Unfreezes(harness.Callback):
    def __init__(self, params: Any) -> None:
        self.find = params

    def on_epoch_begin(self) -> None:
        for param in self.find():
            param.requires_grad_(self.ctx.epoch < 2)


class ReadsLoss(harness.Callback):
    def on_epoch_end(self) -> None:
        self.ctx.log_metric("weight", LOSS.weight)


class EvaluatesModel(harness.Callback):
    def on_epoch_end(self) -> None:
        NET(X)


class UsesOthers(harness.Callback):
    """Changes what the fit uses, and reads a model of its own."""

    def on_epoch_begin(self) -> None:
        self.ctx.loss_fn.beta = 0.1
        setattr(self.ctx.model, "scale", 2.0)  # noqa: B010
        TEACHER(X)


class Rollouts:
    """Batches that are made by a policy."""

    def __iter__(self):
        yield X, NET(X).detach()


@pytest.mark.parametrize(
    ("make", "data", "match"),
    [
        (lambda: Anneals(LOSS), (X, Y), "ctx.loss_fn: expected a change of beta"),
        (lambda: Unfreezes(NET.parameters), (X, Y), "change of weight.requires_grad"),
        (ReadsLoss, (X, Y), "ReadsLoss: expected it to use ctx.loss_fn, got the Weigh"),
        (EvaluatesModel, (X, Y), "EvaluatesModel: expected it to use ctx.model"),
        (harness.Callback, Rollouts(), "Rollouts: expected it to use ctx.model"),
        (UsesOthers, (X, Y), None),
    ],
    ids=["anneals", "freezes", "reads", "evaluates", "rollouts", "others"],
)
def test_use_of_an_original_that_the_fit_does_not_use_is_warned_of(make, data, match):
    learner = sgd(lambda: NET, LOSS)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        learner.fit(data, 2, callbacks=[make()], tracker=False, verbose=False)
    NET.requires_grad_(True)
    LOSS.beta = 0.0
    found = [str(warning.message) for warning in told]
    assert any(match in text for text in found) if match else not found, found
    assert all(warning.filename == __file__ for warning in told)
