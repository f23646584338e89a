from __future__ import annotations

import copy
import inspect
import math
import warnings
from typing import Any

import pytest
import torch
import torchmetrics.classification
import torchmetrics.regression
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from torchmetrics.classification import (
    BinaryAccuracy,
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
from torchmetrics.wrappers import MinMaxMetric, Running

import harness
from harness.accelerators.single import SingleDevice
from harness.errors import CheckpointError
from harness.metrics import split
from harness.metrics.sets import name_metrics
from harness.metrics.split import GROUP_BATCHES, SplitMetrics, as_numbers, can_group
from harness.pytree import flatten, restore
from tests.harness.fakes import line_learner, slope

LISTED = "Metric .* will save all"  # torchmetrics, for metrics that list their samples
pytestmark = pytest.mark.filterwarnings(f"ignore:{LISTED}")

CLASSES = 4
# Uneven, with single rows, and more batches than one group.
SIZES = [3, 1, 7, 1, 5, 2, 8] * 10
assert len(SIZES) > 2 * GROUP_BATCHES


def split_metrics(metrics) -> SplitMetrics:
    return SplitMetrics(name_metrics(metrics), SingleDevice("cpu"))


# --- functions


def test_function_is_averaged_by_rows():
    # |pred - target| means: 1 over 3 rows, 5 over 1 row: (3 + 5) / 4 = 2
    metrics = split_metrics({"mae": nn.functional.l1_loss})
    metrics.update(torch.ones(3), torch.zeros(3), None, 3)
    metrics.update(torch.full((1,), 5.0), torch.zeros(1), None, 1)
    assert metrics.compute() == {"mae": 2.0}


@pytest.mark.parametrize("target", [None, ["a", "b", "c"], torch.tensor(0.0)])
def test_function_is_averaged_by_the_rows_that_are_given(target):
    # 1 over 3 rows and 5 over 1 row: (3 + 5) / 4 = 2
    metrics = split_metrics({"mean": lambda pred, target: pred["x"].mean()})
    metrics.update({"x": torch.ones(3)}, target, None, 3)
    metrics.update({"x": torch.full((1,), 5.0)}, target, None, 1)
    assert metrics.compute() == {"mean": 2.0}


def test_function_may_return_a_number():
    metrics = split_metrics({"rows": lambda pred, target: len(pred)})
    metrics.update(torch.ones(3), torch.zeros(3), None, 3)
    assert metrics.compute() == {"rows": 3.0}


def test_metrics_without_a_batch_have_no_value():
    metrics = split_metrics(
        {
            "function": lambda pred, target: pred.mean(),
            "sum": MulticlassAccuracy(num_classes=3),
            "list": MulticlassAUROC(num_classes=3),
            "wrapper": MinMaxMetric(MulticlassAccuracy(num_classes=3)),
        }
    )
    assert metrics.compute() == {}
    metrics.update(torch.eye(3), torch.arange(3), None, 3)
    restored = split_metrics({"function": nn.functional.l1_loss})
    restored.load_state_dict(split_metrics({"function": max}).state_dict())
    assert restored.compute() == {}
    metrics.reset()
    assert metrics.compute() == {}


class Forgetful(Metric):
    """Resets itself alone: the metric in it would be of all epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.error = MeanSquaredError()

    def update(self, pred, target):
        self.error.update(pred, target)

    def compute(self):
        return self.error.compute()


@pytest.mark.parametrize(
    "metric",
    [lambda: Running(MeanSquaredError(), window=5), Forgetful],
    ids=["counts no updates", "does not reset all"],
)
def test_wrapper_gives_each_epoch_its_own_value(metric):
    metrics = split_metrics({"error": metric()})
    for value in (1.0, 3.0):
        metrics.reset()
        metrics.update(torch.full((2,), value), torch.zeros(2), None, 2)
        restored = split_metrics({"error": metric()})
        restored.load_state_dict(metrics.state_dict())
        assert metrics.compute() == restored.compute() == {"error": value**2}
    metrics.reset()
    assert metrics.compute() == {}


def test_function_is_nan_if_no_row_counts():
    metrics = split_metrics({"f": nn.functional.l1_loss})
    metrics._metrics["f"].update(torch.ones(2), torch.ones(2), 0)
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


def make(kind: type[Metric], **options: Any) -> Metric:
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
                    metric = make(kind, **options)
            except ValueError:  # not every average is every metric's
                continue
            if can_group(metric):
                words = [f"{name}={value}" for name, value in options.items()]
                name = " ".join([kind.__name__, *words])
                yield pytest.param(kind, options, id=name)


GROUPED = list(grouped_cases())


def inputs(kind: type[Metric]):
    """Batches, some within [0, 1] like probabilities, some beyond like logits."""
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


def test_can_group_is_true_for_classes_that_look_at_single_rows():
    kinds = {case.values[0].__name__ for case in GROUPED}
    assert len(kinds) > 25
    assert {"MulticlassAccuracy", "MulticlassF1Score", "MeanSquaredError"} <= kinds
    assert not {name for name in kinds if name.startswith(("Binary", "Multilabel"))}


@pytest.mark.parametrize(("kind", "options"), GROUPED)
def test_groups_equal_single_updates(kind, options):
    single = make(kind, **options)
    metrics = split_metrics({"m": make(kind, **options)})
    for pred, target in inputs(kind):
        single.update(pred, target)
        metrics.update(pred, target, None, len(target))
    found, expected = metrics.compute()["m"], as_numbers(single.compute())
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
def test_can_group_is_false_for_metrics_that_look_at_a_whole_batch(metric):
    # Binary and curve metrics take values beyond [0, 1] in a batch as a sign of logits
    # (torchmetrics 1.9, normalize_logits_if_needed); nothing is known of others.
    assert not can_group(metric)


def test_binary_metric_of_logits_equals_single_updates():
    # 0.3 alone is taken as a probability, below 0.5; beside 5.0 as a logit, above.
    metrics = split_metrics([BinaryAccuracy()])
    single = BinaryAccuracy()
    for pred, target in (([0.3], [0]), ([5.0, 0.3], [1, 1])):
        metrics.update(torch.tensor(pred), torch.tensor(target), None, len(pred))
        single.update(torch.tensor(pred), torch.tensor(target))
    assert metrics.compute() == {"binary_accuracy": 1.0}
    assert single.compute() == 1.0


def test_predictions_that_fill_a_group_are_used_without_a_copy(monkeypatch):
    monkeypatch.setattr(split, "GROUP_NUMEL", 5 * CLASSES)
    seen = []

    class Seen(MulticlassAccuracy):
        def update(self, preds: Tensor, target: Tensor) -> None:
            seen.append(preds.data_ptr())
            super().update(preds, target)

    Seen.__module__ = MulticlassAccuracy.__module__  # so that it can be grouped
    metrics = split_metrics({"acc": Seen(CLASSES)})
    metrics.update(torch.rand(2, CLASSES), torch.zeros(2).long(), None, 2)
    large = torch.rand(5, CLASSES)
    metrics.update(large, torch.zeros(5).long(), None, 5)
    assert len(seen) == 2  # the waiting one came first
    assert seen[1] == large.data_ptr()


def test_groups_do_not_mix_batches_of_different_shapes():
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


def test_groups_detach_predictions():
    metrics = split_metrics([MeanSquaredError()])
    metrics.update(torch.ones(2, requires_grad=True) * 2, torch.ones(2), None, 2)
    ((pred, _),) = metrics.state_dict()["waiting"]
    assert not pred.requires_grad


def test_what_metrics_keep_is_held_by_value():
    class Keeps(Metric):
        """A metric of the user's that lists what it gets."""

        def __init__(self):
            super().__init__()
            self.add_state("seen", [], dist_reduce_fx="cat")

        def update(self, pred, target):
            self.seen.append(pred["all"][0])

        def compute(self):
            return torch.cat(self.seen)

    one, other = split_metrics([MeanSquaredError()]), split_metrics({"k": Keeps()})
    pred, target = torch.zeros(2), torch.zeros(2)
    for number in (1.0, 2.0):
        one.update(pred.fill_(number), target.fill_(0.0), None, 2)
        other.update({"all": [pred]}, target, None, 2)
    pred.zero_(), target.fill_(9.0)
    assert one.compute() == {"mean_squared_error": 2.5}  # (1 + 1 + 4 + 4) / 4
    assert list(other.compute()["k"].values()) == [1, 1, 2, 2]


def test_groups_are_bounded_in_size():
    metrics = split_metrics([MeanSquaredError()])
    for _ in range(GROUP_BATCHES + 1):
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


def test_split_metrics_reset_removes_all_batches():
    metrics = split_metrics([MeanSquaredError(), SpearmanCorrCoef()])
    for factor in (100.0, 1.0):
        metrics.reset()
        pred, target = torch.arange(3.0) * factor, torch.arange(3.0)
        metrics.update(pred, target, {"opt": torch.tensor(factor)}, 3)
    found = metrics.compute()
    assert found["mean_squared_error"] == 0.0
    assert found["spearman_corr_coef"] == pytest.approx(1.0, abs=1e-5)  # float32
    assert found["loss"] == 1.0


def test_split_metrics_ignores_batches_without_rows():
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


def test_split_metrics_accepts_predictions_that_are_tuples():
    class Pairs(MeanMetric):
        def update(self, pred, target):  # type: ignore[override]
            super().update(pred[0] - target)

    metrics = split_metrics({"p": Pairs(), "mse": lambda pred, target: pred[1].sum()})
    pred = (torch.tensor([3.0, 5.0]), torch.tensor([10.0]))
    metrics.update(pred, torch.zeros(2), None, 2)
    assert metrics.compute() == {"p": 4.0, "mse": 10.0}


def test_split_metrics_vector_is_named_by_position_and_matrix_is_nested():
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
def test_as_numbers_converts_values(value, found):
    assert as_numbers(value) == found


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


@pytest.mark.parametrize(
    "at", [0, 1, 5, GROUP_BATCHES - 1, GROUP_BATCHES, GROUP_BATCHES + 7, 69]
)
def test_state_taken_in_the_middle_of_a_group_continues_bit_for_bit(at):
    batches = list(inputs(MulticlassAccuracy))
    unbroken, first, second = whole_set(), whole_set(), whole_set()
    feed(unbroken, batches)
    feed(first, batches[:at])
    plan, tensors = flatten(first.state_dict())
    state = restore(plan, {name: t.clone() for name, t in tensors.items()})
    feed(first, batches[at : at + 3])  # later batches are not in the state
    feed(second, batches[:11])  # earlier batches are replaced
    second.load_state_dict(state)
    feed(second, batches[at:])
    assert second.compute() == unbroken.compute()


def test_state_of_an_epoch_with_other_metrics_is_refused():
    first = split_metrics({"acc": MulticlassAccuracy(CLASSES)})
    second = split_metrics({"f1": MulticlassF1Score(CLASSES)})
    second.load_state_dict(first.state_dict(is_running=False))  # between two epochs
    with pytest.raises(CheckpointError, match=r"the metrics \{'acc'.*got \{'f1'"):
        second.load_state_dict(first.state_dict())


def test_merge_adds_waiting_batches_of_any_shape():
    first, second, both = (split_metrics([MulticlassAccuracy(4)]) for _ in range(3))
    for metrics, width in ((first, 3), (second, 5)):
        pred, target = torch.rand(6, 4, width), torch.randint(4, (6, width))
        for one in (metrics, both):
            one.update(pred, target, None, 6)
            one.add_values([("width", {"": width})], width)
    first.merge(second.state_dict())
    assert first.compute() == both.compute()


class TwoAlike(SingleDevice):
    """One of two ranks that have seen the same."""

    world_size = 2

    def gather_objects(self, value):
        return [value, copy.deepcopy(value)]


def test_value_of_all_ranks_leaves_each_rank_its_own_states():
    metrics = SplitMetrics({"table": MulticlassConfusionMatrix(2)}, TwoAlike("cpu"))
    metrics.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]), None, 3)
    assert metrics.compute()["table"] == [[2, 2], [0, 2]]
    (state,) = metrics.state_dict()["metrics"].values()
    assert [own.tolist() for own in flatten(state)[1].values()] == [[[1, 1], [0, 1]]]


