from __future__ import annotations

from functools import partial

import pytest
from torch import nn
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.classification import (
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)
from torchmetrics.regression import MeanSquaredError, R2Score

from harness.metrics.sets import MetricSet, as_metric_set, metric_name, name_metrics


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (MulticlassAccuracy(3), "multiclass_accuracy"),
        (MulticlassF1Score(3), "multiclass_f1_score"),
        (BinaryAUROC(), "binary_auroc"),
        (MulticlassAUROC(3), "multiclass_auroc"),
        (R2Score(), "r2_score"),
        (nn.L1Loss(), "l1_loss"),
        (nn.functional.mse_loss, "mse_loss"),
        (lambda pred, target: 0, "lambda"),
        (partial(nn.functional.mse_loss), "partial"),
    ],
)
def test_metric_name_is_the_class_in_snake_case(metric, name):
    assert metric_name(metric) == name
    assert list(name_metrics([metric])) == [name]


def test_name_metrics_uses_the_keys_of_a_dict():
    metrics = {"top": MulticlassAccuracy(3), "own": nn.functional.mse_loss}
    assert name_metrics(metrics) == metrics


def test_name_metrics_accepts_one_metric_or_none():
    metric = MeanSquaredError()
    assert name_metrics(metric) == {"mean_squared_error": metric}
    assert name_metrics(None) == {}


def test_name_metrics_splits_a_collection():
    collection = MetricCollection({"mse": MeanSquaredError(), "r2": R2Score()})
    found = name_metrics(collection)
    assert {name: type(item) for name, item in found.items()} == {
        "mse": MeanSquaredError,
        "r2": R2Score,
    }


def test_name_metrics_splits_a_collection_among_others():
    collection = MetricCollection([MeanSquaredError()], prefix="of_")
    assert set(name_metrics([collection, R2Score()])) == {
        "of_MeanSquaredError",
        "r2_score",
    }
    assert set(name_metrics({"a": collection, "b": R2Score()})) == {
        "a_of_MeanSquaredError",
        "b",
    }


def test_name_metrics_of_a_tracker_is_refused():
    with pytest.raises(TypeError, match="metric of one epoch, got MetricTracker"):
        name_metrics([MetricTracker(MeanSquaredError())])


def test_name_metrics_with_one_name_twice_is_refused():
    with pytest.raises(ValueError, match=r"each name once .* got 'mean_squared_error'"):
        name_metrics([MeanSquaredError(), MeanSquaredError()])


def test_name_metrics_called_loss_is_refused():
    with pytest.raises(ValueError, match=r"'loss' is taken\), got 'loss'"):
        name_metrics({"loss": MeanSquaredError()})


def test_name_metrics_class_instead_of_instance_is_refused():
    with pytest.raises(
        TypeError, match=r"metrics\['mse'\]: .*Write MeanSquaredError\("
    ):
        name_metrics({"mse": MeanSquaredError})


def test_name_metrics_of_other_objects_is_refused():
    with pytest.raises(TypeError, match=r"metrics\[1\]: expected a metric, got 'acc'"):
        name_metrics([MeanSquaredError(), "acc"])


def test_metric_set_merges_common_and_split_metrics():
    mse, r2, top = MeanSquaredError(), R2Score(), MulticlassAccuracy(3)
    metrics = MetricSet([mse], train={"r2": r2}, valid={"top": top})
    assert metrics.train == {"mean_squared_error": mse, "r2": r2}
    assert metrics.valid == {"mean_squared_error": mse, "top": top}


def test_metric_set_with_a_name_twice_is_refused():
    with pytest.raises(ValueError, match=r"MetricSet\(valid\): .*got 'm' twice"):
        MetricSet({"m": MeanSquaredError()}, valid={"m": R2Score()})


def test_as_metric_set_takes_any_form():
    given = MetricSet()
    assert as_metric_set(given) is given
    assert list(as_metric_set([MeanSquaredError()]).train) == ["mean_squared_error"]
    assert as_metric_set(None).valid == {}
