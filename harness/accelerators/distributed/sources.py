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

from harness.accelerators.distributed.group import RankGroup
from harness.accelerators.distributed.order import (
    CHUNK,
    PickSampler,
    SharedOrder,
    UndividedSampler,
)
from harness.accelerators.distributed.row_split import RankShare, RowSplit
from harness.accelerators.distributed.sharding import (
    LengthCheck,
    check_same_rows,
    digest_leaves,
    find_sharding_parts,
    is_check_due,
    is_marked_unsharded,
    share_random_stream,
)
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


def make_source(loader: Loader, ranks: RankGroup, *, has_pairs: bool) -> Source:
    """Choose the source of the rank's batches and shares for this kind of loader.

    Every rank must call it; `has_pairs` is as in ``RowSplit``.
    """
    dividers = find_sharding_parts(loader, ranks)
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


class Source:
    """One rank's batches of a loader, each with its share of the step.

    Attributes
    ----------
    has_random_stream
        Reading draws from a random stream that all ranks share.
    reads_all
        Each rank reads all data and keeps its part.
    """

    has_random_stream = False
    reads_all = False

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        self._loader, self._ranks = loader, ranks
        self._has_warned = False

    def __len__(self) -> int:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Shared]:
        raise NotImplementedError

    def _count_steps(self, num_batches: int) -> int:
        """Steps that take one batch per rank."""
        return -(-num_batches // self._ranks.world_size)

    def _count_rows(self, batch: object) -> int:
        """Rows of a batch; warns once if they cannot be known."""
        rows = num_rows(input_of(batch), target_of(batch))
        if rows is None and not self._has_warned:
            self._has_warned = True
            warn_unknown_rows(batch)
        return 1 if rows is None else rows

    def _read_as_one(self) -> Iterator[Batch]:
        """Batches of the loader, read with the same random numbers on every rank."""
        stream = share_random_stream(self._loader, self._ranks)
        return stream.iterate(stream.run(lambda: iter_batches(self._loader)))


# --------------------------------------------------------------- map-style data


def _copy_of_rank(
    loader: Loader, ranks: RankGroup, pick: Callable[[], Iterator[object]]
) -> Loader:
    """Copy a loader for what this rank picks; its workers draw numbers of their own."""
    picks = PickSampler(pick)
    options: Options = {} if ranks.rank == 0 else {"generator": None}
    if loader.batch_sampler is None:
        return copy_loader(loader, batch_size=None, sampler=picks, **options)
    return copy_loader(loader, batch_sampler=picks, **options)


class _OrderSource(Source):
    """Rows in an order that all ranks share, divided step by step."""

    def __init__(self, loader: Loader, ranks: RankGroup, order: SharedOrder) -> None:
        super().__init__(loader, ranks)
        self._order = order
        self._shares: deque[RankShare] = deque()
        self._rank_loader = _copy_of_rank(loader, ranks, self._pick)

    def __iter__(self) -> Iterator[Shared]:
        self._shares.clear()
        return self._add_shares(self._read())

    def _add_shares(self, batches: Iterator[object]) -> Iterator[Shared]:
        for batch in batches:
            yield batch, self._shares.popleft()

    def _read(self) -> Iterator[object]:
        """Batches of the rows that ``_pick`` yields; the loader may read ahead."""
        return iter_batches(self._rank_loader)

    def _pick(self) -> Iterator[list[object]]:
        """Rows of this rank in each step; their shares are queued for ``__iter__``."""
        raise NotImplementedError


class RowSource(_OrderSource):
    """Rows of torch's own batches, which are cut anew."""

    def __init__(
        self,
        loader: Loader,
        batches: BatchSampler,
        sampler: Any,
        ranks: RankGroup,
        *,
        has_pairs: bool,
    ) -> None:
        super().__init__(loader, ranks, SharedOrder(sampler, ranks))
        sizes = batches.batch_size, batches.drop_last
        self._split = RowSplit(*sizes, ranks.rank, ranks.world_size, has_pairs)
        is_plain = (
            loader.batch_size is not None and loader.collate_fn is default_collate
        )
        is_fast = is_plain and not loader.num_workers
        self._tensors = unwrap_tensors(loader.dataset) if is_fast else None

    def __len__(self) -> int:
        return self._split.count_steps(len(self._order))

    def _read(self) -> Iterator[object]:
        if self._tensors is None:
            return super()._read()
        # torch's loader draws its base seed here, before the sampler draws.
        torch.empty((), dtype=torch.int64).random_(generator=self._loader.generator)
        return self._index_tensors(*self._tensors)

    def _index_tensors(
        self, tensors: Sequence[Tensor], rows: Tensor | None
    ) -> Iterator[Any]:
        """Index whole tensors, as ``TensorLoader`` does."""
        loader, build = self._loader, get_form(self._loader.dataset)
        sources = [(tensor, choose_allocation(loader, tensor)) for tensor in tensors]
        for picks in self._pick():
            chosen = torch.tensor(picks, dtype=torch.int64)
            chosen = chosen if rows is None else rows[chosen]
            chosen = count_from_start(chosen, tensors[0])
            yield build([take_rows(tensor, chosen, make) for tensor, make in sources])

    def _pick(self) -> Iterator[list[object]]:
        for own, share, _ in self._split.divide(
            self._order.group(self._split.num_rows)
        ):
            self._shares.append(share)
            yield own


class BatchSamplerSource(_OrderSource):
    """Batches of rows from a custom batch sampler, one per rank in each step."""

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        order = SharedOrder(loader.batch_sampler, ranks, CHUNK // 1024)
        super().__init__(loader, ranks, order)

    def __len__(self) -> int:
        return self._count_steps(len(self._order))

    def _pick(self) -> Iterator[list[object]]:
        ranks, place = self._ranks, 0
        for step in self._order.group(ranks.world_size):
            share = RankShare.of_counts(place, [len(rows) for rows in step], ranks.rank)
            self._shares.append(share)
            place += share.total
            yield list(step[ranks.rank]) if share.count else list(step[0])


# ----------------------------------------------------------------------- streams


@dataclass(slots=True)
class _Step:
    """A rank's samples of a step, before they are a batch.

    ``digests`` tells what all ranks read in this step, if it is compared.
    """

    samples: list[object]
    share: RankShare
    digests: list[list[int]] | None


class StreamSource(Source):
    """Samples of a stream that every rank reads completely, divided step by step."""

    has_random_stream = True
    reads_all = True

    def __init__(self, loader: Loader, ranks: RankGroup, *, has_pairs: bool) -> None:
        super().__init__(loader, ranks)
        sizes = loader.batch_size or 1, loader.drop_last
        self._split = RowSplit(*sizes, ranks.rank, ranks.world_size, has_pairs)
        self._rank_loader = copy_loader(
            loader,
            dataset=_RankStream(loader, self._split),
            batch_size=None,
            collate_fn=_CollateStep(loader.collate_fn),
        )

    def __len__(self) -> int:
        return self._split.count_steps(len(self._loader.dataset))  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Shared]:
        stream = share_random_stream(self._loader, self._ranks)
        batches = stream.run(lambda: iter_batches(self._rank_loader))
        return self._check(stream.iterate(batches))

    def _check(self, batches: Iterator[Any]) -> Iterator[Shared]:
        """Check in each step that the ranks read alike."""
        place = type(self._loader.dataset).__name__
        lengths = LengthCheck(self._ranks, place)
        for batch, share, digests in batches:
            lengths.step(has_data=True)
            if digests is not None:
                check_same_rows(digests, place, self._ranks)
            yield batch, share
        lengths.step(has_data=False)


class _RankStream(IterableDataset[_Step]):
    """One rank's samples of a stream; in a worker, of the worker's part of the stream."""

    def __init__(self, loader: Loader, split: RowSplit) -> None:
        self._dataset: Any = loader.dataset
        self._split = split
        self._is_checked = not is_marked_unsharded(loader)

    def __iter__(self) -> Iterator[_Step]:
        samples, size = iter(self._dataset), self._split.num_rows
        steps = iter(lambda: list(islice(samples, size)), [])
        for number, (own, share, step) in enumerate(self._split.divide(steps), start=1):
            is_due = self._is_checked and is_check_due(number)
            yield _Step(own, share, digest_leaves(step) if is_due else None)


class _CollateStep:
    """Runs the user's collate function, and returns the share with its batch."""

    def __init__(self, collate: Callable[[list[object]], object]) -> None:
        self._collate = collate

    def __call__(self, step: _Step) -> tuple[object, ...]:
        return self._collate(step.samples), step.share, step.digests


# ------------------------------------------------------------------ whole batches


class WholeBatchSource(Source):
    """Batches that every rank reads completely; it keeps every ``world_size``-th."""

    has_random_stream = True
    reads_all = True

    def __len__(self) -> int:
        return self._count_steps(len(self._loader))

    def __iter__(self) -> Iterator[Shared]:
        return self._divide(self._read_as_one())

    def _divide(self, batches: Iterator[Batch]) -> Iterator[Shared]:
        ranks, number, place = self._ranks, 0, 0
        name = type(self._loader).__name__
        lengths, is_due = (
            LengthCheck(ranks, name),
            not is_marked_unsharded(self._loader),
        )
        last: object = None
        while True:
            number += 1
            counts: list[int] = []
            digests: list[list[list[int]]] = []
            for batch in islice(batches, ranks.world_size):
                if is_due and is_check_due(number):
                    digests.append(digest_leaves([batch]))
                # A loader may reuse its tensors for the next batch.
                if len(counts) == ranks.rank or (not counts and last is None):
                    last = copy_by_value(batch)
                counts.append(self._count_rows(batch))
            lengths.step(has_data=bool(counts))
            if not counts:
                return
            if is_due and is_check_due(number):
                leaves = [
                    list(chain(*places)) for places in zip(*digests, strict=False)
                ]
                check_same_rows(leaves, name, ranks)
            share = RankShare.of_counts(place, counts, ranks.rank)
            place += sum(counts)
            yield last, share


class OwnBatchSource(Source):
    """Batches of a loader that gives each rank its own, in any number on each rank.

    Ranks draw the same random numbers: the loader may draw an order of all and take a part.
    """

    has_random_stream = True

    def __len__(self) -> int:
        return max(self._ranks.gather_counts(len(self._loader)))

    def __iter__(self) -> Iterator[Shared]:
        return self._take_turns(self._read_as_one())

    def _take_turns(self, batches: Iterator[Batch]) -> Iterator[Shared]:
        ranks, place, last = self._ranks, 0, None
        while True:
            batch = next(batches, None)
            counts = ranks.gather_counts(
                -1 if batch is None else self._count_rows(batch)
            )
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
            share = RankShare.of_counts(place, counts, ranks.rank)
            place += sum(counts)
            last = last if batch is None else batch
            yield last, share


class _PickedBatchSource(OwnBatchSource):
    """Batches of what each rank picks from map-style data."""

    has_random_stream = False

    def __init__(self, loader: Loader, ranks: RankGroup) -> None:
        super().__init__(loader, ranks)
        self._rank_loader = _copy_of_rank(loader, ranks, self._pick)

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
        return self._count_steps(len(self._order))

    def _pick(self) -> Iterator[object]:
        for step in self._order.group(self._ranks.world_size):
            if self._ranks.rank < len(step):
                yield step[self._ranks.rank]
