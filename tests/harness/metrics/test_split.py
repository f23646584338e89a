from __future__ import annotations

import inspect
import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torchmetrics.classification
import torchmetrics.regression
from torch import nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torchmetrics import Metric, MetricCollection
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MultilabelAccuracy,
)
from torchmetrics.regression import (
    MeanSquaredError,
    PearsonCorrCoef,
    R2Score,
    SpearmanCorrCoef,
)

from harness.accelerators.single import SingleDevice
from harness.errors import CheckpointError
from harness.metrics.loss import LossAverage
from harness.metrics.sets import MetricSet, as_metric_set, metric_name, named_metrics
from harness.metrics.split import GROUP, SplitMetrics, check_saved, plain, takes_groups
from harness.pytree import flatten, restore

LISTED = "Metric .* will save all"  # torchmetrics, of metrics that list their samples
pytestmark = pytest.mark.filterwarnings(f"ignore:{LISTED}")

CLASSES = 4
# Uneven, with single rows, and more batches than one group holds.
SIZES = [3, 1, 7, 1, 5, 2, 8] * 10
assert len(SIZES) > 2 * GROUP


def split_metrics(metrics) -> SplitMetrics:
    return SplitMetrics(named_metrics(metrics), SingleDevice("cpu"))


# --- the loss average


def test_loss_average_over_uneven_batches_is_by_samples():
    # (1.0 * 3 + 4.0 * 1 + 0.5 * 8) / 12 = 11 / 12
    average = LossAverage()
    for loss, rows in ((1.0, 3), (4.0, 1), (0.5, 8)):
        average.update({"opt": torch.tensor(loss)}, rows)
    assert average.compute() == 11 / 12


def test_loss_average_is_kept_for_each_name():
    # gen (1 * 2 + 4 * 1) / 3 = 2, disc (10 * 2 + 1 * 1) / 3 = 7
    average = LossAverage()
    average.update({"gen": torch.tensor(1.0), "disc": torch.tensor(10.0)}, 2)
    average.update({"gen": torch.tensor(4.0), "disc": torch.tensor(1.0)}, 1)
    assert average.compute() == {"gen": 2.0, "disc": 7.0}


def test_loss_average_of_many_small_losses_is_exact_to_float64():
    # float32 losses; fsum is exact and rounds once.
    generator = torch.Generator().manual_seed(0)
    losses = torch.rand(2500, generator=generator) * 1e4
    rows = torch.randint(1, 9, (2500,), generator=generator).tolist()
    average = LossAverage()
    for loss, count in zip(losses, rows, strict=True):
        average.update({"opt": loss}, count)
    products = (a * b for a, b in zip(losses.tolist(), rows, strict=True))
    exact = math.fsum(products) / sum(rows)
    assert average.compute() == pytest.approx(exact, rel=1e-13)


def test_loss_average_asked_twice_gives_the_same_and_goes_on():
    average = LossAverage()
    average.update({"opt": torch.tensor(1.0)}, 1)
    assert average.compute() == average.compute() == 1.0
    average.update({"opt": torch.tensor(2.0)}, 3)
    assert average.compute() == 1.75  # (1 + 2 * 3) / 4


def test_loss_average_takes_a_lone_loss_and_plain_numbers():
    average = LossAverage()
    average.update(torch.tensor(1.0), 1)
    average.update(3.0, 1)
    assert average.compute() == 2.0


def test_loss_average_passes_over_batches_without_rows():
    average = LossAverage()
    average.update({"opt": torch.tensor(math.nan)}, 0)
    average.update({"opt": torch.tensor(2.0)}, 4)
    assert average.compute() == 2.0


def test_loss_average_of_no_rows_is_nan_and_of_nothing_is_empty():
    average = LossAverage()
    assert average.compute() == {}
    average.update({"opt": torch.tensor(1.0)}, 0)
    assert math.isnan(average.compute())


