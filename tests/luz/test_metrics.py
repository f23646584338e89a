"""luz's cases about metrics: ``test-metrics``, ``test-metrics-auc``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassAUROC

import harness
from tests.luz.parts import Net, linear, rows

TRUE = np.array([1, 1, 1, 0, 0, 0])
SCORES = np.array([0.9, 0.8, 0.4, 0.5, 0.3, 0.2], dtype=np.float32)


def update_in_pairs(metric: Metric, scores: np.ndarray, true: np.ndarray) -> Any:
    """The value after updates of two rows each."""
    for start in range(0, len(true), 2):
        pair = slice(start, start + 2)
        metric.update(torch.tensor(scores[pair]), torch.tensor(true[pair]))
    return metric.compute()


class MicroAUROC(BinaryAUROC):
    """Each class of each row is a binary decision: the recipe of docs/from-luz.md."""

    def update(self, pred: Tensor, target: Tensor) -> None:
        one_hot = nn.functional.one_hot(target, pred.shape[1])
        super().update(pred.flatten(), one_hot.flatten())


def test_binary_auc_works():
    # One of nine pairs is in the wrong order.
    assert update_in_pairs(BinaryAUROC(), SCORES, TRUE) == pytest.approx(8 / 9)


def test_multiclass_auc_works_with_method_micro():
    scores = np.stack([1 - SCORES, SCORES], axis=1)
    expected = roc_auc_score(np.eye(2)[TRUE].ravel(), scores.ravel())
    found = update_in_pairs(MicroAUROC(), scores, TRUE)
    assert found == pytest.approx(expected)
    assert expected != pytest.approx(8 / 9)


def test_multiclass_auc_works_with_method_macro():
    scores = np.stack([1 - SCORES, SCORES], axis=1)
    found = update_in_pairs(MulticlassAUROC(2, average="macro"), scores, TRUE)
    assert found == pytest.approx(8 / 9)  # by symmetry, of both classes


def test_multiclass_auc_works_with_method_weighted():
    true = np.append(TRUE, [1, 1])
    scores = np.append(SCORES, np.float32([0.4, 0.3]))
    of_one = roc_auc_score(true, scores)
    both = np.stack([scores, scores], axis=1)
    # 3 rows of class 0, whose score has the wrong sign, and 5 of class 1.
    expected = 3 / 8 * (1 - of_one) + 5 / 8 * of_one
    found = update_in_pairs(MulticlassAUROC(2, average="weighted"), both, true)
    assert found == pytest.approx(expected)


def test_multiclass_auc_works_with_none():
    scores = np.stack([1 - SCORES, SCORES], axis=1)
    found = update_in_pairs(MulticlassAUROC(2, average="none"), scores, TRUE)
    assert found.tolist() == pytest.approx([8 / 9, 8 / 9])


class Counter(Metric):
    """Adds a number at each update."""

    total: Tensor

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = amount
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        self.total += self.amount

    def compute(self) -> Tensor:
        return self.total


def test_can_create_a_simple_metric(learner):
    metric = Counter(amount=1)
    metric.update(torch.ones(1), torch.ones(1))
    assert metric.compute() == 1
    counted = harness.setup(
        Net, loss=nn.MSELoss(), optimizer=torch.optim.Adam, metrics=Counter(amount=2)
    ).set_hparams(input_size=10, output_size=1)
    fitted = counted.fit(rows(), 1, tracker=False)
    assert fitted.records["metrics"]["train"][0]["counter"] == 2 * 3  # 3 batches


@pytest.fixture
def matrices() -> tuple[Tensor, Tensor]:
    return torch.randn(100, 100), torch.randn(100, 100)


def test_mae_works(matrices):
    x, y = matrices
    assert MeanAbsoluteError()(x, y) == pytest.approx(float((x - y).abs().mean()))


def test_mse_works(matrices):
    x, y = matrices
    assert MeanSquaredError()(x, y) == pytest.approx(float(((x - y) ** 2).mean()))


def test_rmse_works(matrices):
    x, y = matrices
    expected = float(((x - y) ** 2).mean().sqrt())
    assert MeanSquaredError(squared=False)(x, y) == pytest.approx(expected)


def test_binary_accuracy_with_logits():
    x, y = torch.randn(100), torch.randint(2, (100,))
    # Numbers outside of [0, 1] are taken for logits.
    expected = float(((x > 0) == y.bool()).float().mean())
    assert BinaryAccuracy()(x, y) == pytest.approx(expected)


def test_metrics_works_within_models():
    def accuracy_of_scores(pred: Tensor, target: Tensor) -> Tensor:
        return ((pred > 0.5) == target.bool()).float().mean()

    class Float(nn.BCEWithLogitsLoss):
        def forward(self, pred: Tensor, target: Tensor) -> Tensor:
            return super().forward(pred, target.float())

    x, y = rows()
    learner = linear(
        loss=Float(), metrics=[BinaryAccuracy(), BinaryAUROC(), accuracy_of_scores]
    )
    fitted = learner.fit((x, (y > 0).long()), 1, tracker=False)
    assert list(fitted.records["metrics"]["train"][0]) == [
        "loss",
        "binary_accuracy",
        "binary_auroc",
        "accuracy_of_scores",
    ]


def test_can_specify_metrics_for_training_and_validation(tmp_path):
    metrics = harness.MetricSet(
        {"mae": MeanAbsoluteError()},
        valid={"rmse": MeanSquaredError(squared=False)},
        train={"mse": MeanSquaredError()},
    )
    learner = linear(metrics=metrics).set_opt_hparams(lr=0.001)
    fitted = learner.fit(rows(), 2, rows(), tracker=False)
    frame = fitted.get_metrics()
    found = frame.groupby("set")["metric"].unique()
    assert list(found["valid"]) == ["loss", "mae", "rmse"]
    assert list(found["train"]) == ["loss", "mae", "mse"]
    fitted.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 0


def test_get_a_nice_error_message_if_you_pass_the_wrong_metric_type():
    with pytest.raises(TypeError, match=r"expected an instance, got the class MeanAbs"):
        harness.MetricSet(MeanAbsoluteError, valid=MeanSquaredError())
    with pytest.raises(TypeError, match=r"metrics\['mae'\]: expected a metric, got 3"):
        harness.MetricSet({"mae": 3})


class Failing(Metric):
    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def update(self, pred: Tensor, target: Tensor) -> None:
        if self.where == "update":
            raise RuntimeError("no update")

    def compute(self) -> float:
        raise RuntimeError("no value")


def fail_in(where: str) -> pytest.ExceptionInfo[RuntimeError]:
    learner = linear(metrics={"hello": Failing(where)}).set_opt_hparams(lr=0.001)
    with pytest.raises(RuntimeError, match=r"no (update|value)") as caught:
        learner.fit(rows(), 5, rows(), tracker=False)
    return caught


def test_get_a_nice_error_message_when_metric_fails_updating():
    caught = fail_in("update")
    assert str(caught.value) == "no update"
    assert any("in metric 'hello'" in note for note in caught.value.__notes__)
    assert any("epoch 1, iter 1, training" in note for note in caught.value.__notes__)


def test_error_gracefully_on_failed_compute():
    caught = fail_in("compute")
    assert str(caught.value) == "no value"
    assert any("in metric 'hello'" in note for note in caught.value.__notes__)


def test_metrics_run_in_the_environments_they_are_created():
    x = 1.0

    def make() -> Any:
        x = 2.0

        def hello(pred: Tensor, target: Tensor) -> float:
            return x

        return hello

    learner = linear(metrics=make()).set_opt_hparams(lr=0.001)
    fitted = learner.fit(rows(), 1, tracker=False)
    assert fitted.records["metrics"]["train"][0]["hello"] == 2.0 != x
