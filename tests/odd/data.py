"""Forms of data: how batches come to a fit, and to the plain loop beside it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from tests.odd.batches import CLASSES, WIDTH, Row

Collate = Callable[[list[Row]], Any]


def make_rows(count: int, seed: int = 0) -> list[Row]:
    """Rows with features that have no pattern, and classes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, WIDTH, generator=generator)
    y = torch.randint(CLASSES, (count,), generator=generator)
    return [(x[n], y[n], n) for n in range(count)]


class Rows(Dataset):
    """Rows by index."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> Row:
        return self.rows[n]


class Augmented(Rows):
    """Noise from the global generators."""

    def __getitem__(self, n: int) -> Row:
        x, y, n = self.rows[n]
        return x + 0.1 * torch.rand(()) + 0.1 * random.random(), y, n


class Fetches(Rows):
    """Fetches all rows of a batch at once."""

    def __getitems__(self, places: list[int]) -> list[Row]:
        return [self.rows[n] for n in places]


class Stream(IterableDataset):
    """Rows in an order from a generator of its own."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.order = rows, random.Random(4)

    def __iter__(self) -> Iterator[Row]:
        left = list(self.rows)
        while left:
            yield left.pop(self.order.randrange(len(left)))


class SizedStream(Stream):
    """A stream that says how long it is, and is shorter."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Row]:
        yield from list(super().__iter__())[: max(1, len(self.rows) * 2 // 3)]


class DrawingStream(Stream):
    """A stream that draws from the global generators, between batches."""

    def __iter__(self) -> Iterator[Row]:
        for x, y, n in super().__iter__():
            yield x + 0.1 * torch.rand(()) + 0.1 * random.random(), y, n


class Batches(IterableDataset):
    """Ready batches; with `reused`, in the same tensors each time."""

    def __init__(
        self, rows: list[Row], size: int, collate: Collate, reused: bool = False
    ) -> None:
        self.rows, self.size, self.collate = rows, size, collate
        self.reused = reused

    def __iter__(self) -> Iterator[Any]:
        places = range(0, len(self.rows), self.size)
        first: Any = None
        for place in places:
            batch = self.collate(self.rows[place : place + self.size])
            if self.reused and first is not None and len(first[1]) == len(batch[1]):
                for old, new in zip(first, batch, strict=True):
                    old.copy_(new)
                batch = first
            first = batch if self.reused else None
            yield batch


class Backwards(RandomSampler):
    """A subclass of a known sampler with an order of its own."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self.data_source) - 1, -1, -1))


class LazyOrder(Sampler[int]):
    """Draws each row, from its own generator, when it is asked for it."""

    def __init__(self, rows: int) -> None:
        self.rows, self.own = rows, torch.Generator().manual_seed(9)

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        for _ in range(self.rows):
            yield int(torch.randint(self.rows, (), generator=self.own))


class ByEpoch(Sampler[int]):
    """Another order in each epoch, as told by ``set_epoch``."""

    def __init__(self, rows: int) -> None:
        self.rows, self.epoch = rows, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.rows, generator=generator).tolist())


class Buckets(Sampler[list[int]]):
    """Batches of 1, 2, 3, ... rows."""

    def __init__(self, rows: int) -> None:
        self.places: list[list[int]] = []
        place = 0
        while place < rows:
            size = min(len(self.places) + 1, rows - place)
            self.places.append(list(range(place, place + size)))
            place += size

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.places)


class ShuffledBatches(BatchSampler):
    """A subclass of the known batch sampler: whole batches in another order."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        batches.sort(key=lambda places: -places[-1] % 5)
        return iter(batches)


class WithoutLength(DataLoader):
    """A loader that does not know its length."""

    def __len__(self) -> int:
        raise TypeError("this loader has no length")


class Counts(DataLoader):
    """A loader that counts one batch more than it has."""

    def __len__(self) -> int:
        return super().__len__() + 1


class Resumable(DataLoader):
    """A loader that saves its position by itself."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.place, self.start = 0, 0
        super().__init__(*args, **kwargs)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        self.place, self.start = self.start, 0
        return self._read(super().__iter__())

    def _read(self, batches: Iterator[Any]) -> Iterator[Any]:
        for n, batch in enumerate(batches):
            if n >= self.place:
                self.place += 1
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["place"]