def test_loss_average_tells_infinite_and_nan_losses():
    average = LossAverage()
    average.update({"opt": torch.tensor(1.0)}, 1)
    average.update({"opt": torch.tensor(math.inf)}, 1)
    assert average.compute() == math.inf
    average.update({"opt": torch.tensor(math.nan)}, 1)
    assert math.isnan(average.compute())


def test_loss_average_of_half_precision_is_summed_in_float64():
    average = LossAverage()
    for _ in range(1000):
        average.update({"opt": torch.tensor(1000.0, dtype=torch.bfloat16)}, 1)
    assert average.compute() == 1000.0


def test_loss_average_holds_no_graph():
    average = LossAverage()
    average.update({"opt": torch.tensor(1.0, requires_grad=True) * 2}, 1)
    (waiting,) = average.state_dict()["opt"]["waiting"]
    assert waiting.grad_fn is None
    assert not waiting.requires_grad


def test_loss_average_reset_forgets():
    average = LossAverage()
    average.update({"opt": torch.tensor(9.0)}, 1)
    average.reset()
    assert average.compute() == {}


# --- names and what is no metric


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
    assert list(named_metrics([metric])) == [name]


def test_named_metrics_takes_the_keys_of_a_dict():
    metrics = {"top": MulticlassAccuracy(3), "own": nn.functional.mse_loss}
    assert named_metrics(metrics) == metrics


def test_named_metrics_takes_one_alone_or_none():
    metric = MeanSquaredError()
    assert named_metrics(metric) == {"mean_squared_error": metric}
    assert named_metrics(None) == {}


def test_named_metrics_takes_a_collection_apart():
    collection = MetricCollection({"mse": MeanSquaredError(), "r2": R2Score()})
    found = named_metrics(collection)
    assert {name: type(item) for name, item in found.items()} == {
        "mse": MeanSquaredError,
        "r2": R2Score,
    }


@pytest.mark.parametrize("form", [lambda m: [m], lambda m: {"a": m}])
def test_named_metrics_with_a_collection_among_others_is_refused(form):
    collection = MetricCollection([MeanSquaredError()])
    with pytest.raises(TypeError, match="expected a metric, got MetricCollection"):
        named_metrics(form(collection))


def test_named_metrics_with_one_name_twice_is_refused():
    with pytest.raises(ValueError, match=r"each name once .* got 'mean_squared_error'"):
        named_metrics([MeanSquaredError(), MeanSquaredError()])


def test_named_metrics_called_loss_is_refused():
    with pytest.raises(ValueError, match=r"'loss' is taken\), got 'loss'"):
        named_metrics({"loss": MeanSquaredError()})


def test_named_metrics_class_instead_of_instance_is_refused():
    with pytest.raises(
        TypeError, match=r"metrics\['mse'\]: .*Write MeanSquaredError\("
    ):
        named_metrics({"mse": MeanSquaredError})


def test_named_metrics_that_are_none_are_refused():
    with pytest.raises(TypeError, match=r"metrics\[1\]: expected a metric, got 'acc'"):
        named_metrics([MeanSquaredError(), "acc"])


def test_metric_set_joins_common_and_own():
    mse, r2, top = MeanSquaredError(), R2Score(), MulticlassAccuracy(3)
    metrics = MetricSet([mse], train={"r2": r2}, valid={"top": top})
    assert metrics.train == {"mean_squared_error": mse, "r2": r2}
    assert metrics.valid == {"mean_squared_error": mse, "top": top}


def test_metric_set_own_name_that_is_common_is_refused():
    with pytest.raises(ValueError, match=r"MetricSet\(valid\): .*got 'm' twice"):
        MetricSet({"m": MeanSquaredError()}, valid={"m": R2Score()})


def test_as_metric_set_takes_any_form():
    given = MetricSet()
    assert as_metric_set(given) is given
    assert list(as_metric_set([MeanSquaredError()]).train) == ["mean_squared_error"]
    assert as_metric_set(None).valid == {}


# --- functions


