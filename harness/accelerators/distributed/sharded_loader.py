"""Loaders divided over ranks: each sample once, the same number of batches on every rank.

Rank 0 draws the order of the samples from the loader's own sampler and sends it to the other
ranks, so any sampler works. Each step takes one batch per rank from that order. The batches
of the ranks are consecutive in it, so gathering them rank by rank restores the order.

If the samples of the last step do not fill every rank's batch, they are divided evenly. A
rank without samples still takes part, because the others wait for it in collectives. It gets
a placeholder batch that does not count, and its ``RankShare`` has ``count`` 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    Sampler,
    default_collate,
)

from harness.accelerators.distributed.group import RankGroup
from harness.accelerators.distributed.shares import (
    RankShare,
    ShareTracker,
    assign_rows,
)
from harness.data.batch import (
    Batch,
    copy_by_value,
    input_of,
    num_rows,
    target_of,
)
from harness.data.loaders import Loader, unwrap_tensors
from harness.data.workers import iter_batches
from harness.pytree import Options

CHUNK = 1 << 16
"""Rows of the order that rank 0 sends at once: half a megabyte."""


_KNOWN = frozenset(
    {"batch_sampler", "batch_size", "collate_fn", "dataset", "drop_last", "generator"}
    | {"num_workers", "pin_memory", "sampler"}
)
"""Attributes that a divided loader shares with the original one."""


class ShardedLoader:
    """One rank's part of a loader.

    Iterating yields batches like those of the original loader. ``share`` is the share of the
    last batch.

    Parameters
    ----------
    loader
        Loader as one process would use it. Its ``batch_size`` is that of each rank.
    ranks
        Ranks to divide it over.
    on_batch
        Called with each batch and its ``RankShare`` before it is yielded; returns the batch.
    on_begin, on_end
        Called before and after each pass over the data.

    Notes
    -----
    - Map-style data: rank 0 draws the order from the loader's own sampler.
    - A custom batch sampler, or ``batch_size=None``: a step takes one whole batch per rank.
    - Iterable data: each rank reads the whole stream and keeps its part. If a data set gives
      each rank its own samples, set its attribute ``sharded = True``. Ranks may then run out
      of samples at different steps.
    - torch's ``DistributedSampler`` repeats samples so that all ranks get the same number.
      Its order is kept, without the repetitions.
    """

    def __init__(
        self,
        loader: Loader,
        ranks: RankGroup,
        on_batch: Callable[[Batch, RankShare], object] = lambda batch, share: batch,
        on_begin: Callable[[], None] = lambda: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._loader = loader
        self._ranks = ranks
        self._on_batch = on_batch
        self._on_begin, self._on_end = on_begin, on_end
        self.share: RankShare | None = None
        self._source = _make_source(loader, ranks)

    def __iter__(self) -> Iterator[Batch]:
        self._on_begin()
        # Create the iterator now and not lazily: torch draws a random number for it.
        return self._iterate(iter(self._source))

    def _iterate(self, source: Iterator[tuple[Batch, RankShare]]) -> Iterator[Batch]:
        try:
            for batch, share in source:
                self.share = share
                yield self._on_batch(batch, share)
        finally:
            self._on_end()

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original loader, but not its position."""
        if name in _KNOWN:
            return getattr(self._loader, name)
        msg = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(msg)

    @property
    def undivided(self) -> Loader:
        """The original loader, as one process would use it."""
        return self._loader

    def copy_batch(self, batch: Batch) -> Batch:
        """Copy the last batch and record the same share for the copy."""
        assert self.share is not None
        return self._on_batch(copy_by_value(batch), self.share)


def shard_loaders(
    loaders: Sequence[Any],
    ranks: RankGroup,
    shares: ShareTracker,
    before_eval: Callable[[], None],
) -> list[Any]:
    """Divide loaders over ranks.

    Parameters
    ----------
    loaders
        The first is the training loader. None stays None.
    ranks
        The ranks; with one rank, the loaders are returned as they are.
    shares
        Records the share of each batch.
    before_eval
        Called before each pass over a loader other than the training loader.
    """
    if ranks.world_size == 1:
        return list(loaders)
    return [
        None
        if loader is None
        else ShardedLoader(
            loader,
            ranks,
            on_batch=shares.record,
            on_begin=before_eval if place else lambda: None,
            on_end=shares.clear,
        )
        for place, loader in enumerate(loaders)
    ]


