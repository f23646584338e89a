"""Every form of data on any number of ranks: each row once an epoch, over three epochs.

The model has dropout, and the last step is uneven, so the random states of ranks part.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    get_worker_info,
)

import harness
from harness.accelerators.distributed.environment import read_launch
from harness.accelerators.distributed.group import PeerError, RankGroup
from harness.accelerators.distributed.sharding import LengthCheck
from harness.callbacks.display.fit_lines import describe_loader
from tests.harness.accelerators.cases import Lab

ROWS, EPOCHS = 23, 3

Row = tuple[Tensor, Tensor, Tensor]
Factory = Callable[[int, int], Any]
"""Makes data for a rank of a number of ranks."""


def make_row(number: int) -> Row:
    """A row that tells its number."""
    return torch.ones(4), torch.ones(1), torch.tensor(number)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """All rows as tensors."""
    return torch.ones(ROWS, 4), torch.ones(ROWS, 1), torch.arange(ROWS)


class Rows(Dataset[Any]):
    """Map-style data that draws random numbers for each row."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> Row:
        random.random(), np.random.random(), torch.rand(1)
        return make_row(int(number))


class Keyed(Rows):
    """Map-style data whose keys are texts."""

    def __getitem__(self, key: Any) -> Row:
        return super().__getitem__(int(key.removeprefix("row-")))


class Reordered(Rows):
    """Map-style data that draws its own order for each epoch."""

    def set_epoch(self, _: int) -> None:
        self.order = torch.randperm(ROWS).tolist()

    def __getitem__(self, number: int) -> Row:
        return super().__getitem__(self.order[number])