def test_function_is_averaged_by_samples():
    # |pred - target| means: 1 over 3 rows, 5 over 1 row: (3 + 5) / 4 = 2
    metrics = split_metrics({"mae": nn.functional.l1_loss})
    metrics.update(torch.ones(3), torch.zeros(3), None, 3)
    metrics.update(torch.full((1,), 5.0), torch.zeros(1), None, 1)
    assert metrics.compute() == {"mae": 2.0}


def test_function_may_give_a_number():
    metrics = split_metrics({"rows": lambda pred, target: len(pred)})
    metrics.update(torch.ones(3), torch.zeros(3), None, 3)
    assert metrics.compute() == {"rows": 3.0}


def test_function_without_samples_is_nan():
    metrics = split_metrics({"f": nn.functional.l1_loss})
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert math.isnan(metrics.compute()["f"])


# --- groups of batches against single ones


def families() -> list[type[Metric]]:
    found: list[type[Metric]] = []
    for module in (torchmetrics.classification, torchmetrics.regression):
        for name in sorted(module.__all__):
            item = getattr(module, name)
            needs_task = "task" in inspect.signature(item.__new__).parameters
            if issubclass(item, Metric) and not needs_task:
                found.append(item)
    return found


VALUES = {"num_classes": CLASSES, "num_labels": CLASSES, "num_groups": 2, "beta": 0.5}
VALUES |= {"threshold": 0.5, "p": 2}
VALUES |= dict.fromkeys(
    ["min_recall", "min_precision", "min_specificity", "min_sensitivity"], 0.5
)


def made(kind: type[Metric], **options: Any) -> Metric:
    parameters = inspect.signature(kind.__init__).parameters
    needed = {name: VALUES[name] for name in parameters if name in VALUES}
    return kind(**needed | options)


def grouped_cases():
    for kind in families():
        variants: list[dict[str, Any]] = [{}]
        parameters = inspect.signature(kind.__init__).parameters
        if "average" in parameters:
            variants += [{"average": way} for way in ("micro", "weighted", "none")]
        variants += [{"ignore_index": 1}] if "ignore_index" in parameters else []
        variants += [{"top_k": 2}] if "top_k" in parameters else []
        for options in variants:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", LISTED)
                    metric = made(kind, **options)
            except ValueError:  # not every average is every metric's
                continue
            if takes_groups(metric):
                words = [f"{name}={value}" for name, value in options.items()]
                name = " ".join([kind.__name__, *words])
                yield pytest.param(kind, options, id=name)


GROUPED = list(grouped_cases())


def inputs(kind: type[Metric]):
    """Batches; some lie within [0, 1] as probabilities do, some beyond as logits do."""
    generator = torch.Generator().manual_seed(1)
    name = kind.__name__
    for place, rows in enumerate(SIZES):
        shape: tuple[int, ...] = (rows,)
        if name == "MulticlassExactMatch":
            shape = (rows, CLASSES, 3)
        elif name.startswith("Multiclass") or name in {
            "ContinuousRankedProbabilityScore",
            "CosineSimilarity",
            "JensenShannonDivergence",
            "KLDivergence",
        }:
            shape = (rows, CLASSES)
        pred = torch.rand(shape, generator=generator)
        if name.startswith("Multiclass"):
            wanted = torch.randint(
                0, CLASSES, shape[:1] + shape[2:], generator=generator
            )
            yield (pred if place % 2 else 8 * pred - 3), wanted
            continue
        target = torch.rand(shape, generator=generator)
        if name.endswith("Divergence"):
            pred, target = (t / t.sum(1, keepdim=True) for t in (pred, target))
        if name == "ContinuousRankedProbabilityScore":
            target = target[:, 0]
        yield pred, target


def test_grouped_classes_are_those_that_decide_sample_by_sample():
    kinds = {case.values[0].__name__ for case in GROUPED}
    assert len(kinds) > 25
    assert {"MulticlassAccuracy", "MulticlassF1Score", "MeanSquaredError"} <= kinds
    assert not {name for name in kinds if name.startswith(("Binary", "Multilabel"))}


