from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    TensorDataset,
)

import harness
from harness.accelerators.single import SingleDevice
from harness.data.tensors import TensorLoader
from harness.data.train_pass import (
    TrainPass,
    draws_between_batches,
    set_epoch,
    skip_batches,
)
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import Case, LazySampler, Net, Stream, X, Y

DATA = TensorDataset(torch.arange(10))


class OwnOrder(RandomSampler):
    """A subclass that may draw whenever it wants."""


class OwnLoader(DataLoader):
    """A subclass that may draw whenever it wants."""


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
        (DataLoader(DATA, sampler=OwnOrder(DATA)), True),
        (OwnLoader(DATA), True),
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

    drawn = order(1)
    assert order(1) == drawn
    assert order(5)[:6] == drawn[:6]
    assert drawn[:6] != drawn[6:]  # each epoch has an order of its own


class DrawsFirst(Sampler[int]):
    """The order that many people write: drawn before the first row."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randperm(10).tolist())


class Shuffled(IterableDataset):
    """A stream that draws between rows, but not with torch."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(10))
        while left:
            yield left.pop(random.randrange(len(left)) - np.random.randint(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DataLoader(DATA, sampler=DrawsFirst()),
        lambda: DataLoader(DATA, sampler=OwnOrder(DATA), batch_size=3),
        lambda: DataLoader(Shuffled()),
        lambda: DataLoader(Count(10)),
        lambda: OwnLoader(DATA, shuffle=True),
    ],
    ids=["sampler", "subclass", "stream", "order", "loader"],
)
def test_start_draws_as_a_plain_loop_where_only_one_side_uses_a_generator(
    make: Any,
) -> None:
    def train(batches: Any) -> list[Any]:
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        loader, found = make(), []
        for epoch in (1, 2):
            for batch in batches(loader, epoch):
                found.append([repr(batch), torch.rand(()).item()])
        return [*found, random.random(), np.random.random()]

    plain = train(lambda loader, epoch: loader)
    assert plain == train(
        lambda loader, epoch: TrainPass(loader, SingleDevice("cpu"), epoch).start()
    )


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


class Asks:
    """Something that is told the epoch, and keeps what it was told."""

    def __init__(self, **parts: Any) -> None:
        self.told: list[int] = []
        self.__dict__.update(parts)

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)


def test_set_epoch_reaches_every_part_once_counted_from_zero() -> None:
    sampler, inner = Asks(), Asks()
    dataset = Asks(dataset=inner)
    batches = Asks(sampler=sampler)
    loader = Asks(sampler=sampler, batch_sampler=batches, dataset=dataset)
    set_epoch(loader, 5)
    parts = [loader, sampler, batches, dataset, inner]
    assert [part.told for part in parts] == [[4]] * 5
    set_epoch([1], 5)


def test_set_epoch_reaches_the_parts_behind_a_plain_wrapper() -> None:
    class Wrapper(torch.utils.data.Sampler):
        def __init__(self, sampler: Any) -> None:
            self.sampler = sampler

    inner = Asks()
    data = TensorDataset(torch.arange(4))
    set_epoch(DataLoader(data, sampler=Wrapper(inner)), 2)
    own = BatchSampler(inner, 2, False)  # type: ignore[arg-type]
    set_epoch(DataLoader(data, batch_sampler=own), 3)
    assert inner.told == [1, 2]


def test_set_epoch_calls_once_what_a_wrapper_passes_on() -> None:
    class Passes:
        def __init__(self, dataset: Any) -> None:
            self.dataset = dataset

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["dataset"], name)

    inner = Asks()
    set_epoch(Asks(dataset=Passes(inner)), 1)
    assert inner.told == [0]


class Short(IterableDataset):
    """Fewer rows than its length says, or more."""

    def __init__(self, rows: int, length: int) -> None:
        self.rows, self.length = rows, length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rows))


class BatchesOfTwo:
    """A batch sampler with a wrong length."""

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[list[int]]:
        return iter([[0, 1], [2, 3], [4, 5]])


class HalfLoader(DataLoader):
    """A loader that ends before its length."""

    def __iter__(self) -> Any:
        return itertools.islice(super().__iter__(), 3)


class HalfSampler(SequentialSampler):
    """A known sampler's class, but it ends before its length."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(3))


@pytest.mark.filterwarnings("ignore:Length of IterableDataset:UserWarning")
@pytest.mark.parametrize(
    ("loader", "batches", "last"),
    [
        (DataLoader(Short(3, 7)), [0, 1, 2], 1),
        (DataLoader(Short(5, 4)), [0, 1, 2, 3, 4], 1),
        (DataLoader(DATA, batch_sampler=BatchesOfTwo()), [0, 2, 4], 1),
        (HalfLoader(DATA), [0, 1, 2], 1),
        (TensorLoader(DATA, sampler=HalfSampler(DATA)), [0, 1, 2], 1),
        (TensorLoader(DATA, batch_size=2, shuffle=False), [0, 2, 4, 6, 8], 1),
    ],
    ids=["short", "long", "batch-sampler", "loader", "sampler", "right"],
)
def test_start_closes_the_last_window_where_the_loader_ends(
    loader: Any, batches: list[int], last: int
) -> None:
    def first(batch: Any) -> int:
        return int(batch[0][0] if isinstance(batch, list) else batch[0])

    accelerator = SingleDevice("cpu", accumulate=2)
    found = [
        (first(batch), accelerator.window)
        for batch in TrainPass(loader, accelerator, 1).start()
    ]
    assert [batch for batch, _ in found] == batches
    assert [window for _, window in found] == [2] * (len(batches) - 1) + [last]


def test_start_fetches_nothing_ahead_from_torchs_loader_of_rows() -> None:
    class Rows(TensorDataset):
        fetched = 0

        def __getitem__(self, row: Any) -> Any:
            Rows.fetched += 1
            return super().__getitem__(row)

    loader = DataLoader(Rows(torch.arange(8)))
    next(TrainPass(loader, SingleDevice("cpu", accumulate=4), 1).start())
    assert Rows.fetched == 1


def test_choices_from_a_buffer_that_grows_are_resumed_exactly(tmp_path):
    """How many numbers a choice draws depends on the length of the buffer."""
    buffers: list[Any] = []

    class Agent(Net):
        ctx: Any

        def __init__(self) -> None:
            super().__init__()
            self.buffer: deque[Any] = deque([(X[0], Y[0])] * 5, maxlen=11)
            buffers.append(self.buffer)

        def loss(self, pred, target):
            if self.training:
                self.buffer.append((self.ctx.input[0] + torch.randn(4), target[0]))
            return nn.functional.cross_entropy(pred, target)

    class Replay(IterableDataset):
        def __iter__(self):
            for _ in range(20):
                yield random.choice(buffers[-1])

    case = Case(
        learner=lambda: harness.setup(Agent, optimizer=torch.optim.SGD),
        data=lambda: DataLoader(Replay(), batch_size=2),
        valid=None,
        options=None,
    )
    check_exact(case, tmp_path, [("on_train_batch_end", k) for k in (2, 3, 5)])