class Ready(Dataset[Any]):
    """Ready batches of seven rows; the last one is short."""

    def __len__(self) -> int:
        return -(-ROWS // 3)

    def __getitem__(self, number: int) -> Row:
        rows = torch.arange(3 * number, min(ROWS, 3 * number + 3))
        return torch.ones(len(rows), 4), torch.ones(len(rows), 1), rows


class Stream(IterableDataset[Any]):
    """A stream in an order that `shuffle` draws; workers divide it."""

    def __init__(self, shuffle: Callable[[list[int]], list[int]] = list) -> None:
        self.shuffle = shuffle

    def order(self) -> list[int]:
        """The order of this worker's rows."""
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return self.shuffle(list(range(first, ROWS, step)))

    def __iter__(self) -> Iterator[Any]:
        yield from map(make_row, self.order())


class Wavering(Stream):
    """A stream that chooses each next row when it is asked for it."""

    def __iter__(self) -> Iterator[Any]:
        left = self.order()
        while left:
            yield make_row(left.pop(random.randrange(len(left))))


class Long(Stream):
    """A stream whose length is wrong."""

    def __len__(self) -> int:
        return 1000


class ReadyStream(Stream):
    """A stream of ready batches of three rows."""

    def __iter__(self) -> Iterator[Any]:
        for rows in torch.tensor(self.order()).split(3):
            yield torch.ones(len(rows), 4), torch.ones(len(rows), 1), rows


class HoldsGenerator(Stream):
    """A stream that shuffles by a generator of its own, seeded nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = np.random.default_rng()

    def order(self) -> list[int]:
        return [int(row) for row in self.drawn.permutation(super().order())]


class Marked(IterableDataset[Any]):
    """A stream that shuffles all rows, gives each rank its own and says so."""

    sharded = True

    def __init__(self, rank: int, world: int) -> None:
        self.first, self.step = rank, world

    def __iter__(self) -> Iterator[Any]:
        yield from map(make_row, mix(list(range(ROWS)))[self.first :: self.step])


class KnowsRank(Marked):
    """The same, but it only has the names that others use."""

    sharded = None  # type: ignore[assignment]

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(rank, world)
        self.rank, self.world_size = rank, world


class FromSampler(Dataset[Any]):
    """The rows of a sampler as a data set."""

    def __init__(self, sampler: Any) -> None:
        self.rows = list(sampler)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Any:
        return self.rows[place]


class SamplerWrapper(DistributedSampler[Any]):
    """Divides the rows of another sampler, as Catalyst and Lightning have it."""

    def __init__(self, sampler: Any, rank: int, world: int) -> None:
        super().__init__(FromSampler(sampler), world, rank, drop_last=False)
        self.inner = sampler

    def __iter__(self) -> Iterator[int]:
        places = list(super().__iter__())[
            : len(range(self.rank, ROWS, self.num_replicas))
        ]
        rows = list(self.inner)
        return iter([rows[place] for place in places])


class Quiet(Sampler[int]):
    """Divides rows by attributes that only begin with an underscore."""

    def __init__(self, rank: int, world: int) -> None:
        self._rank, self._world_size = rank, world

    def __iter__(self) -> Iterator[int]:
        return iter(range(self._rank, ROWS, self._world_size))


class Secret(Sampler[int]):
    """Divides rows, and no attribute tells."""

    def __init__(self, rank: int, world: int) -> None:
        self.a, self.b = rank, world

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.a, ROWS, self.b))


class Late(RandomSampler):
    """A subclass that draws each row when it is asked for it."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(ROWS))
        while left:
            yield left.pop(int(torch.randint(len(left), ())))


class ByLength(Sampler[list[int]]):
    """Batches of rows of like length, in random order, of other sizes."""

    def __iter__(self) -> Iterator[list[int]]:
        rows = sorted(range(ROWS), key=lambda row: row % 5)
        sizes = itertools.cycle([3, 1, 4])
        batches = []
        while rows:
            size = next(sizes)
            batches.append(rows[:size])
            rows = rows[size:]
        random.shuffle(batches)
        return iter(batches)


class Arrays(ByLength):
    """The same batches as arrays and tensors."""

    def __iter__(self) -> Iterator[Any]:
        for number, rows in enumerate(super().__iter__()):
            yield np.array(rows) if number % 2 else torch.tensor(rows)


class Cut(BatchSampler):
    """A subclass of torch's batch sampler with batches in reverse."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter(list(super().__iter__())[::-1])


class OwnLoader(DataLoader[Any]):
    """A loader that makes its own batches and reuses their tensors."""

    def __iter__(self) -> Any:
        order = torch.randperm(ROWS)
        whole = torch.empty(4, dtype=torch.int64)
        for rows in order.split(4):
            shown = whole[: len(rows)].copy_(rows)
            yield torch.ones(len(rows), 4), torch.ones(len(rows), 1), shown


class Wraps(DataLoader[Any]):
    """A loader that changes what torch's gives."""

    def __iter__(self) -> Any:
        for x, y, rows in super().__iter__():
            yield x + 0, y, rows


def spread(rows: list[int]) -> list[int]:
    """The rows in an order by torch's generator."""
    return [rows[place] for place in torch.randperm(len(rows)).tolist()]


def mix(rows: list[int]) -> list[int]:
    """The rows in an order by Python's and NumPy's generators."""
    random.shuffle(rows)
    return [int(row) for row in np.random.permutation(rows)]


def seeded(number: int) -> torch.Generator:
    """A generator that is the same on every rank."""
    return torch.Generator().manual_seed(number)


def load(data: Any, **options: Any) -> Any:
    """A loader of batches of two rows."""
    return DataLoader(data, **{"batch_size": 2, **options})


FORMS: dict[str, Factory] = {
    "tensors": lambda r, w: TensorDataset(*tensors()),
    "subset": lambda r, w: Subset(TensorDataset(*tensors()), list(range(ROWS))[::-1]),
    "map-style": lambda r, w: Rows(),
    "map-style-workers": lambda r, w: load(Rows(), shuffle=True, num_workers=2),
    "generator": lambda r, w: load(Rows(), shuffle=True, generator=seeded(r)),
    "keys": lambda r, w: load(Keyed(), sampler=[f"row-{n}" for n in range(ROWS)]),
    "reordered": lambda r, w: load(Reordered(), shuffle=True),
    "ready": lambda r, w: DataLoader(Ready(), batch_size=None, shuffle=True),
    "ready-workers": lambda r, w: DataLoader(
        Ready(), batch_size=None, shuffle=True, num_workers=2
    ),
    "ready-list": lambda r, w: DataLoader(
        Ready(), batch_size=None, sampler=[5, 0, 2, 1, 3, 4, 7, 6]
    ),
    "stream": lambda r, w: load(Stream()),
    "stream-torch": lambda r, w: load(Stream(spread)),
    "stream-python": lambda r, w: load(Stream(mix), batch_size=4),
    "stream-wavering": lambda r, w: load(Wavering()),
    "stream-workers": lambda r, w: load(Stream(spread), num_workers=2),
    "stream-long": lambda r, w: load(Long(spread)),
    "stream-ready": lambda r, w: DataLoader(ReadyStream(spread), batch_size=None),
    "stream-generator": lambda r, w: load(HoldsGenerator()),
    "stream-marked": lambda r, w: load(Marked(r, w)),
    "stream-knows-rank": lambda r, w: load(KnowsRank(r, w)),
    "sampler-subset": lambda r, w: load(
        Rows(), sampler=SubsetRandomSampler(range(ROWS), generator=seeded(3))
    ),
    "sampler-late": lambda r, w: load(Rows(), sampler=Late(range(ROWS))),
    "sampler-distributed": lambda r, w: load(
        Rows(),
        sampler=DistributedSampler(range(ROWS), w, r),  # type: ignore[arg-type]
    ),
    "sampler-of-one": lambda r, w: load(
        Rows(),
        sampler=DistributedSampler(range(ROWS), 1, 0),  # type: ignore[arg-type]
    ),
    "sampler-wrapper": lambda r, w: load(
        Rows(), sampler=SamplerWrapper(SubsetRandomSampler(range(ROWS)), r, w)
    ),
    "sampler-quiet": lambda r, w: load(Rows(), sampler=Quiet(r, w)),
    "batches-by-length": lambda r, w: DataLoader(Rows(), batch_sampler=ByLength()),
    "batches-by-length-workers": lambda r, w: DataLoader(
        Rows(), batch_sampler=ByLength(), num_workers=2
    ),
    "batches-arrays": lambda r, w: DataLoader(Rows(), batch_sampler=Arrays()),
    "batches-cut": lambda r, w: DataLoader(
        Rows(), batch_sampler=Cut(RandomSampler(range(ROWS)), 4, False)
    ),
    "batches-of-torch": lambda r, w: DataLoader(
        Rows(), batch_sampler=BatchSampler(RandomSampler(range(ROWS)), 4, False)
    ),
    "batches-distributed": lambda r, w: DataLoader(
        Rows(), batch_sampler=BatchSampler(Quiet(r, w), 4, False)
    ),
    "loader-own": lambda r, w: OwnLoader(Rows()),
    "loader-wraps": lambda r, w: Wraps(Rows(), batch_size=4, shuffle=True),
}
"""Each form of data, by name."""


class Look(harness.Callback):
    """Keeps the rows that count, by epoch."""

    def __init__(self) -> None:
        self.seen: dict[int, list[int]] = {}

    def on_train_batch_end(self) -> None:
        ctx = self.ctx
        assert ctx.accelerator is not None
        if ctx.accelerator.counted != 0:
            self.seen.setdefault(ctx.epoch or 0, []).extend(ctx.batch[2].tolist())


def trained(lab: Lab, data: Any, *, seed: int | None, **options: Any) -> list[Any]:
    """Rows that each rank trained on, by epoch."""
    look = Look()
    learner = harness.setup(
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.Linear(8, 1)),
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD,
    )
    accelerator = lab.make(**options)
    if not isinstance(data, DataLoader):
        loading = {"batch_size": 2, "drop_last": False}
    learner.fit(
        data,
        EPOCHS,
        seed=seed,
        tracker=False,
        verbose=False,
        callbacks=[look],
        accelerator=accelerator,
        dataloader_options=None if isinstance(data, DataLoader) else loading,
    )
    return accelerator.gather_objects(look.seen)


