"""Sources of a divided loader: each yields the rank's batches with their shares."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    default_collate,
)

from harness.accelerators.distributed.alike import (
    LengthCheck,
    check_alike,
    digest_leaves,
    is_checked,
    share_random_stream,
)
from harness.accelerators.distributed.group import RankGroup
from harness.accelerators.distributed.order import (
    CHUNK,
    PickSampler,
    SharedOrder,
    UndividedSampler,
)
from harness.accelerators.distributed.own_division import find_dividers, is_alike
from harness.accelerators.distributed.shares import RankShare, assign_rows
from harness.data.batch import (
    Batch,
    copy_by_value,
    input_of,
    num_rows,
    target_of,
    warn_unknown_rows,
)
from harness.data.loaders import Loader
from harness.data.tensors import (
    TensorLoader,
    choose_allocation,
    count_from_start,
    get_form,
    take_rows,
    unwrap_tensors,
)
from harness.data.workers import iter_batches
from harness.pytree import Options

Shared = tuple[Batch, RankShare]
"""A batch of this rank, and its share of the step."""


def make_source(loader: Loader, ranks: RankGroup, *, has_pairs: bool) -> Any:
    """Choose the source of the rank's batches and shares for this kind of loader.

    Every rank must call it; `has_pairs` is as in ``assign_rows``.
    """
    dividers = find_dividers(loader, ranks)
    rows = find_row_batches(loader)
    if dividers:
        by_torch = all(type(part) is DistributedSampler for part in dividers)
        if rows is None or not by_torch:
            is_own = all(isinstance(part, IterableDataset) for part in dividers)
            is_own = is_own or not iterates_as_torch(loader)
            return (OwnBatchSource if is_own else OwnSamplerSource)(loader, ranks)
        order = UndividedSampler(rows.sampler)
        return RowSource(loader, rows, order, ranks, has_pairs=has_pairs)
    if rows is not None:
        return RowSource(loader, rows, rows.sampler, ranks, has_pairs=has_pairs)
    is_stream = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if not iterates_as_torch(loader) or (is_stream and loader.batch_size is None):
        return WholeBatchSource(loader, ranks)
    if is_stream:
        return StreamSource(loader, ranks, has_pairs=has_pairs)
    if loader.batch_sampler is not None:
        return BatchSamplerSource(loader, ranks)
    return ReadyBatchSource(loader, ranks)


def iterates_as_torch(loader: object) -> bool:
    """True if a loader is iterated by torch's own code, so that its samplers decide."""
    kinds = (DataLoader.__iter__, TensorLoader.__iter__)
    return (
        isinstance(loader, DataLoader)
        and type(loader).__iter__ in kinds
        and type(loader)._get_iterator is DataLoader._get_iterator
    )


def find_row_batches(loader: Loader) -> BatchSampler | None:
    """The sampler that joins rows to batches, if it is torch's; its batches may be cut anew."""
    if not iterates_as_torch(loader) or isinstance(loader.dataset, IterableDataset):
        return None
    batches = loader.sampler if loader.batch_size is None else loader.batch_sampler
    return batches if type(batches) is BatchSampler else None


def copy_loader(loader: Loader, **changes: Any) -> Loader:
    """Copy a loader with changed options."""
    options: Options = {
        name: getattr(loader, name)
        for name in (
            *("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn"),
            *("multiprocessing_context", "generator", "prefetch_factor"),
            *("persistent_workers", "pin_memory_device"),
        )
    }
    return DataLoader(**({"dataset": loader.dataset} | options | changes))


# --------------------------------------------------------------- map-style data