def _make_source(loader: Loader, ranks: RankGroup) -> Any:
    """Choose the source of the rank's batches and shares for this kind of loader."""
    if _is_divided(loader):
        return _BatchSource(loader, ranks, every=False)
    if loader.batch_size is not None and isinstance(loader.dataset, IterableDataset):
        return _StreamSource(loader, ranks)
    batches = loader.sampler if loader.batch_size is None else loader.batch_sampler
    if type(batches) is BatchSampler:
        return _RowSource(loader, batches, ranks)
    if loader.batch_size is None and loader.batch_sampler is not None:
        return _BatchSamplerSource(loader, loader.batch_sampler, ranks)
    return _BatchSource(loader, ranks, every=True)


def _is_divided(loader: Loader) -> bool:
    """True if the loader already gives each rank its own samples."""
    samplers = (loader.sampler, loader.batch_sampler)
    return getattr(loader.dataset, "sharded", False) or any(
        hasattr(sampler, "num_replicas") and not isinstance(sampler, DistributedSampler)
        for sampler in samplers
    )


def _copy_loader(loader: Loader, **changes: Any) -> Loader:
    """Copy a loader with changed options."""
    options: Options = {
        name: getattr(loader, name)
        for name in (
            "num_workers",
            "collate_fn",
            "pin_memory",
            "timeout",
            "worker_init_fn",
            "multiprocessing_context",
            "generator",
            "prefetch_factor",
            "persistent_workers",
            "pin_memory_device",
        )
    }
    return DataLoader(**({"dataset": loader.dataset} | options | changes))


# ------------------------------------------------------------------ map-style data


