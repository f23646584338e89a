"""Metrics and losses of one head of several."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils.data import StackDataset
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

import harness
from harness.callbacks import EarlyStopping
from harness.metrics.part import select
from tests.harness.exact import Case, differences, numbers
from tests.harness.exact import fit as fit_case

ROWS = 22
X = numbers(ROWS, 4)
TARGETS = {"digit": torch.arange(ROWS) % 3, "size": X.sum(1)}
DATA = StackDataset(X, StackDataset(**TARGETS))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.digit, self.size = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        return {"digit": self.digit(x), "size": self.size(x)[:, 0]}


def both_losses(pred, target):
    digit = nn.functional.cross_entropy(pred["digit"], target["digit"])
    return {
        "digit": digit,
        "size": nn.functional.mse_loss(pred["size"], target["size"]),
    }


def spread(pred, target):
    return (pred - target).abs().max()


METRICS = [
    harness.on(MulticlassAccuracy(3, average="micro"), pred="digit", target="digit"),
    harness.on(MulticlassAUROC(3), pred="digit", target="digit"),
    harness.on(MeanSquaredError(), pred="size", target="size"),
    harness.on(spread, pred="size", target="size"),
]
OPTIONS: dict[str, Any] = {"batch_size": 4, "drop_last": False}


def learner(metrics: Any = METRICS, loss: Any = both_losses) -> harness.Learner:
    made = harness.setup(
        TwoHeads, loss=loss, optimizer=torch.optim.Adam, metrics=metrics
    )
    return made.set_opt_hparams(lr=0.05)


def fit(made: harness.Learner, *callbacks: harness.Callback) -> harness.Fitted:
    return made.fit(
        DATA,
        2,
        DATA,
        callbacks=callbacks,
        dataloader_options=OPTIONS,
        seed=0,
        tracker=False,
        verbose=False,
    )


@pytest.fixture(scope="module")
def fitted() -> harness.Fitted:
    stop = EarlyStopping("valid/multiclass_accuracy_digit")
    made = fit(learner(), stop)
    assert stop.mode == "max"
    return made


def test_metrics_of_each_head_equal_those_of_its_own_predictions(fitted):
    with torch.no_grad():
        pred = fitted.model(X)
    digit, size = pred["digit"], pred["size"]
    auroc = MulticlassAUROC(3)(digit, TARGETS["digit"])
    gaps = (size - TARGETS["size"]).abs()
    means = sum(float(gap.max()) * len(gap) for gap in gaps.split(4)) / ROWS
    assert fitted.records["metrics"]["valid"][-1] == pytest.approx(
        {
            "loss": float(sum(both_losses(pred, TARGETS).values())),
            "digit": float(both_losses(pred, TARGETS)["digit"]),
            "size": float(both_losses(pred, TARGETS)["size"]),
            "multiclass_accuracy_digit": float(
                (digit.argmax(1) == TARGETS["digit"]).float().mean()
            ),
            "multiclass_auroc_digit": float(auroc),
            "mean_squared_error_size": float((gaps**2).mean()),
            "spread_size": means,
        },
        rel=1e-4,
    )


def test_saved_model_keeps_its_metrics_of_parts(tmp_path: Path, fitted):
    fitted.save(tmp_path / "m")
    loaded = harness.load(tmp_path / "m", TwoHeads)
    found = loaded.evaluate(DATA, dataloader_options={"batch_size": 4})
    wanted = fitted.evaluate(DATA)
    assert found.records == wanted.records
    assert len(found.records["metrics"]["valid"][0]) == 7


def test_metrics_of_parts_resume_bit_for_bit(tmp_path: Path):
    case = Case(learner=learner, data=lambda: DATA, valid=DATA, options=OPTIONS)
    whole = fit_case(case, tmp_path / "whole")
    fit_case(case, tmp_path / "parts", ("on_train_batch_end", 3))
    assert differences(whole, fit_case(case, tmp_path / "parts")) == []


def test_loss_of_one_head_trains_that_head_alone():
    loss = harness.on(nn.CrossEntropyLoss(), pred="digit", target="digit")
    made = fit(learner(metrics={"mse": METRICS[2]}, loss=loss))
    torch.manual_seed(0)
    before = TwoHeads()
    assert torch.equal(made.model.size.weight, before.size.weight)
    assert not torch.equal(made.model.digit.weight, before.digit.weight)


class Pair(NamedTuple):
    digit: Any
    size: Any


def test_part_is_a_key_an_attribute_a_position_a_column_or_what_a_function_says():
    one, two = torch.arange(3), torch.ones(3, 2)
    assert select({"a": one, 0: two}, 0, "pred") is two
    assert select(Pair(one, two), "size", "pred") is two
    assert select((one, two), -1, "pred") is two
    assert select(torch.stack([one, 2 * one], 1), 1, "target").tolist() == [0, 2, 4]
    assert select((one, two), lambda both: both[0] + 1, "target").tolist() == [1, 2, 3]


def test_names_tell_the_part():
    def first(both):
        return both[0]

    made = harness.setup(
        TwoHeads,
        loss=both_losses,
        optimizer=torch.optim.SGD,
        metrics=[
            harness.on(MeanSquaredError(), pred=1),
            harness.on(MeanSquaredError(), target="size"),
            harness.on(MeanSquaredError(), pred=first),
            harness.on(MeanSquaredError(), pred=lambda both: both[1]),
        ],
    )
    assert list(made.metrics.train) == [
        "mean_squared_error_1",
        "mean_squared_error_size",
        "mean_squared_error_first",
        "mean_squared_error",
    ]


REFUSED = {
    "class": (
        lambda: harness.on(MeanSquaredError, pred=0),
        "got MeanSquaredError. Pass",
    ),
    "collection": (
        lambda: harness.on(MetricCollection([MeanSquaredError()]), pred=0),
        r"on\(metric\): expected a metric",
    ),
    "key": (lambda: harness.on(spread, pred=1.5), r"on\(pred\): expected .*got 1\.5"),
    "none": (
        lambda: harness.on(spread),
        "expected pred=... or target=..., got neither",
    ),
    "function": (
        lambda: harness.on(lambda pred: pred, pred=0),
        r"on\(metric\): expected a function that can be called as f\(pred, target\)",
    ),
    "missing key": (
        lambda: fit(learner(harness.on(spread, pred="sise", target="size"))),
        r"on\(pred='sise'\): expected a prediction with 'sise', got a dict of "
        r"\['digit', 'size'\]\. Did you mean 'size'\?",
    ),
    "missing position": (
        lambda: select((1, 2), 2, "target"),
        r"on\(target=2\): expected a target with 2, got a tuple of 2",
    ),
    "missing column": (
        lambda: select(torch.zeros(3), 0, "pred"),
        r"got a tensor of shape \(3,\)",
    ),
    "missing attribute": (lambda: select(3, "size", "pred"), "got a int"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parts_that_cannot_be_are_refused(name):
    call, match = REFUSED[name]
    with pytest.raises((TypeError, ValueError), match=match):
        call()