@pytest.mark.parametrize(("kind", "options"), GROUPED)
def test_groups_give_what_single_updates_give(kind, options):
    single = made(kind, **options)
    metrics = split_metrics({"m": made(kind, **options)})
    for pred, target in inputs(kind):
        single.update(pred, target)
        metrics.update(pred, target, None, len(target))
    found, expected = metrics.compute()["m"], plain(single.compute())
    if kind.__module__.startswith("torchmetrics.classification"):
        assert repr(found) == repr(expected)  # so that NaN equals NaN
    else:  # sums of the same float32 numbers, in another order
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "metric",
    [
        BinaryAccuracy(),
        MultilabelAccuracy(CLASSES),
        MulticlassAUROC(CLASSES),
        MulticlassAUROC(CLASSES, thresholds=5),
        MeanMetric(),
        PearsonCorrCoef(),
        type("Mine", (MulticlassAccuracy,), {})(CLASSES),
    ],
    ids=lambda metric: type(metric).__name__,
)
def test_metrics_that_look_at_a_whole_batch_are_not_grouped(metric):
    # Binary and curve metrics take values beyond [0, 1] in a batch as a sign of logits
    # (torchmetrics 1.9, normalize_logits_if_needed); of others nothing is known.
    assert not takes_groups(metric)


def test_binary_metric_of_logits_is_that_of_single_updates():
    # 0.3 alone is taken as a probability, below 0.5; beside 5.0 as a logit, above.
    metrics = split_metrics([BinaryAccuracy()])
    single = BinaryAccuracy()
    for pred, target in (([0.3], [0]), ([5.0, 0.3], [1, 1])):
        metrics.update(torch.tensor(pred), torch.tensor(target), None, len(pred))
        single.update(torch.tensor(pred), torch.tensor(target))
    assert metrics.compute() == {"binary_accuracy": 1.0}
    assert single.compute() == 1.0


def test_groups_of_batches_of_other_forms_are_not_joined():
    metrics = split_metrics({"acc": MulticlassAccuracy(CLASSES, average="micro")})
    single = MulticlassAccuracy(CLASSES, average="micro")
    generator = torch.Generator().manual_seed(0)

    def batch(*shape):
        pred = torch.rand(shape, generator=generator)
        return pred, torch.randint(
            0, CLASSES, shape[:1] + shape[2:], generator=generator
        )

    flat, deep, deeper = batch(5, CLASSES), batch(2, CLASSES, 3), batch(2, CLASSES, 4)
    double = (batch(3, CLASSES)[0].double(), torch.tensor([0, 1, 2]))
    labels = (torch.tensor([0, 1]), torch.tensor([0, 2]))
    for pred, target in (flat, deep, deeper, double, labels, flat):
        metrics.update(pred, target, None, len(target))
        single.update(pred, target)
    assert metrics.compute() == {"acc": single.compute().item()}


def test_groups_keep_predictions_off_the_graph():
    metrics = split_metrics([MeanSquaredError()])
    metrics.update(torch.ones(2, requires_grad=True) * 2, torch.ones(2), None, 2)
    ((pred, _),) = metrics.state_dict()["waiting"]
    assert not pred.requires_grad


def test_groups_are_bounded_in_size():
    metrics = split_metrics([MeanSquaredError()])
    for _ in range(GROUP + 1):
        metrics.update(torch.ones(2), torch.ones(2), None, 2)
    assert len(metrics.state_dict()["waiting"]) == 1
    big = torch.ones(1 << 22)
    metrics.update(big, big, None, len(big))
    assert metrics.state_dict()["waiting"] == []


# --- one split


def test_split_metrics_logs_the_loss_first_then_each_by_name():
    metrics = split_metrics({"mse": MeanSquaredError(), "mae": nn.functional.l1_loss})
    metrics.update(
        torch.tensor([1.0, 3.0]), torch.zeros(2), {"opt": torch.tensor(7.0)}, 2
    )
    # (1 + 9) / 2 = 5, (1 + 3) / 2 = 2
    assert metrics.compute() == {"loss": 7.0, "mse": 5.0, "mae": 2.0}
    assert list(metrics.compute()) == ["loss", "mse", "mae"]