class _RowSource:
    """Rows in an order that all ranks share, divided step by step."""

    def __init__(self, loader: Loader, batches: BatchSampler, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._sampler = _undivided_sampler(batches.sampler)
        self._size = batches.batch_size
        self._drops = batches.drop_last
        self._shares: deque[RankShare] = deque()
        self._loader = loader
        order = _RowSampler(self._rows_of_rank)
        if loader.batch_size is None:
            self._rank_loader = _copy_loader(loader, batch_size=None, sampler=order)
        else:
            self._rank_loader = _copy_loader(loader, batch_sampler=order)
        found = unwrap_tensors(loader.dataset)
        fast = found is not None and not loader.num_workers and not loader.pin_memory
        is_plain = (
            loader.batch_size is not None and loader.collate_fn is default_collate
        )
        self._tensors = found if fast and is_plain else None

    def __len__(self) -> int:
        count = len(self._sampler)
        full, rest = divmod(count, self._size * self._ranks.world_size)
        return full + bool(rest and not self._drops)

    def __iter__(self) -> Iterator[tuple[Batch, RankShare]]:
        self._shares.clear()
        if self._tensors is None:
            return _pair_with_shares(iter_batches(self._rank_loader), self._shares)
        # torch's loader draws its base seed here, before the sampler draws.
        torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        return _pair_with_shares(self._index_tensors(*self._tensors), self._shares)

    def _index_tensors(
        self, tensors: Sequence[Tensor], rows: Tensor | None
    ) -> Iterator[list[Tensor]]:
        """Index whole tensors, as ``TensorLoader`` does."""
        for picks in self._rows_of_rank():
            chosen = torch.tensor(picks)
            chosen = chosen if rows is None else rows[chosen]
            yield [tensor[chosen] for tensor in tensors]

    def _rows_of_rank(self) -> Iterator[list[int]]:
        """Rows of this rank in each step; their shares are queued for ``__iter__``."""
        ranks, size, place = self._ranks, self._size, 0
        for step in _regroup(self._order(), size * ranks.world_size):
            if len(step) < size * ranks.world_size and self._drops:
                return
            start, count = assign_rows(len(step), size, ranks.rank, ranks.world_size)
            self._shares.append(RankShare(place + start, count, len(step)))
            place += len(step)
            yield (step[start : start + count] if count else step[:size]).tolist()

    def _order(self) -> Iterator[Tensor]:
        """Rank 0's order in pieces, sent to every rank."""
        if self._ranks.rank:
            while len(piece := self._ranks.broadcast_order(None)):
                yield piece
            return
        drawn = iter(self._sampler)
        while True:
            piece = torch.tensor(list(islice(drawn, CHUNK)), dtype=torch.int64)
            yield self._ranks.broadcast_order(piece)
            if not len(piece):
                return


def _pair_with_shares(
    batches: Iterator[object], shares: deque[RankShare]
) -> Iterator[tuple[Batch, RankShare]]:
    """Pair each batch with the share that was queued when its rows were chosen."""
    for batch in batches:
        yield batch, shares.popleft()


def _regroup(pieces: Iterator[Tensor], size: int) -> Iterator[Tensor]:
    """Cut the pieces into `size` rows each; the last one may be shorter."""
    held = torch.empty(0, dtype=torch.int64)
    for piece in pieces:
        held = torch.cat([held, piece])
        full = len(held) // size * size
        for first in range(0, full, size):
            yield held[first : first + size]
        held = held[full:]
    if len(held):
        yield held


class _RowSampler(Sampler[list[int]]):
    """Sampler that yields the rank's rows."""

    def __init__(self, picks: Callable[[], Iterator[list[int]]]) -> None:
        self._rows_of_rank = picks

    def __iter__(self) -> Iterator[list[int]]:
        return self._rows_of_rank()


class _UndividedSampler(Sampler[int]):
    """The order of a ``DistributedSampler`` before it repeats samples and divides them."""

    def __init__(self, sampler: DistributedSampler[object]) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        return len(self._sampler.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[int]:
        # torch 2.13, DistributedSampler.__iter__
        if not self._sampler.shuffle:
            return iter(range(len(self)))
        drawn = torch.Generator().manual_seed(self._sampler.seed + self._sampler.epoch)
        return iter(torch.randperm(len(self), generator=drawn).tolist())


def _undivided_sampler(sampler: object) -> Any:
    """The sampler; for a ``DistributedSampler``, one with its undivided order."""
    return (
        _UndividedSampler(sampler)
        if isinstance(sampler, DistributedSampler)
        else sampler
    )


class _BatchSamplerSource:
    """Batches of rows from a custom batch sampler, one per rank in each step."""

    def __init__(self, loader: Loader, batches: Any, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._batches = batches
        self._shares: deque[RankShare] = deque()
        self._rank_loader = _copy_loader(
            loader, batch_sampler=_RowSampler(self._rows_of_rank)
        )

    def __len__(self) -> int:
        return -(-len(self._batches) // self._ranks.world_size)

    def __iter__(self) -> Iterator[tuple[Batch, RankShare]]:
        self._shares.clear()
        return _pair_with_shares(iter_batches(self._rank_loader), self._shares)

    def _rows_of_rank(self) -> Iterator[list[Any]]:
        ranks, place = self._ranks, 0
        drawn = iter(self._batches) if ranks.rank == 0 else iter(())
        many = max(1, CHUNK // (1024 * ranks.world_size)) * ranks.world_size
        while batches := ranks.broadcast([list(rows) for rows in islice(drawn, many)]):
            for first in range(0, len(batches), ranks.world_size):
                step = batches[first : first + ranks.world_size]
                sizes = [len(rows) for rows in step]
                mine = step[ranks.rank] if ranks.rank < len(step) else []
                start = place + sum(sizes[: ranks.rank])
                self._shares.append(RankShare(start, len(mine), sum(sizes)))
                place += sum(sizes)
                yield mine or step[0]


# ------------------------------------------------------------------ streams


@dataclass(slots=True)
class _SharedSample:
    """A sample of a stream, with its rank's share of the step."""

    sample: object
    share: RankShare


class _StreamSource:
    """Samples of a stream that every rank reads completely, divided step by step."""

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        self._loader = loader
        self._ranks = ranks
        size = loader.batch_size or 1
        stream = _RankStream(
            loader.dataset, size, loader.drop_last, ranks.rank, ranks.world_size
        )
        self._rank_loader = _copy_loader(
            loader,
            dataset=stream,
            batch_size=size,
            collate_fn=_CollateShared(loader.collate_fn),
        )

    def __len__(self) -> int:
        count = len(self._loader.dataset)  # type: ignore[arg-type]
        size = (self._loader.batch_size or 1) * self._ranks.world_size
        return count // size if self._loader.drop_last else -(-count // size)

    def __iter__(self) -> Iterator[tuple[Batch, RankShare]]:
        return iter_batches(self._rank_loader)


class _RankStream(IterableDataset[_SharedSample]):
    """One rank's samples of a stream; in a worker, of the worker's part of the stream."""

    def __init__(
        self, dataset: Any, size: int, drops: bool, rank: int, world_size: int
    ) -> None:
        self._dataset = dataset
        self._size = size
        self._drops = drops
        self._rank = rank
        self._world_size = world_size

    def __iter__(self) -> Iterator[_SharedSample]:
        samples, place = iter(self._dataset), 0
        full = self._size * self._world_size
        while step := list(islice(samples, full)):
            if len(step) < full and self._drops:
                return
            start, count = assign_rows(
                len(step), self._size, self._rank, self._world_size
            )
            share = RankShare(place + start, count, len(step))
            place += len(step)
            for sample in step[start : start + count] or step[: self._size]:
                yield _SharedSample(sample, share)


class _CollateShared:
    """Runs the user's collate function, and returns the share with its batch."""

    def __init__(self, collate: Callable[[list[object]], object]) -> None:
        self._collate = collate

    def __call__(self, items: Sequence[_SharedSample]) -> tuple[Batch, RankShare]:
        return self._collate([item.sample for item in items]), items[0].share


class _BatchSource:
    """Batches of unknown length, one per rank in each step.

    With `every`, each rank's loader yields all batches, and the rank keeps every
    ``world_size``-th. Otherwise it yields only the rank's batches, and ranks may run out of
    them at different steps.
    """

    def __init__(self, loader: Loader, ranks: RankGroup, *, every: bool) -> None:
        self._loader = loader
        self._ranks = ranks
        self._every = every

    def __len__(self) -> int:
        count = len(self._loader)
        if self._every:
            return -(-count // self._ranks.world_size)
        return max(self._ranks.gather_counts(count))

    def __iter__(self) -> Iterator[tuple[Batch, RankShare]]:
        ranks, place = self._ranks, 0
        own = self._own_batches() if self._every else iter_batches(self._loader)
        last: object = None
        while True:
            batch = next(own, None)
            counts = ranks.gather_counts(-1 if batch is None else _count_rows(batch))
            alive = [rank for rank, count in enumerate(counts) if count >= 0]
            if not alive:
                return
            if len(alive) < ranks.world_size and ranks.any(
                batch is None and last is None
            ):
                # A rank that never had a batch uses another rank's as placeholder.
                received = ranks.broadcast(batch, src=alive[0])
                last = received if last is None else last
            counts = [max(count, 0) for count in counts]
            start = place + sum(counts[: ranks.rank])
            share = RankShare(start, counts[ranks.rank], max(1, sum(counts)))
            place += sum(counts)
            last = last if batch is None else batch
            yield last, share

    def _own_batches(self) -> Iterator[Batch]:
        """One of every ``world_size`` batches, by rank."""
        batches = iter_batches(self._loader)
        return islice(batches, self._ranks.rank, None, self._ranks.world_size)


def _count_rows(batch: object) -> int:
    """Number of rows of a batch; 1 if it is unknown."""
    rows = num_rows(input_of(batch), target_of(batch))
    return 1 if rows is None else rows
