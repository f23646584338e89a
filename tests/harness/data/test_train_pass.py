from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from harness.accelerators.single import SingleDevice
from harness.data.train_pass import (
    TrainPass,
    draws_between_batches,
    set_epoch,
    skip_batches,
)
from tests.harness.exact import LazySampler, Stream

DATA = TensorDataset(torch.arange(10))


class Count(IterableDataset):
    """Numbers, and how many were asked for."""

    def __init__(self, rows: int) -> None:
        self.rows, self.asked = rows, 0

    def __iter__(self) -> Iterator[int]:
        for row in range(self.rows):
            self.asked += 1
            yield row


def windows(
    loader: Any, accumulate: int, done: int = 0, state: Any = None
) -> list[Any]:
    """Batches with the window that the accelerator had with each."""
    accelerator = SingleDevice("cpu", accumulate=accumulate)
    one = TrainPass(loader, accelerator, 1)
    if state is not None:
        one.load_state_dict(state, done)
    return [(int(batch[0]), accelerator.window) for batch in one.start()]


@pytest.mark.parametrize("is_sized", [True, False])
def test_start_sets_the_window_of_each_step_and_a_shorter_last_one(
    is_sized: bool,
) -> None:
    sized, unsized = DataLoader(DATA), DataLoader(Count(10))
    found = windows([[x[0]] for x in sized] if is_sized else unsized, 4)
    assert [batch for batch, _ in found] == list(range(10))
    assert [window for _, window in found] == [4] * 8 + [2, 2]


def test_start_without_accumulation_fetches_nothing_ahead() -> None:
    data = Count(10)
    batches = TrainPass(DataLoader(data, batch_size=1), SingleDevice("cpu"), 1).start()
    next(batches)
    assert data.asked == 1


def test_start_keeps_a_window_of_batches_by_value() -> None:
    class Reuses:
        """A loader without a length that fills one tensor again and again."""

        def __iter__(self) -> Iterator[list[torch.Tensor]]:
            room = torch.zeros(1)
            for number in range(5):
                yield [room.fill_(number)]

    assert windows(Reuses(), 2) == [(0, 2), (1, 2), (2, 2), (3, 2), (4, 1)]


@pytest.mark.parametrize("done", range(11))
@pytest.mark.parametrize("is_sized", [True, False])
def test_start_in_the_middle_gives_the_batches_and_windows_that_are_left(
    is_sized: bool, done: int
) -> None:
    loader: Any = DataLoader(DATA if is_sized else Count(10))
    accelerator = SingleDevice("cpu", accumulate=4)
    one = TrainPass(loader, accelerator, 1)
    batches = one.start()
    for _ in range(done):
        next(batches)
    state = one.state_dict()
    rest = [(int(batch[0]), accelerator.window) for batch in batches]
    assert windows(loader, 4, done, state) == rest


@pytest.mark.parametrize(
    ("loader", "is_expected"),
    [
        (DataLoader(DATA, shuffle=True), False),
        (DataLoader(DATA, batch_size=None, sampler=SequentialSampler(DATA)), False),
        (DataLoader(DATA, sampler=LazySampler()), True),
        (DataLoader(DATA, batch_sampler=BatchSampler(LazySampler(), 2, False)), True),
        (
            DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)),
            False,
        ),
        (DataLoader(DATA, batch_sampler=[[1, 2], [3]]), True),
        (DataLoader(Stream()), True),
        (DataLoader(Stream(), num_workers=1), False),
        ([1, 2, 3], True),
    ],
)
def test_draws_between_batches_holds_if_the_order_may_be_drawn_late(
    loader: Any, is_expected: bool
) -> None:
    assert draws_between_batches(loader) is is_expected


def test_start_draws_for_a_stream_apart_from_the_model() -> None:
    def order(noise: int) -> list[list[int]]:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        loader, found = DataLoader(Stream(), batch_size=4), []
        for epoch in (1, 2):
            batches = TrainPass(loader, SingleDevice("cpu"), epoch).start()
            for _, y in batches:
                torch.rand(noise)
                found.append(y.tolist())
        return found

    drawn = order(0)
    assert order(0) == drawn
    assert order(5)[:6] == drawn[:6]
    assert drawn[:6] != drawn[6:]  # each epoch has an order of its own


def test_skip_batches_draws_indices_without_fetching_rows() -> None:
    class Rows(TensorDataset):
        fetched = 0

        def __getitem__(self, row: Any) -> Any:
            Rows.fetched += 1
            return super().__getitem__(row)

    batches = iter(DataLoader(Rows(torch.arange(10)), batch_size=2))
    skip_batches(batches, 3)
    assert Rows.fetched == 0
    assert next(batches)[0].tolist() == [6, 7]


def test_set_epoch_counts_from_zero_for_the_first_that_asks() -> None:
    class Asks:
        epoch = -1

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    class Loader:
        sampler, dataset = Asks(), Asks()

    set_epoch(Loader, 5)
    assert (Loader.sampler.epoch, Loader.dataset.epoch) == (4, -1)
    set_epoch([1], 5)
