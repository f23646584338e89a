"""Loaders divided over ranks: each sample once, the same number of batches on every rank.

What the loader's sampler gives is what is trained on. Rank 0 draws the order and sends it to
the other ranks, so any sampler works. Each step takes one batch per rank from that order.
The batches of the ranks are consecutive in it, so gathering them rank by rank restores the
order. Streams and other loaders without an order of indices are read by every rank with the
same random numbers; it is checked that the ranks read alike.

If the samples of the last step do not fill every rank's batch, they are divided evenly. A
rank without samples still takes part, because the others wait for it in collectives. It gets
a placeholder batch that does not count, and its ``RankShare`` has ``count`` 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from harness.accelerators.distributed.group import RankGroup
from harness.accelerators.distributed.row_split import RankShare, ShareTracker
from harness.accelerators.distributed.sharding import share_random_stream
from harness.accelerators.distributed.sources import make_source
from harness.data.batch import Batch, copy_by_value
from harness.data.loaders import Loader
from harness.data.train_pass import find_epoch_setters

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
    shares
        Records the share of each batch.
    before_eval
        Called before each pass; None: this is the training loader.
    has_pairs
        Give no rank a single row; see ``RowSplit``.

    Notes
    -----
    - Map-style data: rank 0 draws the order from the loader's own sampler.
    - A custom batch sampler, or ``batch_size=None``: a step takes one whole batch per rank.
    - Iterable data, and loaders with an ``__iter__`` of their own: each rank reads
      everything and keeps its part. Ranks draw the same random numbers for it.
    - A sampler or data set that has the number of ranks and this rank as attributes, as
      ``DistributedSampler`` has, or ``sharded = True``, gives each rank its own samples.
      Ranks may then run out of samples at different steps.
    - torch's ``DistributedSampler`` repeats samples so that all ranks get the same number.
      Its order is kept, without the repetitions. A subclass is taken as it is.
    """

    def __init__(
        self,
        loader: Loader,
        ranks: RankGroup,
        shares: ShareTracker,
        before_eval: Callable[[], None] | None,
        *,
        has_pairs: bool,
    ) -> None:
        self._loader, self._ranks = loader, ranks
        self._shares, self._before_eval = shares, before_eval
        self.share: RankShare | None = None
        self._source = make_source(loader, ranks, has_pairs=has_pairs)

    def __iter__(self) -> Iterator[Batch]:
        if self._before_eval is not None:
            self._before_eval()
        # Create the iterator now and not lazily: torch draws a random number for it.
        return self._iterate(iter(self._source))

    def _iterate(self, source: Iterator[tuple[Batch, RankShare]]) -> Iterator[Batch]:
        try:
            for batch, share in source:
                yield self._record(batch, share)
        finally:
            self._shares.clear()

    def _record(self, batch: Batch, share: RankShare) -> Batch:
        self.share = share
        return self._shares.record(batch, share, is_train=self._before_eval is None)

    def __len__(self) -> int:
        return len(self._source)

    def __getattr__(self, name: str) -> Any:
        """Attributes of the original loader, but not its position."""
        if name in _KNOWN:
            return getattr(self._loader, name)
        msg = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(msg)

    @property
    def has_random_stream(self) -> bool:
        """True if reading draws from a random stream that all ranks share."""
        return self._source.has_random_stream

    @property
    def reads_all(self) -> bool:
        """True if each rank reads all data and keeps its part."""
        return self._source.reads_all

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on; what that draws at random is the same on every rank."""
        setters = find_epoch_setters(self._loader)
        if setters:
            stream = share_random_stream(self._loader, self._ranks)
            stream.run(lambda: [setter(epoch) for setter in setters])

    @property
    def undivided(self) -> Loader:
        """The original loader, as one process would use it."""
        return self._loader

    def copy_batch(self, batch: Batch) -> Batch:
        """Copy the last batch and record the same share for the copy."""
        assert self.share is not None
        return self._record(copy_by_value(batch), self.share)


def shard_loaders(
    loaders: Sequence[Any],
    ranks: RankGroup,
    shares: ShareTracker,
    before_eval: Callable[[], None],
    *,
    has_pairs: bool = False,
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
    has_pairs
        Give no rank a single row of the training loader; see ``RowSplit``.
    """
    if ranks.world_size == 1:
        return list(loaders)
    return [
        None
        if loader is None
        else ShardedLoader(
            loader,
            ranks,
            shares,
            before_eval if place else None,
            has_pairs=has_pairs and place == 0,
        )
        for place, loader in enumerate(loaders)
    ]
