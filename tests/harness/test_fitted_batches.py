from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import harness
from tests.harness.stops import Line, X, Y


class Rows(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, row: int) -> Any:
        return {"x": X[row], "y": Y[row]}


ROWS = Rows()


def collate(rows):
    return torch.stack([r["x"] for r in rows]), torch.stack([r["y"] for r in rows])


class Sizes(harness.Callback):
    def __init__(self) -> None:
        self.seen: list[int] = []

    def on_valid_batch_begin(self) -> None:
        self.seen.append(len(self.ctx.input))

    on_predict_batch_begin = on_valid_batch_begin


def fit(data, module=Line, loss=None, **options):
    learner = harness.setup(
        module, loss=loss or nn.MSELoss(), optimizer=torch.optim.SGD
    ).set_opt_hparams(lr=0.1)
    return learner.fit(data, 1, seed=1, tracker=False, verbose=False, **options)


@pytest.mark.parametrize("is_loader", [True, False])
def test_evaluation_and_prediction_make_batches_as_the_fit_did(is_loader):
    options = {"batch_size": 10, "collate_fn": collate}
    if is_loader:
        fitted = fit(DataLoader(ROWS, **options))
    else:
        fitted = fit(ROWS, dataloader_options=options)
    sizes = Sizes()
    expected = fitted.evaluate((X, Y))["loss"]
    found = fitted.evaluate(ROWS, callbacks=[sizes])["loss"]
    assert found == pytest.approx(expected, rel=1e-6)
    assert len(fitted.predict(ROWS, callbacks=[sizes])) == len(X)
    fitted.predict(X, callbacks=[sizes], dataloader_options={"batch_size": 24})
    assert sizes.seen == [10, 10, 4, 10, 10, 4, 24]


class Noisy(Line):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.fixed = nn.Dropout(0.5), nn.Dropout(0.5)


class Drops(harness.Callback):
    """Predicts with dropout on."""

    def on_predict_begin(self) -> None:
        self.ctx.model.train()


def test_prediction_leaves_the_modes_of_the_model_as_they_were():
    fitted = fit((X, Y), Noisy)
    fitted.model.fixed.train()
    fitted.predict(X, callbacks=[Drops()])
    assert not fitted.model.training
    assert not fitted.model.drop.training
    assert fitted.model.fixed.training


class Weighted(nn.Module):
    def forward(self, pred, target, weight):
        return ((pred - target).pow(2) * weight).mean()


def weighted(pred, target, weight):
    return ((pred - target).pow(2) * weight).mean()


class OwnWeighted(Line):
    def loss(self, pred, target, weight):
        return weighted(pred, target, weight)


@pytest.mark.parametrize("loss", [Weighted(), weighted, None])
def test_loss_that_takes_three_gets_the_third_item_of_a_batch(loss):
    weight = torch.arange(24.0)[:, None]
    module = Line if loss else OwnWeighted
    learner = harness.setup(module, loss=loss, optimizer=torch.optim.SGD)
    fitted = learner.set_opt_hparams(lr=0.01).fit(
        (X, Y, weight),
        1,
        (X, Y, weight),
        seed=1,
        dataloader_options={"batch_size": 24, "shuffle": False},
        tracker=False,
    )
    torch.manual_seed(1)
    model = Line()
    opt = torch.optim.SGD(model.parameters(), lr=0.01)
    weighted(model(X), Y, weight).backward()
    opt.step()
    assert torch.equal(fitted.model.fc.weight, model.fc.weight)


def test_third_item_is_not_taken_for_an_option_of_the_loss():
    fitted = fit((X, Y, torch.zeros(24)), loss=nn.functional.mse_loss)
    assert fitted.records["metrics"]["train"][0]["loss"] > 0