class RowSource:
    """Rows in an order that all ranks share, divided step by step."""

    has_random_stream = False

    def __init__(
        self,
        loader: Loader,
        batches: BatchSampler,
        sampler: Any,
        ranks: RankGroup,
        *,
        has_pairs: bool,
    ) -> None:
        self._has_pairs = has_pairs
        self._ranks, self._loader = ranks, loader
        self._order = SharedOrder(sampler, ranks)
        self._size, self._drops = batches.batch_size, batches.drop_last
        self._shares: deque[RankShare] = deque()
        order = PickSampler(self._rows_of_rank)
        if loader.batch_size is None:
            self._rank_loader = _copy_of_rank(
                loader, ranks, batch_size=None, sampler=order
            )
        else:
            self._rank_loader = _copy_of_rank(loader, ranks, batch_sampler=order)
        found = unwrap_tensors(loader.dataset)
        fast = found is not None and not loader.num_workers
        is_plain = (
            loader.batch_size is not None and loader.collate_fn is default_collate
        )
        self._tensors = found if fast and is_plain else None

    def __len__(self) -> int:
        count = len(self._order)
        full, rest = divmod(count, self._size * self._ranks.world_size)
        return full + bool(rest and not self._drops)

    def __iter__(self) -> Iterator[Shared]:
        self._shares.clear()
        if self._tensors is None:
            return _pair_with_shares(iter_batches(self._rank_loader), self._shares)
        # torch's loader draws its base seed here, before the sampler draws.
        torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        return _pair_with_shares(self._index_tensors(*self._tensors), self._shares)

    def _index_tensors(
        self, tensors: Sequence[Tensor], rows: Tensor | None
    ) -> Iterator[Any]:
        """Index whole tensors, as ``TensorLoader`` does."""
        loader, build = self._loader, get_form(self._loader.dataset)
        sources = [(tensor, choose_allocation(loader, tensor)) for tensor in tensors]
        for picks in self._rows_of_rank():
            chosen = torch.tensor(picks, dtype=torch.int64)
            chosen = chosen if rows is None else rows[chosen]
            chosen = count_from_start(chosen, tensors[0])
            yield build([take_rows(tensor, chosen, make) for tensor, make in sources])

    def _rows_of_rank(self) -> Iterator[list[object]]:
        """Rows of this rank in each step; their shares are queued for ``__iter__``."""
        ranks, size, place = self._ranks, self._size, 0
        full = size * ranks.world_size
        for step in self._order.group(full):
            if len(step) < full and self._drops:
                return
            start, count = assign_rows(
                len(step), size, ranks.rank, ranks.world_size, has_pairs=self._has_pairs
            )
            self._shares.append(RankShare(place + start, count, len(step)))
            place += len(step)
            yield step[start : start + count] if count else step[:size]


def _copy_of_rank(loader: Loader, ranks: RankGroup, **changes: Any) -> Loader:
    """Copy a loader for what this rank picks; its workers draw numbers of their own."""
    own = {} if ranks.rank == 0 else {"generator": None}
    return copy_loader(loader, **own, **changes)


def _pair_with_shares(
    batches: Iterator[object], shares: deque[RankShare]
) -> Iterator[Shared]:
    """Pair each batch with the share that was queued when its rows were chosen."""
    for batch in batches:
        yield batch, shares.popleft()


