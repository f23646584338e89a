from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torchmetrics import CatMetric, MaxMetric, MeanMetric, Metric, MinMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef
from torchmetrics.wrappers import MinMaxMetric

from harness.errors import CheckpointError
from harness.metrics.state import (
    check_saved_metrics,
    drop_samples,
    get_changed_attributes,
    get_states,
    has_sample_lists,
    merge_states,
    plain_attributes,
    set_attributes,
    set_states,
    submetrics_of,
    unmergeable,
)

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* will save all")

MERGEABLE: dict[str, Callable[[], Metric]] = {
    "sum": MeanMetric,
    "max": MaxMetric,
    "min": MinMetric,
    "list": CatMetric,
    "wrapper": lambda: MinMaxMetric(MeanMetric()),
    "arithmetic": lambda: MeanMetric() + MaxMetric(),
}


def test_submetrics_of_a_wrapper_has_the_metric_below_it():
    metric = MinMaxMetric(MeanMetric())
    found = submetrics_of(metric)
    assert found[""] is metric
    assert [type(item) for item in found.values()] == [MinMaxMetric, MeanMetric]


def test_set_states_continues_with_the_values_and_the_update_count():
    first, second = MeanMetric(), MeanMetric()
    first.update(torch.tensor([1.0, 2.0]))
    second.update(torch.tensor(100.0))
    second.compute()
    set_states(second, get_states(first))
    assert second.update_count == 1
    assert second.compute() == 1.5


@pytest.mark.parametrize("name", MERGEABLE)
def test_merge_states_equals_one_metric_with_all_values(name):
    both, first, second = (MERGEABLE[name]() for _ in range(3))
    for value, metric in ((1.0, first), (5.0, second), (3.0, second)):
        metric.update(torch.tensor(value))
        both.update(torch.tensor(value))
    assert unmergeable(first) == []
    merge_states(first, get_states(second))
    for metric, other in zip(
        submetrics_of(first).values(), submetrics_of(both).values(), strict=True
    ):
        assert metric.update_count == other.update_count
    found, expected = first.compute(), both.compute()
    assert str(found) == str(expected)


def test_unmergeable_names_the_reductions_without_a_merge():
    assert unmergeable(PearsonCorrCoef()) == ["none"]


def test_changed_attributes_are_those_that_the_metric_changed():
    metric, fresh = (MinMaxMetric(MeanMetric()) for _ in range(2))
    before = plain_attributes(metric)
    assert get_changed_attributes(metric, before) == {}
    metric.update(torch.tensor(3.0))
    metric.compute()
    changed = get_changed_attributes(metric, before)
    assert changed == {"": {"max_val": torch.tensor(3.0), "min_val": torch.tensor(3.0)}}
    set_attributes(fresh, changed)
    assert [fresh.max_val.item(), fresh.min_val.item()] == [3.0, 3.0]


def test_set_attributes_skips_metrics_and_names_that_do_not_exist():
    metric = MinMaxMetric(MeanMetric())
    set_attributes(metric, {"gone": {"max_val": 1.0}, "": {"other": 2.0}})
    assert not hasattr(metric, "other")


def test_drop_samples_keeps_the_lists_with_an_empty_tensor():
    metric = MulticlassAUROC(3)
    metric.update(torch.eye(3), torch.arange(3))
    (dropped,) = drop_samples(get_states(metric)).values()
    shapes = {
        name: [t.shape for t in state] for name, state in dropped["state"].items()
    }
    assert shapes == {"preds": [(0, 3)], "target": [(0,)]}
    assert dropped["updates"] == 1


def test_drop_samples_of_sums_leaves_nothing():
    metric = MeanSquaredError()
    metric.update(torch.ones(2), torch.zeros(2))
    dropped = drop_samples(get_states(metric))
    assert dropped == {"": {"state": {}, "updates": 0}}


def test_has_sample_lists_looks_below_wrappers():
    assert has_sample_lists(MinMaxMetric(CatMetric()))
    assert not has_sample_lists(MinMaxMetric(MeanMetric()))


def test_check_saved_metrics_refuses_other_metrics():
    saved = {"acc": get_states(MulticlassAccuracy(3))}
    check_saved_metrics({"acc": MulticlassAccuracy(3)}, saved)
    match = r"the metrics \{'acc': \[''\]\} .*, got \{'f': \[''\]\}"
    with pytest.raises(CheckpointError, match=match):
        check_saved_metrics({"f": lambda pred, target: 0.0}, saved)


def test_check_saved_metrics_refuses_states_that_cannot_be_merged():
    items = {"acc": MulticlassAccuracy(3), "corr": PearsonCorrCoef()}
    saved = {name: get_states(item) for name, item in items.items()}
    check_saved_metrics(items, saved)
    with pytest.raises(CheckpointError, match=r"'corr' to sum or list its states, got"):
        check_saved_metrics(items, saved, is_merged=True)