def test_split_metrics_copies_what_it_is_given():
    mine = MeanSquaredError()
    mine.update(torch.ones(1), torch.zeros(1))
    metrics = split_metrics([mine])
    metrics.update(torch.full((1,), 3.0), torch.zeros(1), None, 1)
    assert metrics.compute() == {"mean_squared_error": 9.0}
    assert mine.compute() == 1.0


def test_split_metrics_reset_starts_from_nothing():
    metrics = split_metrics([MeanSquaredError(), SpearmanCorrCoef()])
    for factor in (100.0, 1.0):
        metrics.reset()
        pred, target = torch.arange(3.0) * factor, torch.arange(3.0)
        metrics.update(pred, target, {"opt": torch.tensor(factor)}, 3)
    found = metrics.compute()
    assert found["mean_squared_error"] == 0.0
    assert found["spearman_corr_coef"] == pytest.approx(1.0, abs=1e-5)  # float32
    assert found["loss"] == 1.0


def test_split_metrics_passes_over_batches_without_rows():
    metrics = split_metrics([MeanSquaredError()])
    metrics.update(torch.ones(2), torch.zeros(2), {"opt": torch.tensor(1.0)}, 2)
    empty = torch.zeros(0)
    metrics.update(empty, empty, {"opt": torch.tensor(math.nan)}, 0)
    assert metrics.compute() == {"loss": 1.0, "mean_squared_error": 1.0}


def test_split_metrics_without_losses_has_no_loss():
    metrics = split_metrics([MeanSquaredError()])
    metrics.update(torch.ones(2), torch.zeros(2), {}, 2)
    assert metrics.compute() == {"mean_squared_error": 1.0}


def test_split_metrics_names_the_metric_that_failed():
    metrics = split_metrics({"acc": MulticlassAUROC(CLASSES)})
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the note is the subject
        metrics.update(torch.zeros(2), torch.zeros(2, dtype=torch.long), None, 2)
    assert caught.value.__notes__ == ["in metric 'acc'"]


def test_split_metrics_names_the_metric_that_failed_to_compute():
    class Broken(MeanMetric):
        def update(self, pred, target):  # type: ignore[override]
            """Nothing."""

        def compute(self):
            raise ArithmeticError

    metrics = split_metrics({"bad": Broken()})
    metrics.update(torch.zeros(2), torch.zeros(2), None, 2)
    with pytest.raises(ArithmeticError) as caught:
        metrics.compute()
    assert caught.value.__notes__ == ["in metric 'bad'"]


def test_split_metrics_takes_predictions_that_are_no_tensors():
    class Pairs(MeanMetric):
        def update(self, pred, target):  # type: ignore[override]
            super().update(pred[0] - target)

    metrics = split_metrics({"p": Pairs(), "mse": lambda pred, target: pred[1].sum()})
    pred = (torch.tensor([3.0, 5.0]), torch.tensor([10.0]))
    metrics.update(pred, torch.zeros(2), None, 2)
    assert metrics.compute() == {"p": 4.0, "mse": 10.0}


def test_split_metrics_vector_is_named_by_place_and_matrix_is_nested():
    metrics = split_metrics(
        {
            "each": MulticlassAccuracy(3, average=None),
            "confusion": MulticlassConfusionMatrix(3),
        }
    )
    metrics.update(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 2]), None, 3)
    assert metrics.compute() == {
        "each": {"0": 1.0, "1": 1.0, "2": 0.0},
        "confusion": [[1, 0, 0], [0, 1, 0], [0, 1, 0]],
    }


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (torch.tensor(1.5), 1.5),
        (torch.tensor([1.0, 2.0]), {"0": 1.0, "1": 2.0}),
        (torch.zeros(2, 1), [[0.0], [0.0]]),
        (torch.zeros(101), [0.0] * 101),
        ({"a": torch.tensor(1)}, {"a": 1}),
        ((torch.tensor(1), torch.tensor([2])), {"0": 1, "1": {"0": 2}}),
        (3, 3),
    ],
)
def test_plain_turns_values_into_numbers(value, found):
    assert plain(value) == found


