"""How the rows of a loader reach the ranks: each has rows of its own, or all read the same.

A loader may give each rank rows of its own. Otherwise, where every rank reads all of the data and
keeps its part, the ranks have to read the same rows in the same order. So they draw the same random
numbers, and compare what they have read.
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

# ------------------------------------------------------------ rows of its own

_PARTS = ("batch_sampler", "sampler", "dataset")

_SIZES = ("num_replicas", "world_size", "num_shards", "num_processes")
_RANKS = ("rank", "global_rank", "shard_id", "process_index")
_MEGATRON = ("data_parallel_size", "data_parallel_rank")
_HOLDERS = ("_distributed", "distributed_env")
"""Attributes in which Hugging Face and litdata keep both."""

Found = tuple[bool | None, tuple[int, int | None] | None]
"""What a part says: its attribute ``sharded``; number of ranks, and its rank."""


def find_sharding_parts(loader: object, ranks: RankGroup) -> list[object]:
    """Find the parts of a loader that give each rank rows of its own.

    If there is one, the rows are not divided again. Every rank must call it.

    Raises
    ------
    ValueError
        If a part divides rows over another number of ranks, or if ranks disagree. One rank
        raises it, the others raise ``PeerError``.

    Notes
    -----
    The attribute ``sharded`` of a data set or sampler decides. Otherwise a part divides rows
    if it has, as torch's ``DistributedSampler``, attributes with the number of ranks and
    with this rank.
    """
    parts = dict(_list_parts(loader))
    own = {place: found for place, part in parts.items() if (found := _read(part))}
    of_ranks = ranks.gather_objects(own)
    places = {place: None for found in of_ranks for place in found}
    divides = ranks.check_on_every_rank(
        lambda: [
            place
            for place in places
            if _is_sharding(
                place, [found.get(place, (None, None)) for found in of_ranks]
            )
        ]
    )
    return [parts[place] for place in divides]


def is_marked_unsharded(loader: object) -> bool:
    """True if a part says by ``sharded = False`` that every rank reads the same rows."""
    return any(_read_mark(part) is False for _, part in _list_parts(loader))


def _list_parts(loader: object) -> Iterator[tuple[str, object]]:
    """A loader, its samplers and data sets, also those inside others, by where they are."""
    todo, seen = [("loader", loader)], set[int]()
    while todo:
        place, part = todo.pop(0)
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        yield place, part
        todo += [(f"{place}.{name}", getattr(part, name, None)) for name in _PARTS]


def _read(part: object) -> Found | None:
    """What a part says; None if it says nothing."""
    found = _read_mark(part), _read_division(part)
    return None if found == (None, None) else found


def _read_mark(part: object) -> bool | None:
    marked = getattr(part, "sharded", None)
    return marked if isinstance(marked, bool) else None


def _read_division(part: object) -> tuple[int, int | None] | None:
    holders = (getattr(part, name, None) for name in _HOLDERS)
    for one in (part, *holders):
        sizes = [*_read_numbers(one, _SIZES), *_read_numbers(one, _MEGATRON[:1])]
        numbers = [*_read_numbers(one, _RANKS), *_read_numbers(one, _MEGATRON[1:])]
        if sizes and (numbers or hasattr(one, "num_replicas")):
            return sizes[0], numbers[0] if numbers else None
    return None


def _read_numbers(part: object, names: Sequence[str]) -> Iterator[int]:
    """Whole numbers that a part holds under these names."""
    for name in names:
        for spelt in (name, f"_{name}"):
            value: Any = getattr(part, spelt, None)
            if isinstance(value, int) and not isinstance(value, bool):
                yield value


def _is_sharding(place: str, of_ranks: Sequence[Found]) -> bool:
    """Whether a part divides rows, from what it says on each rank."""
    marks = {mark for mark, _ in of_ranks}
    if len(marks) > 1:
        msg = f"{place}.sharded: expected the same on every rank"
        got = ", ".join(str(mark) for mark, _ in of_ranks)
        raise ValueError(f"{msg}, got {got}. Set it where the data is made.")
    if marks != {None}:
        return bool(marks.pop())
    world_size = len(of_ranks)
    wanted = [(world_size, rank) for rank in range(world_size)]
    found = [division for _, division in of_ranks]
    if found in (wanted, [(world_size, None)] * world_size):
        return True
    if len(set(found)) > 1:
        msg = f"{place}: expected rows divided over {world_size} ranks"
        got = ", ".join(
            f"rank {own[1]} of {own[0]}" if own else "none" for own in found
        )
        advice = (
            "Make it with the world_size and rank of the accelerator, or without them"
        )
        raise ValueError(f"{msg}, got {got}. {advice}.")
    return False


# ------------------------------------------------------------- the same rows

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


def is_check_due(step: int) -> bool:
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
    " torch, NumPy and Python. If each rank gets its own rows, set sharded = True on the"
    " data set; if it is only augmented at random, sharded = False."
)


def check_same_rows(digests: list[list[int]], place: str, ranks: RankGroup) -> None:
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
        if not _is_same(of_ranks[0], other):
            msg = f"{place}: expected the same rows on every rank"
            error = f"{msg}, got others on rank {rank}. {ADVICE}"
            raise ValueError(error) if ranks.rank == 0 else PeerError(0, error)


def _is_same(one: list[list[int]], other: list[list[int]]) -> bool:
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