class Indexed:
    """Rows by index that are no data set of torch's."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, n: int) -> Row:
        return self.rows[n]


@dataclass(kw_only=True)
class Source:
    """Data of one fit.

    Attributes
    ----------
    data, options
        For ``fit``: the data, and its ``dataloader_options``.
    loader
        For the plain loop.
    """

    data: Any
    options: dict[str, Any] | None = None
    loader: Any = None

    def __post_init__(self) -> None:
        self.loader = self.data if self.loader is None else self.loader

    def set_epoch(self, epoch: int) -> None:
        """What a hand-written loop calls before each epoch."""
        for part in (self.loader, getattr(self.loader, "sampler", None)):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)


@dataclass(frozen=True, kw_only=True)
class DataForm:
    """One form of data.

    Attributes
    ----------
    make
        Makes it anew of rows, rows in a batch, collate function, and whether to shuffle.
    has_true_length
        Whether the plain loop can rely on ``len(loader)``.
    batches
        Names of the forms of batches that it can give; None: all.
    draws_between
        Whether it draws from the global generators between batches. With a model that
        does so too, a plain loop draws other numbers.
    refused
        Whether a fit may refuse it.
    """

    make: Callable[[list[Row], int, Collate, bool], Source]
    has_true_length: bool = False
    batches: tuple[str, ...] | None = None
    draws_between: bool = False
    refused: bool = False
    is_slow: bool = field(default=False)
    keeps_batches: bool = False  #: the same tensors come again


def from_loader(
    kind: type[DataLoader] = DataLoader,
    dataset: Callable[[list[Row]], Any] = Rows,
    **own: Any,
) -> Callable[[list[Row], int, Collate, bool], Source]:
    """A loader of the user's; options that are functions are called with the data set."""

    def make(rows: list[Row], size: int, collate: Collate, shuffle: bool) -> Source:
        data = dataset(rows)
        options: dict[str, Any] = {
            "collate_fn": collate,
            "batch_size": size,
            "shuffle": shuffle and not isinstance(data, IterableDataset),
        }
        for name, value in own.items():
            options[name] = value(data, size) if callable(value) else value
        if "sampler" in own:
            del options["shuffle"]
        if "batch_sampler" in own:
            del options["shuffle"], options["batch_size"]
        return Source(data=kind(data, **options))

    return make


def tensors(rows: list[Row]) -> tuple[Tensor, Tensor]:
    return torch.stack([x for x, *_ in rows]), torch.stack([y for _, y, _ in rows])


def columns(rows: list[Row]) -> dict[str, Tensor]:
    return dict(zip(("x", "labels"), tensors(rows), strict=True))


def own_loader(
    data: Any,
    rows: list[Row],
    size: int,
    shuffle: bool,
    collate: Collate | None = None,
    **options: Any,
) -> Source:
    """Data that ``fit`` makes a loader of: shuffled by default, full batches only."""
    given = {"batch_size": size, **options} | ({} if shuffle else {"shuffle": False})
    full = {"shuffle": shuffle, "drop_last": len(rows) >= size}
    dataset = data if isinstance(data, Dataset) else TensorDataset(*tensors(rows))
    if collate is not None:
        dataset, full["collate_fn"] = Rows(rows), collate  # type: ignore[assignment]
    loader: Any = DataLoader(dataset, **{**full, **given})
    return Source(data=data, options=given, loader=loader)


def arrays(rows: list[Row]) -> list[Any]:
    x, y = tensors(rows)
    return [x.double().numpy(), y.numpy()]