# --- state


def whole_set() -> SplitMetrics:
    return split_metrics(
        {
            "acc": MulticlassAccuracy(CLASSES),
            "auroc": MulticlassAUROC(CLASSES),
            "own": lambda pred, target: pred.mean(),
            "f1": MulticlassF1Score(CLASSES, average=None),
        }
    )


def feed(metrics: SplitMetrics, batches) -> None:
    for pred, target in batches:
        losses = {"gen": pred.mean(), "disc": pred.max()}
        metrics.update(pred, target, losses, len(target))


@pytest.mark.parametrize("at", [0, 1, 5, GROUP - 1, GROUP, GROUP + 7, 69])
def test_state_taken_in_the_middle_of_a_group_goes_on_bit_for_bit(at):
    batches = list(inputs(MulticlassAccuracy))
    unbroken, first, second = whole_set(), whole_set(), whole_set()
    feed(unbroken, batches)
    feed(first, batches[:at])
    plan, tensors = flatten(first.state_dict())
    state = restore(plan, {name: t.clone() for name, t in tensors.items()})
    feed(first, batches[at : at + 3])  # what comes later is not in the state
    feed(second, batches[:11])  # what was there before is replaced
    second.load_state_dict(state)
    feed(second, batches[at:])
    assert second.compute() == unbroken.compute()


def test_state_of_an_epoch_with_other_metrics_is_refused():
    first = split_metrics({"acc": MulticlassAccuracy(CLASSES)})
    second = split_metrics({"f1": MulticlassF1Score(CLASSES)})
    second.load_state_dict(first.state_dict(is_running=False))  # between two epochs
    with pytest.raises(CheckpointError, match=r"the metrics \{'acc'.*got \{'f1'"):
        second.load_state_dict(first.state_dict())


def test_states_of_ranks_that_cannot_be_joined_are_refused():
    items = {"acc": MulticlassAccuracy(CLASSES), "corr": PearsonCorrCoef()}
    saved = split_metrics(items).state_dict()["metrics"]
    check_saved(items, saved)
    with pytest.raises(CheckpointError, match=r"'corr' to sum or list its states, got"):
        check_saved(items, saved, is_joined=True)


def test_batches_that_wait_on_ranks_are_joined_whatever_their_form():
    first, second, both = (split_metrics([MulticlassAccuracy(4)]) for _ in range(3))
    for metrics, width in ((first, 3), (second, 5)):
        pred, target = torch.rand(6, 4, width), torch.randint(4, (6, width))
        for one in (metrics, both):
            one.update(pred, target, None, 6)
    first.join(second.state_dict())
    assert first.compute() == both.compute()


def test_state_of_grouped_regression_goes_on_bit_for_bit():
    batches = list(inputs(MeanSquaredError))
    metrics = [split_metrics([MeanSquaredError(), R2Score()]) for _ in range(2)]
    for place, (pred, target) in enumerate(batches):
        for item in metrics:
            item.update(pred, target, {"opt": pred.mean()}, len(pred))
        if place % 5 == 0:
            fresh = split_metrics([MeanSquaredError(), R2Score()])
            fresh.load_state_dict(metrics[1].state_dict())
            metrics[1] = fresh
    assert metrics[1].compute() == metrics[0].compute()


def test_split_metrics_on_one_rank_never_meets_a_process_group():
    # A group that waits for a second rank: any exchange would hang, then raise.
    store = HashStore()
    if torch.distributed.is_initialized():
        pytest.skip("another test's process group is there")
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        calls = []
        metric = MulticlassAccuracy(num_classes=3)
        metric.dist_sync_fn = lambda *args, **kwargs: calls.append(args)
        split = SplitMetrics({"accuracy": metric}, SingleDevice("cpu"))
        split.update(torch.eye(3), torch.arange(3), {"opt": torch.tensor(1.0)}, 3)
        assert split.compute() == {"loss": 1.0, "accuracy": 1.0}
        assert calls == []
    finally:
        torch.distributed.destroy_process_group()