def each_row_once(lab: Lab, name: str) -> None:
    """Train on a form of data with and without a seed, and with windows of two batches."""
    for seed, accumulate in ((None, 1), (7, 2)):
        data = FORMS[name](lab.rank, lab.world)
        found = trained(lab, data, seed=seed, accumulate=accumulate)
        for epoch in range(1, EPOCHS + 1):
            rows = [row for seen in found for row in seen.get(epoch, [])]
            assert sorted(rows) == list(range(ROWS)), (seed, epoch, rows)


def refused(lab: Lab, data: Any, match: str) -> None:
    """Ranks that do not read alike are told so before anything is trained."""
    if lab.world == 1:
        return
    with pytest.raises((ValueError, PeerError), match=match):
        trained(lab, data, seed=1)


class Own(Stream):
    """A stream that hides what it is given."""

    def __init__(self, order: list[int]) -> None:
        super().__init__()
        self.hidden = order

    def order(self) -> list[int]:
        return self.hidden


def case_stream_that_each_rank_reads_whole_is_told(lab: Lab) -> None:
    for name, is_whole in {"stream": lab.world > 1, "stream-marked": False}.items():
        accelerator, model = lab.make(), nn.Linear(4, 1)
        opts = {"opt": torch.optim.SGD(model.parameters())}
        loaders = [FORMS[name](lab.rank, lab.world)]
        _, _, [found] = accelerator.prepare(model, opts, loaders)
        assert describe_loader(found).endswith(", all read by each rank") == is_whole
        accelerator.finish()