def test_state_of_grouped_regression_continues_bit_for_bit():
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


def test_split_metrics_on_one_rank_uses_no_process_group():
    store = HashStore()
    if torch.distributed.is_initialized():
        pytest.skip("another test left a process group")
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


class CountsTraining(Metric):
    """Counts the rows of training batches, which only the context tells apart."""

    full_state_update = False
    ctx: Any
    rows: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        self.rows += self.ctx.rows if self.ctx.training else 0

    def compute(self) -> Tensor:
        return self.rows


class OwnCtx(CountsTraining):
    """Uses the name for something else."""

    def __init__(self) -> None:
        super().__init__()
        self.ctx = "mine"

    def update(self, pred: Tensor, target: Tensor) -> None:
        assert self.ctx == "mine"


class OfFunction:
    """A function with a place for the context."""

    ctx: harness.Context | None = None

    def __call__(self, pred: Tensor, target: Tensor) -> float:
        assert self.ctx is not None
        return float(self.ctx.epoch or 0)


class Plain:
    """A function whose class has no place for it."""

    def __call__(self, pred: Tensor, target: Tensor) -> float:
        return float(hasattr(self, "ctx"))


def test_metrics_with_room_for_it_have_the_context():
    metrics: dict[str, Any] = {
        "rows": CountsTraining(),
        "wrapped": CountsTraining() + CountsTraining(),
        "own": OwnCtx(),
        "epoch": OfFunction(),
        "plain": Plain(),
    }
    fitted = line_learner(metrics=metrics).fit(
        slope(6), 2, slope(4), tracker=False, verbose=False
    )
    (_, train), (_, valid) = (
        fitted.records["metrics"]["train"],
        fitted.records["metrics"]["valid"],
    )
    names = ("rows", "wrapped", "own", "epoch", "plain")
    assert [train[name] for name in names] == [6, 12, 0, 2.0, 0.0]
    assert [valid[name] for name in names] == [0, 0, 0, 2.0, 0.0]
    assert not hasattr(metrics["rows"], "ctx")  # a fit uses a copy
    assert metrics["own"].ctx == "mine"


def test_metric_with_the_context_resumes(tmp_path):
    def fit(*callbacks):
        return line_learner(metrics=[CountsTraining()]).fit(
            slope(8),
            2,
            callbacks=callbacks,
            dataloader_options={"batch_size": 2},
            tracker=False,
            verbose=False,
        )

    fit(harness.callbacks.ModelCheckpoint(tmp_path, every_n_steps=3))
    resumed = fit(harness.callbacks.ResumeFromCheckpoint(tmp_path))
    assert resumed.records["metrics"]["train"][-1]["counts_training"] == 8


def test_value_so_far_asks_no_metric_that_asks_other_ranks():
    own = MeanSquaredError(dist_sync_fn=lambda tensor, group: [tensor])
    metrics = split_metrics({"plain": MeanSquaredError(), "own": own})
    for metric in metrics._metrics.values():
        metric.update(torch.tensor([1.0, 3.0]), torch.zeros(2))
    assert metrics.peek() == {"plain": 5.0}