class BatchSamplerSource:
    """Batches of rows from a custom batch sampler, one per rank in each step."""

    has_random_stream = False

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        self._ranks = ranks
        self._order = SharedOrder(loader.batch_sampler, ranks, CHUNK // 1024)
        self._shares: deque[RankShare] = deque()
        picks = PickSampler(self._rows_of_rank)
        self._rank_loader = _copy_of_rank(loader, ranks, batch_sampler=picks)

    def __len__(self) -> int:
        return -(-len(self._order) // self._ranks.world_size)

    def __iter__(self) -> Iterator[Shared]:
        self._shares.clear()
        return _pair_with_shares(iter_batches(self._rank_loader), self._shares)

    def _rows_of_rank(self) -> Iterator[list[object]]:
        ranks, place = self._ranks, 0
        for step in self._order.group(ranks.world_size):
            sizes = [len(rows) for rows in step]
            mine = list(step[ranks.rank]) if ranks.rank < len(step) else []
            start = place + sum(sizes[: ranks.rank])
            self._shares.append(RankShare(start, len(mine), sum(sizes)))
            place += sum(sizes)
            yield mine or list(step[0])


# ----------------------------------------------------------------------- streams


@dataclass(slots=True)
class _Step:
    """A rank's samples of a step, before they are a batch.

    ``digests`` tells what all ranks read in this step, if it is compared.
    """

    samples: list[object]
    share: RankShare
    digests: list[list[int]] | None


class StreamSource:
    """Samples of a stream that every rank reads completely, divided step by step."""

    has_random_stream = True
    reads_all = True

    def __init__(self, loader: Loader, ranks: RankGroup, *, has_pairs: bool) -> None:
        self._loader, self._ranks = loader, ranks
        self._rank_loader = copy_loader(
            loader,
            dataset=_RankStream(loader, ranks.rank, ranks.world_size, has_pairs),
            batch_size=None,
            collate_fn=_CollateStep(loader.collate_fn),
        )

    def __len__(self) -> int:
        count = len(self._loader.dataset)  # type: ignore[arg-type]
        size = (self._loader.batch_size or 1) * self._ranks.world_size
        return count // size if self._loader.drop_last else -(-count // size)

    def __iter__(self) -> Iterator[Shared]:
        stream = share_random_stream(self._loader, self._ranks)
        batches = stream.run(lambda: iter_batches(self._rank_loader))
        return self._check(stream.iterate(batches))

    def _check(self, batches: Iterator[Any]) -> Iterator[Shared]:
        """Check in each step that the ranks read alike."""
        place = f"{type(self._loader.dataset).__name__}"
        lengths = LengthCheck(self._ranks, place)
        for batch, share, digests in batches:
            lengths.step(has_data=True)
            if digests is not None:
                check_alike(digests, place, self._ranks)
            yield batch, share
        lengths.step(has_data=False)


class _RankStream(IterableDataset[_Step]):
    """One rank's samples of a stream; in a worker, of the worker's part of the stream."""

    def __init__(
        self, loader: Loader, rank: int, world_size: int, has_pairs: bool
    ) -> None:
        self._dataset: Any = loader.dataset
        self._size, self._drops = loader.batch_size or 1, loader.drop_last
        self._is_checked = not is_alike(loader)
        self._rank, self._world_size = rank, world_size
        self._has_pairs = has_pairs

    def __iter__(self) -> Iterator[_Step]:
        samples, place, number = iter(self._dataset), 0, 0
        size, rank, world_size = self._size, self._rank, self._world_size
        while step := list(islice(samples, size * world_size)):
            if len(step) < size * world_size and self._drops:
                return
            number += 1
            start, count = assign_rows(
                len(step), size, rank, world_size, has_pairs=self._has_pairs
            )
            share = RankShare(place + start, count, len(step))
            place += len(step)
            is_due = self._is_checked and is_checked(number)
            digests = digest_leaves(step) if is_due else None
            own = step[start : start + count] or step[:size]
            yield _Step(own, share, digests)


class _CollateStep:
    """Runs the user's collate function, and returns the share with its batch."""

    def __init__(self, collate: Callable[[list[object]], object]) -> None:
        self._collate = collate

    def __call__(self, step: _Step) -> tuple[object, ...]:
        return self._collate(step.samples), step.share, step.digests


# ------------------------------------------------------------------ whole batches


class WholeBatchSource:
    """Batches that every rank reads completely; it keeps every ``world_size``-th."""

    has_random_stream = True
    reads_all = True

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        self._loader, self._ranks = loader, ranks
        self._count = _RowCounter()

    def __len__(self) -> int:
        return -(-len(self._loader) // self._ranks.world_size)

    def __iter__(self) -> Iterator[Shared]:
        stream = share_random_stream(self._loader, self._ranks)
        batches = stream.run(lambda: iter_batches(self._loader))
        return self._divide(stream.iterate(batches))

    def _divide(self, batches: Iterator[Batch]) -> Iterator[Shared]:
        ranks, number, place = self._ranks, 0, 0
        name = type(self._loader).__name__
        lengths, is_due = LengthCheck(ranks, name), not is_alike(self._loader)
        last: object = None
        while True:
            number += 1
            counts: list[int] = []
            digests: list[list[list[int]]] = []
            for batch in islice(batches, ranks.world_size):
                if is_due and is_checked(number):
                    digests.append(digest_leaves([batch]))
                # A loader may reuse its tensors for the next batch.
                if len(counts) == ranks.rank or (not counts and last is None):
                    last = copy_by_value(batch)
                counts.append(self._count(batch))
            lengths.step(has_data=bool(counts))
            if not counts:
                return
            if is_due and is_checked(number):
                leaves = [
                    list(chain(*places)) for places in zip(*digests, strict=False)
                ]
                check_alike(leaves, name, ranks)
            total = sum(counts)
            mine = counts[ranks.rank] if ranks.rank < len(counts) else 0
            start = place + sum(counts[: ranks.rank])
            place += total
            yield last, RankShare(start, mine, max(1, total))


class OwnBatchSource:
    """Batches of a loader that gives each rank its own, in any number on each rank.

    Ranks draw the same random numbers: the loader may draw an order of all and take a part.
    """

    has_random_stream = True

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        self._loader, self._ranks = loader, ranks
        self._count = _RowCounter()

    def __len__(self) -> int:
        return max(self._ranks.gather_counts(len(self._loader)))

    def __iter__(self) -> Iterator[Shared]:
        stream = share_random_stream(self._loader, self._ranks)
        batches = stream.run(lambda: iter_batches(self._loader))
        return self._take_turns(stream.iterate(batches))

    def _take_turns(self, batches: Iterator[Batch]) -> Iterator[Shared]:
        ranks, place, last = self._ranks, 0, None
        while True:
            batch = next(batches, None)
            counts = ranks.gather_counts(-1 if batch is None else self._count(batch))
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


class _PickedBatchSource(OwnBatchSource):
    """Batches of what each rank picks from map-style data."""

    has_random_stream = False

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        super().__init__(loader, ranks)
        picks = PickSampler(self._pick)
        if loader.batch_sampler is None:
            self._rank_loader = _copy_of_rank(
                loader, ranks, batch_size=None, sampler=picks
            )
        else:
            self._rank_loader = _copy_of_rank(loader, ranks, batch_sampler=picks)

    def __iter__(self) -> Iterator[Shared]:
        return self._take_turns(iter_batches(self._rank_loader))

    def _pick(self) -> Iterator[object]:
        """Indices of this rank, or lists of them."""
        raise NotImplementedError


class OwnSamplerSource(_PickedBatchSource):
    """Batches of a sampler that gives each rank rows of its own.

    Only the sampler draws the same random numbers on every rank, the data set does not.
    """

    def __iter__(self) -> Iterator[Shared]:
        self._stream = share_random_stream(self._loader, self._ranks)
        return super().__iter__()

    def _pick(self) -> Iterator[object]:
        own: Any = self._loader.batch_sampler
        own = self._loader.sampler if own is None else own
        return self._stream.iterate(self._stream.run(lambda: iter(own)))


class ReadyBatchSource(_PickedBatchSource):
    """Batches that a data set has ready by index, one per rank in each step."""

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        super().__init__(loader, ranks)
        self._order = SharedOrder(loader.sampler, ranks)

    def __len__(self) -> int:
        return -(-len(self._order) // self._ranks.world_size)

    def _pick(self) -> Iterator[object]:
        for step in self._order.group(self._ranks.world_size):
            if self._ranks.rank < len(step):
                yield step[self._ranks.rank]


class _RowCounter:
    """Counts the rows of batches; warns once if they cannot be known."""

    def __init__(self) -> None:
        self._has_warned = False

    def __call__(self, batch: object) -> int:
        rows = num_rows(input_of(batch), target_of(batch))
        if rows is None and not self._has_warned:
            self._has_warned = True
            warn_unknown_rows(batch)
        return 1 if rows is None else rows