def case_stream_in_another_order_on_a_rank_is_refused(lab: Lab) -> None:
    order = random.Random(lab.rank).sample(range(ROWS), ROWS)
    refused(
        lab, load(Own(order)), "Own: expected the same rows on every rank, got others"
    )
    refused(
        lab,
        load(Own(order), num_workers=1),
        "Own: expected the same rows on every rank, got others",
    )


def case_stream_that_divides_itself_in_secret_is_refused(lab: Lab) -> None:
    data = load(Own(list(range(lab.rank, ROWS, lab.world))))
    refused(lab, data, r"Own: .* set sharded = True on the data set")


def case_stream_that_ends_early_on_a_rank_is_refused(lab: Lab) -> None:
    if lab.world == 1:
        return
    ranks = RankGroup(read_launch(), torch.device("cpu"))
    check = LengthCheck(ranks, "Stream")
    check.step(has_data=True)
    check.step(has_data=True)
    match = (
        f"Stream: expected the same number of rows .* fewer on 1 of {lab.world} ranks"
    )
    if lab.rank == 1:
        with pytest.raises(ValueError, match=match):
            check.step(has_data=False)
        return
    check.step(has_data=True)
    with pytest.raises(ValueError, match=match):
        check.step(has_data=True)


def case_sampler_that_divides_in_secret_is_refused(lab: Lab) -> None:
    data = load(Rows(), sampler=Secret(lab.rank, lab.world))
    refused(lab, data, r"Secret: expected the same rows .* set sharded = True on it")


def case_sampler_of_other_ranks_is_refused(lab: Lab) -> None:
    sampler: Any = DistributedSampler(range(ROWS), lab.world + 1, lab.rank)  # type: ignore[arg-type]
    refused(
        lab,
        load(Rows(), sampler=sampler),
        f"divided over {lab.world} ranks, got rank 0 of {lab.world + 1}",
    )


CASES: dict[str, Callable[[Lab], None]] = {
    name: partial(each_row_once, name=name) for name in FORMS
} | {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
"""Every case, by name."""