def ready_list(rows: list[Row], size: int, collate: Collate, _: bool) -> Source:
    batches = [collate(rows[n : n + size]) for n in range(0, len(rows), size)]
    return Source(data=DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def weighted(data: Rows, _: int) -> Any:
    weights = [1.0 + n % 3 for n in range(len(data))]
    return WeightedRandomSampler(weights, len(data) + 1)


LIST = ("list",)  # what torch's own collate function makes of pairs
DATA: dict[str, DataForm] = {
    "tensors": DataForm(
        make=lambda r, s, c, sh: own_loader(tensors(r), r, s, sh),
        has_true_length=True,
        batches=LIST,
    ),
    "arrays": DataForm(
        make=lambda r, s, c, sh: own_loader(arrays(r), r, s, sh),
        has_true_length=True,
        batches=LIST,
    ),
    "tensor data set": DataForm(
        make=lambda r, s, c, sh: own_loader(TensorDataset(*tensors(r)), r, s, sh),
        has_true_length=True,
        batches=LIST,
    ),
    "data set": DataForm(
        make=lambda r, s, c, sh: own_loader(Rows(r), r, s, sh, collate_fn=c),
        has_true_length=True,
    ),
    "loader": DataForm(make=from_loader(), has_true_length=True),
    "short loader": DataForm(
        make=lambda r, s, c, sh: from_loader(drop_last=True)(r, min(s, len(r)), c, sh),
        has_true_length=True,
    ),
    "augmented": DataForm(make=from_loader(dataset=Augmented), has_true_length=True),
    "fetches": DataForm(make=from_loader(dataset=Fetches), has_true_length=True),
    "own generator": DataForm(
        make=from_loader(
            shuffle=True, generator=lambda data, size: torch.Generator().manual_seed(5)
        ),
        has_true_length=True,
    ),
    "weighted": DataForm(make=from_loader(sampler=weighted), has_true_length=True),
    "subset": DataForm(
        make=from_loader(
            sampler=lambda data, size: SubsetRandomSampler(range(0, len(data), 2))
        ),
        has_true_length=True,
    ),
    "backwards": DataForm(make=from_loader(sampler=lambda data, size: Backwards(data))),
    "lazy order": DataForm(
        make=from_loader(sampler=lambda data, size: LazyOrder(len(data)))
    ),
    "by epoch": DataForm(
        make=from_loader(sampler=lambda data, size: ByEpoch(len(data)))
    ),
    "buckets": DataForm(
        make=from_loader(batch_sampler=lambda data, size: Buckets(len(data)))
    ),
    "batches backwards": DataForm(
        make=from_loader(
            batch_sampler=lambda data, size: BatchSampler(Backwards(data), size, False)
        )
    ),
    "shuffled batches": DataForm(
        make=from_loader(
            batch_sampler=lambda data, size: ShuffledBatches(
                RandomSampler(data), size, False
            )
        )
    ),
    "stream": DataForm(make=from_loader(dataset=Stream)),
    "sized stream": DataForm(make=from_loader(dataset=SizedStream)),
    "drawing stream": DataForm(
        make=from_loader(dataset=DrawingStream), draws_between=True
    ),
    "stream as data": DataForm(
        make=lambda r, s, c, sh: Source(
            data=Stream(r),
            options={"batch_size": s, "collate_fn": c},
            loader=DataLoader(Stream(r), batch_size=s, collate_fn=c),
        )
    ),
    "ready list": DataForm(make=ready_list, keeps_batches=True),
    "ready stream": DataForm(
        make=lambda r, s, c, sh: Source(
            data=DataLoader(Batches(r, s, c), batch_size=None)
        )
    ),
    "reused": DataForm(
        make=lambda r, s, c, sh: Source(
            data=DataLoader(Batches(r, s, c, reused=True), batch_size=None)
        ),
        batches=("pair", "list", "columns"),
    ),
    "without length": DataForm(make=from_loader(WithoutLength)),
    "counts": DataForm(make=from_loader(Counts)),
    "resumable": DataForm(
        make=lambda r, s, c, sh: from_loader(Resumable)(r, s, c, False)
    ),
    "workers": DataForm(
        make=from_loader(num_workers=1), has_true_length=True, is_slow=True
    ),
    "persistent workers": DataForm(
        make=from_loader(num_workers=1, persistent_workers=True),
        has_true_length=True,
        is_slow=True,
    ),
    "worker stream": DataForm(
        make=from_loader(dataset=Stream, num_workers=1), is_slow=True
    ),
    "samples": DataForm(
        make=lambda r, s, c, sh: own_loader([(x, y) for x, y, _ in r], r, s, sh),
        has_true_length=True,
        batches=LIST,
    ),
    "mapping of tensors": DataForm(
        make=lambda r, s, c, sh: own_loader(columns(r), r, s, sh, c),
        has_true_length=True,
        batches=("mapping",),
    ),
    "indexed": DataForm(
        make=lambda r, s, c, sh: own_loader(Indexed(r), r, s, sh, c, collate_fn=c),
        has_true_length=True,
    ),
    # What a fit may refuse, if by a message of its own.
    "iterator": DataForm(
        make=lambda r, s, c, sh: Source(data=iter([c(r)])), refused=True
    ),
    "nothing": DataForm(make=lambda r, s, c, sh: Source(data=[]), refused=True),
    "no rows": DataForm(
        make=lambda r, s, c, sh: Source(data=tensors(r[:1])[0][:0]), refused=True
    ),
    "unequal": DataForm(
        make=lambda r, s, c, sh: Source(data=(tensors(r)[0], tensors(r)[1][:-1])),
        refused=True,
    ),
    "texts": DataForm(
        make=lambda r, s, c, sh: Source(data=["one", "two"]), refused=True
    ),
    "None": DataForm(make=lambda r, s, c, sh: Source(data=None), refused=True),
}
"""Forms of data by name."""
