"""Metrics whose value is a curve or a matrix: what is recorded and drawn of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from matplotlib import pyplot
from torch import nn
from torchmetrics import Metric
from torchmetrics.classification import (
    BinaryROC,
    MulticlassAccuracy,
    MulticlassConfusionMatrix,
    MulticlassPrecisionRecallCurve,
    MultilabelConfusionMatrix,
)

import harness
import tracking
from harness.metrics.plots import as_points, draw, is_curve, is_matrix

SCORES = torch.tensor([0.1, 0.4, 0.35, 0.8])
LABELS = torch.tensor([0, 0, 1, 1])


class Broken(MulticlassConfusionMatrix):
    def plot(self, *_, **__):
        raise RuntimeError("no paper")


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A model that gives its input as scores, so that the values are known."""

    class Same(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return self.scale * x

    data = (SCORES, LABELS.float())
    metrics = harness.MetricSet(
        valid={
            "roc": harness.on(BinaryROC(), target=lambda t: t.long()),
            "confusion": harness.on(
                MulticlassConfusionMatrix(2),
                pred=lambda p: (p > 0.5).long(),
                target=lambda t: t.long(),
            ),
            "broken": harness.on(
                Broken(2), pred=lambda p: (p > 0.5).long(), target=lambda t: t.long()
            ),
        }
    )
    learner = harness.setup(
        Same, loss=nn.BCELoss(), optimizer=torch.optim.SGD, metrics=metrics
    ).set_opt_hparams(lr=1e-9)
    tracker = {"runs_dir": tmp_path_factory.mktemp("runs"), "delivery": False}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = learner.fit(
            data,
            2,
            valid_data=data,
            tracker=tracker,
            verbose=False,
            dataloader_options={"batch_size": 2},
        )
    return found, [str(one.message) for one in caught]


# The curve of scikit-learn's roc_curve documentation, with all thresholds.
ROC = [[0.0, 0.0, 0.5, 0.5, 1.0], [0.0, 0.5, 0.5, 1.0, 1.0], [1.0, 0.8, 0.4, 0.35, 0.1]]


def test_curve_is_recorded_apart_from_the_metrics(fitted):
    found, _ = fitted
    for epoch in (0, 1):
        points = found.records["curves"]["valid"][epoch]["roc"]
        torch.testing.assert_close(torch.tensor(points), torch.tensor(ROC))
    metrics = found.records["metrics"]["valid"][1]
    assert set(metrics) == {"loss", "confusion", "broken"}
    assert metrics["confusion"] == [[2, 0], [1, 1]]
    rows = tracking.open(found.run_path).records(what="curves")
    assert rows["name"].to_pylist() == ["roc", "roc"]


def test_evaluation_gives_curves_by_name(fitted):
    found, _ = fitted
    result = found.evaluate((SCORES, LABELS.float()))
    torch.testing.assert_close(torch.tensor(result["roc"]), torch.tensor(ROC))
    assert result["confusion"] == [[2, 0], [1, 1]]
    with pytest.raises(KeyError):
        result["no"]


def test_figures_are_in_the_run_at_their_steps(fitted):
    found, caught = fitted
    rows = tracking.open(found.run_path).records(what="images").to_pylist()
    assert [(row["set"], row["step"], row["epoch"]) for row in rows] == [
        ("valid/roc", 2, 1),
        ("valid/confusion", 2, 1),
        ("valid/roc", 4, 2),
        ("valid/confusion", 4, 2),
    ]
    assert pyplot.get_fignums() == []
    (told,) = [text for text in caught if "draw" in text]  # once, not in each epoch
    assert "metrics['broken']: expected to draw its value, got RuntimeError" in told


def test_long_curves_keep_evenly_spaced_points_and_both_ends():
    metric = BinaryROC()
    metric.update(torch.linspace(0, 1, 100_001), torch.arange(100_001) % 2)
    fpr, tpr, thresholds = as_points(metric.compute())
    assert len(fpr) == len(tpr) == len(thresholds) <= 40_000 // 3 + 1
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0.0, 0.0, 1.0, 1.0)
    classes = MulticlassPrecisionRecallCurve(4, thresholds=5)
    classes.update(torch.rand(8, 4), torch.arange(8) % 4)
    value = classes.compute()
    for points, tensor in zip(as_points(value), value, strict=True):
        torch.testing.assert_close(torch.tensor(points), tensor, equal_nan=True)
    assert as_points([torch.zeros(30_000, 3)]) is None


def test_only_what_plots_itself_is_a_curve_or_a_matrix():
    class Own(Metric):
        def update(self):
            pass

        def compute(self):
            pass

    pair = (torch.zeros(3), torch.zeros(3))
    assert is_curve(BinaryROC(), pair)
    assert not is_curve(Own(), pair)
    assert not is_curve(BinaryROC(), (torch.tensor(1.0), torch.tensor(2.0)))
    assert is_matrix(MulticlassConfusionMatrix(2), torch.zeros(2, 2))
    assert not is_matrix(Own(), torch.zeros(2, 2))
    assert not is_matrix(MulticlassAccuracy(2), torch.zeros(2))


def test_matrices_are_drawn_without_a_window():
    several = MultilabelConfusionMatrix(3)
    several.update(torch.rand(8, 3), torch.randint(0, 2, (8, 3)))
    assert len(draw(several, several.compute()).axes) >= 3
    large = draw(MulticlassConfusionMatrix(40), torch.ones(40, 40))
    assert list(large.axes[0].texts) == []
    assert pyplot.get_fignums() == []
