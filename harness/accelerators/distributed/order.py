"""The order in which rank 0's sampler gives rows, sent to every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import BatchSampler, Sampler

from harness.accelerators.distributed.group import RankGroup
from harness.data.tensors import UPFRONT_SAMPLERS
from harness.rng import (
    RandomStream,
    find_generators,
    get_cpu_rng_state,
    get_generator_states,
    set_generator_states,
)

CHUNK = 1 << 16
"""Rows of the order that rank 0 sends at once: half a megabyte."""


class SharedOrder:
    """The order in which rank 0's sampler gives rows, indices or batches, on every rank.

    Parameters
    ----------
    size : >= 1
        Items that are sent at once.

    Raises
    ------
    ValueError
        In the first pass, if the sampler of another rank gives rows that rank 0's does not,
        because it divides them itself. The others raise ``PeerError``.
    """

    def __init__(self, sampler: Any, ranks: RankGroup, size: int = CHUNK) -> None:
        self._sampler, self._ranks, self._size = sampler, ranks, size
        is_known = type(sampler) in {*UPFRONT_SAMPLERS, BatchSampler}
        is_marked = getattr(sampler, "sharded", None) is not None
        self._is_checked = is_known or is_marked

    def __len__(self) -> int:
        return len(self._sampler)

    def group(self, size: int) -> Iterator[list[Any]]:
        """Yield the items `size` at a time; the last group may be shorter."""
        pending: list[object] = []
        for piece in self._send():
            pending += piece
            full = len(pending) // size * size
            for first in range(0, full, size):
                yield pending[first : first + size]
            pending = pending[full:]
        if pending:
            yield pending

    def _send(self) -> Iterator[list[object]]:
        """Rank 0's items in pieces, sent to every rank."""
        own = None if self._is_checked else self._draw_as_rank_0()
        drawn = iter(self._sampler) if self._ranks.rank == 0 else iter(())
        while piece := self._ranks.broadcast_objects(list(islice(drawn, self._size))):
            if own is not None:
                self._check(own, piece)
                own = None
            yield piece

    def _draw_as_rank_0(self) -> list[object]:
        """First items of this rank's sampler with the random state of rank 0."""
        generators = find_generators(self._sampler)
        before = get_generator_states(generators)
        state, states = self._ranks.broadcast_objects((get_cpu_rng_state(), before))
        if self._ranks.rank == 0:
            return []
        set_generator_states(generators, states)
        own = RandomStream(state).run(lambda: list(islice(self._sampler, self._size)))
        set_generator_states(generators, before)
        return own

    def _check(self, own: list[object], first: list[object]) -> None:
        """Raise on one rank if the items of another one are others than those of rank 0."""

        def compare() -> None:
            mine, theirs = _rows_in(own), _rows_in(first)
            if len(mine) > 1 and not mine & theirs:
                msg = f"{type(self._sampler).__name__}: expected the same rows on every rank"
                got = f"{own[0]!r:.100} on rank {self._ranks.rank}, which rank 0 does not get"
                advice = (
                    "If it divides the rows over the ranks, set sharded = True on it;"
                    " otherwise sharded = False."
                )
                raise ValueError(f"{msg}, got {got}. {advice}")

        self._ranks.check_on_every_rank(compare)
        self._is_checked = True


def _rows_in(items: list[object]) -> set[str]:
    """Rows in a list of rows or of batches of them."""
    lists = (item.tolist() if hasattr(item, "tolist") else item for item in items)
    batches = (item if isinstance(item, list | tuple) else [item] for item in lists)
    return {repr(row) for batch in batches for row in batch}


class PickSampler(Sampler[object]):
    """Sampler that yields what a function picks."""

    def __init__(self, pick: Callable[[], Iterator[object]]) -> None:
        self._pick = pick

    def __iter__(self) -> Iterator[object]:
        return self._pick()


class UndividedSampler(Sampler[int]):
    """The order of a ``DistributedSampler`` before it repeats samples and divides them."""

    sharded = False

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def __len__(self) -> int:
        count, ranks = len(self._sampler.dataset), self._sampler.num_replicas
        return count // ranks * ranks if self._sampler.drop_last else count

    def __iter__(self) -> Iterator[int]:
        # torch 2.13, DistributedSampler.__iter__
        count = len(self._sampler.dataset)
        if not self._sampler.shuffle:
            return iter(range(len(self)))
        drawn = torch.Generator().manual_seed(self._sampler.seed + self._sampler.epoch)
        order = torch.randperm(count, generator=drawn).tolist()
        return iter(order[: len(self)])
