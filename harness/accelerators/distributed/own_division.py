"""Find out whether a loader gives each rank rows of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harness.accelerators.distributed.group import RankGroup

_PARTS = ("batch_sampler", "sampler", "dataset")

_SIZES = ("num_replicas", "world_size", "num_shards", "num_processes")
_RANKS = ("rank", "global_rank", "shard_id", "process_index")
_MEGATRON = ("data_parallel_size", "data_parallel_rank")
_HOLDERS = ("_distributed", "distributed_env")
"""Attributes in which Hugging Face and litdata keep both."""

Found = tuple[bool | None, tuple[int, int | None] | None]
"""What a part says: its attribute ``sharded``; number of ranks, and its rank."""


def find_dividers(loader: object, ranks: RankGroup) -> list[object]:
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
            if _divides(place, [found.get(place, (None, None)) for found in of_ranks])
        ]
    )
    return [parts[place] for place in divides]


def is_alike(loader: object) -> bool:
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


def _divides(place: str, of_ranks: Sequence[Found]) -> bool:
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
            "none" if pair is None else f"rank {pair[1]} of {pair[0]}" for pair in found
        )
        advice = (
            "Make it with the world_size and rank of the accelerator, or without them."
        )
        raise ValueError(f"{msg}, got {got}. {advice}")
    return False
