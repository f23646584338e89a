"""Read data alike on every rank: the same random numbers, and a check that rows are equal.

If every rank reads all of the data and keeps its part, the ranks have to read the same rows
in the same order.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.accelerators.distributed.group import PeerError, RankGroup
from harness.pytree import items_of
from harness.rng import (
    RandomStream,
    draw_seeds,
    find_generators,
    get_generator_states,
    seed_cpu_rng_state,
    set_generator_states,
)

SAMPLE = 256
"""Elements of a large tensor that are compared."""


def share_random_stream(loader: object, ranks: RankGroup) -> RandomStream:
    """Make a stream of random numbers that is the same on every rank.

    Generators that the loader holds get the state that they have on rank 0, too. Every rank
    must call it.
    """
    generators = find_generators(loader)
    own = draw_seeds(), get_generator_states(generators)
    seeds, states = ranks.broadcast_objects(own)
    set_generator_states(generators, states)
    return RandomStream(seed_cpu_rng_state(seeds))


def is_checked(step: int) -> bool:
    """Whether the rows of a step, counted from 1, are compared: more and more rarely."""
    return step & (step - 1) == 0


class LengthCheck:
    """Checks on each step that all ranks still have data, without waiting for them."""

    def __init__(self, ranks: RankGroup, place: str) -> None:
        self._ranks, self._place = ranks, place
        self._count_ended: Callable[[], int] = lambda: 0

    def step(self, *, has_data: bool) -> None:
        """Say whether this rank has data for its next step.

        Raises
        ------
        ValueError
            If the data of some ranks ended at the last step, or ends now.
        """
        ended = self._count_ended()
        if not ended:
            self._count_ended = self._ranks.count_later(not has_data)
        if not has_data:
            ended = self._count_ended()
        if ended % self._ranks.world_size:
            msg = f"{self._place}: expected the same number of rows on every rank"
            got = f"got fewer on {ended} of {self._ranks.world_size} ranks"
            raise ValueError(f"{msg}, {got}. {ADVICE}")


ADVICE = (
    "Ranks read all rows and keep their part: draw random numbers from the generators of"
    " torch, NumPy and Python. If each rank gets rows of its own, set sharded = True on the"
    " data set; if it is only augmented at random, sharded = False."
)


def check_alike(digests: list[list[int]], place: str, ranks: RankGroup) -> None:
    """Compare what every rank read, by ``digest_leaves``, with that of the other ranks.

    Values may differ, because augmentation may draw from generators that the ranks do not
    share. At least one value that tells rows apart, such as a label, has to be equal. Every
    rank must call it.

    Raises
    ------
    ValueError
        If a rank read other rows. Rank 0 raises it, the others raise ``PeerError``.
    """
    of_ranks = ranks.gather_objects(digests)
    for rank, other in enumerate(of_ranks):
        if not _is_alike(of_ranks[0], other):
            msg = f"{place}: expected the same rows on every rank"
            error = f"{msg}, got others on rank {rank}. {ADVICE}"
            raise ValueError(error) if ranks.rank == 0 else PeerError(0, error)


def _is_alike(one: list[list[int]], other: list[list[int]]) -> bool:
    if len(one) != len(other):
        return False
    pairs = list(zip(one, other, strict=True))
    telling = [(a, b) for a, b in pairs if a != b or len(set(a)) > 1]
    return not telling or any(a == b for a, b in telling)


def digest_leaves(items: Sequence[object]) -> list[list[int]]:
    """Checksums of the values at each place of samples or batches, by place and then item."""
    rows = [list(_digest(item)) for item in items]
    width = min(map(len, rows), default=0)
    return [[row[n] for row in rows] for n in range(width)]


def _digest(value: Any) -> Iterator[int]:
    """Checksum of each tensor, array, number and text in a value."""
    inner = items_of(value)
    if isinstance(value, Tensor):
        yield _digest_tensor(value)
    elif isinstance(value, np.ndarray):
        flat = value.reshape(-1)
        some = flat[:: max(1, len(flat) // SAMPLE)]
        yield zlib.crc32(f"{value.shape} {some.tolist()!r:.65536}".encode())
    elif inner is not None:
        for item in inner:
            yield from _digest(item)
    elif isinstance(value, str | bytes | int | float | bool | np.generic):
        yield zlib.crc32(repr(value).encode())


def _digest_tensor(tensor: Tensor) -> int:
    text = f"{tuple(tensor.shape)} {tensor.dtype}"
    if tensor.layout is torch.strided and not tensor.is_nested and tensor.numel():
        flat = tensor.detach().reshape(-1)
        text += f" {flat[:: max(1, len(flat) // SAMPLE)].tolist()}"
    return zlib.crc32(text.encode())
