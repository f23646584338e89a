"""Options of ``predict``: by batch, in training mode, with arguments of the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import harness
from tests.harness.fakes import Line, slope

X = torch.arange(40.0).reshape(20, 2)
BATCHES = {"dataloader_options": {"batch_size": 3}, "verbose": False}


class Noisy(nn.Module):
    """Dropout and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.drop = nn.Dropout(0.5)
        self.frozen = nn.Dropout(0.5).train()

    def forward(self, x):
        return self.drop(self.norm(x))


class Scaled(Line):
    def predict(self, input, scale=1.0, *, shift):
        return self(input) * scale + shift


def around(model: nn.Module) -> harness.Fitted:
    return harness.setup(lambda: model, loss=nn.MSELoss()).with_model(model)


def test_predictions_by_batch_are_a_list():
    model = nn.Linear(2, 1).requires_grad_(False)
    found = around(model).predict(X, stack=False, **BATCHES)
    assert [len(pred) for pred in found] == [3, 3, 3, 3, 3, 3, 2]
    assert torch.equal(torch.cat(found), around(model).predict(X, **BATCHES))


def test_training_mode_keeps_dropout_on_and_leaves_the_model_as_it_was():
    model = Noisy().eval()
    model.frozen.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    fitted = around(model)
    calm = fitted.predict(X, **BATCHES)
    assert not (calm == 0).any(dim=1)[1:].any()
    options: dict[str, Any] = {"dataloader_options": {"batch_size": 20}}
    found = fitted.predict(X, mode="train", **options)
    normed = (X - X.mean(0)) / (X.var(0, correction=0) + model.norm.eps).sqrt()
    dropped = found == 0
    assert dropped[normed != 0].any()
    torch.testing.assert_close(found[~dropped], 2 * normed[~dropped])
    assert not torch.equal(found, fitted.predict(X, mode="train", **options))
    assert all(torch.equal(model.state_dict()[n], own) for n, own in state.items())
    assert (model.training, model.drop.training, model.frozen.training) == (
        False,
        False,
        True,
    )
    assert torch.equal(fitted.predict(X, **BATCHES), calm)


def test_failing_prediction_in_training_mode_leaves_the_statistics_as_they_were():
    model = Noisy()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        around(model).predict(X[:19], mode="train", **BATCHES)
    assert int(model.norm.num_batches_tracked) == 0
    assert model.norm.running_mean.tolist() == [0.0, 0.0]


def test_arguments_reach_the_models_own_predict():
    fitted = around(Scaled(w=1.0))
    found = fitted.predict(torch.tensor([1.0, 2.0]), scale=10.0, shift=3)
    assert found.tolist() == [13.0, 23.0]


REFUSED = {
    "unknown": (Line, {"stak": False}, r"got \['stak'\]\. Did you mean 'stack'\?"),
    "of no predict": (Line, {"scale": 2}, r"or define Line\.predict\(self, input"),
    "unknown to predict": (
        Scaled,
        {"shift": 1, "scal": 2},
        r"predict: expected an argument of predict, got 'scal'\. Did you mean 'scale'",
    ),
    "missing": (Scaled, {}, r"expected values for \['shift'\].*predict: shift=\.\.\."),
    "mode": (
        Line,
        {"mode": "training"},
        r"predict\(mode\): expected 'eval' or 'train'",
    ),
    "stack": (Line, {"stack": 1}, r"predict\(stack\): expected True or False, got 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_arguments_are_refused(name):
    model, options, match = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=match):
        around(model()).predict(slope(3)[0], **options)
