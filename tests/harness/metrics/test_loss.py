from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from harness.metrics.functions import FunctionAverage
from harness.metrics.loss import LossAverage
from harness.pytree import flatten


def test_loss_average_of_uneven_batches_is_weighted_by_rows():
    # (1.0 * 3 + 4.0 * 1 + 0.5 * 8) / 12 = 11 / 12
    average = LossAverage()
    for loss, rows in ((1.0, 3), (4.0, 1), (0.5, 8)):
        average.update({"opt": torch.tensor(loss)}, rows)
    assert average.compute() == 11 / 12


def test_loss_average_is_separate_for_each_name():
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


def test_loss_average_computed_twice_is_the_same_and_continues():
    average = LossAverage()
    average.update({"opt": torch.tensor(1.0)}, 1)
    assert average.compute() == average.compute() == 1.0
    average.update({"opt": torch.tensor(2.0)}, 3)
    assert average.compute() == 1.75  # (1 + 2 * 3) / 4


def test_loss_average_accepts_a_single_loss_and_numbers():
    average = LossAverage()
    average.update(torch.tensor(1.0), 1)
    average.update(3.0, 1)
    assert average.compute() == 2.0


def test_loss_average_ignores_batches_without_rows():
    average = LossAverage()
    average.update({"opt": torch.tensor(math.nan)}, 0)
    average.update({"opt": torch.tensor(2.0)}, 4)
    assert average.compute() == 2.0


def test_loss_average_of_no_rows_is_nan_and_of_nothing_is_empty():
    average = LossAverage()
    assert average.compute() == {}
    average.update({"opt": torch.tensor(1.0)}, 0)
    assert math.isnan(average.compute())


def test_loss_average_of_infinite_and_nan_losses_is_infinite_and_nan():
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


def test_loss_average_reset_removes_all_losses():
    average = LossAverage()
    average.update({"opt": torch.tensor(9.0)}, 1)
    average.reset()
    assert average.compute() == {}


def test_loss_average_keeps_losses_by_value():
    average, loss = LossAverage(), torch.zeros(())
    for number in (1.0, 2.0, 3.0):
        average.update({"opt": loss.fill_(number)}, 1)
    loss.zero_()
    assert average.compute() == 2.0


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.ones(3), r"got Tensor of shape \(3,\)"),
        ({"a": 1.0}, "got dict"),
        (None, "got NoneType"),
        ([1.0, 2.0], "got list"),
    ],
)
def test_function_that_gives_no_number_is_refused(value, match):
    with pytest.raises(TypeError, match=f"metric function: expected a number, {match}"):
        FunctionAverage(lambda pred, target: value).update(None, None, 2)


@pytest.mark.parametrize(
    "value", [2, 2.0, True, torch.tensor([[2.0]]), torch.tensor(2), np.float32(2)]
)
def test_function_may_give_any_single_number(value):
    average = FunctionAverage(lambda pred, target: value)
    average.update(None, None, 3)
    assert average.compute() == float(value)


def test_losses_of_a_device_follow_those_that_a_resume_read_on_the_cpu() -> None:
    class Folds(LossAverage):
        fold_at = 2

    saved = Folds()
    for loss in (1.0, 2.0, 3.0):  # two are in the sums, one waits
        saved.update(torch.tensor(loss), 4)
    resumed = Folds()
    resumed.load_state_dict(saved.state_dict())
    resumed.update(torch.ones((), device="meta"), 4)  # stands for a GPU
    resumed.update(5.0, 4)
    assert resumed.state_dict()["opt"]["sums"].device.type == "meta"
    resumed.update(torch.ones((), device="meta"), 4)
    assert resumed.state_dict()["opt"]["waiting"] == []


def test_function_average_moves_to_a_device_without_float64() -> None:
    def to_mps(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return tensor.clone()

    metric = FunctionAverage(lambda pred, target: (pred - target).abs().mean())
    metric._apply(to_mps)
    metric.update(torch.tensor([1.0, 2.0]), torch.zeros(2), 2)
    metric.update(torch.tensor([4.0]), torch.zeros(1), 1)
    assert metric.compute().dtype == torch.float32
    assert metric.compute().item() == pytest.approx(7 / 3)


def test_losses_that_wait_are_few_tensors_in_a_state_and_come_back_with_their_bits() -> (
    None
):
    average = LossAverage()
    values = [0.1 * n for n in range(40)]
    for value in values:
        average.update({"gen": torch.tensor(value), "disc": 2 * value}, 3)
    for value in values[:5]:
        average.update({"gen": torch.tensor(value, dtype=torch.float64)}, 1)
    state = average.state_dict()
    _, tensors = flatten(state)
    assert [len(own) for own in state["gen"]["waiting"]] == [45]
    assert len(tensors) == 2  # and not one for each loss
    other, merged = LossAverage(), LossAverage()
    other.load_state_dict(state)
    merged.merge(state)
    assert (
        other.get_sums()["gen"] == merged.get_sums()["gen"] == average.get_sums()["gen"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_losses_kept_as_numbers_have_the_bits_of_a_sum_of_tensors(dtype) -> None:
    losses = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    average, rows = LossAverage(), torch.arange(1, 101)
    for loss, count in zip(losses, rows.tolist(), strict=True):
        average.update(loss, count)
    wanted = (losses.double() * rows.double()).sum().item()
    assert average.get_sums() == {"opt": [wanted, 5050.0]}
    waiting = {"waiting": [losses], "rows": rows.tolist(), "sums": None}
    earlier = LossAverage()  # of a checkpoint that has them as tensors
    earlier.load_state_dict({"opt": waiting})
    assert earlier.get_sums() == average.get_sums()


def test_update_tells_of_a_nan_and_reads_no_device() -> None:
    average = LossAverage()
    assert average.update({"a": torch.tensor(1.0), "b": 2.0}, 1) is False
    assert average.update({"a": torch.tensor(math.nan), "b": 2.0}, 1) is True
    unread = {"a": math.nan, "b": torch.ones((), device="meta")}
    assert average.update(unread, 1) is None
    assert average.is_on_device


def test_losses_of_an_earlier_checkpoint_are_a_tensor_each() -> None:
    waiting = [torch.tensor(1.0), torch.tensor([3.0])]
    average = LossAverage()
    average.load_state_dict({"opt": {"waiting": waiting, "rows": [1, 3], "sums": None}})
    assert average.compute() == 2.5
    item = {"waiting": [torch.ones(3)], "rows": [1], "sums": None}
    with pytest.raises(ValueError, match="expected rows of 3 losses, got those of 1"):
        average.load_state_dict({"opt": item})


def test_losses_of_ranks_are_merged_whether_they_wait_or_are_summed():
    # (1 * 3 + 4 * 1 + 0.5 * 8 + 2 * 2) / 14 = 15 / 14
    merged = LossAverage()
    for loss, rows, is_summed in (
        (1.0, 3, True),
        (4.0, 1, False),
        (0.5, 8, True),
        (2.0, 2, False),
    ):
        rank = LossAverage()
        rank.update({"opt": torch.tensor(loss)}, rows)
        if is_summed:
            rank.get_sums()
        merged.merge(rank.state_dict())
    assert merged.compute() == 15 / 14
