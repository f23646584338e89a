"""Ranks that are threads of this process, and folders of checkpoints for them."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

WAIT_S = 60
"""Seconds after which a rank that waits for others is taken for left alone."""


class Ranks:
    """What a rank asks of its accelerator to agree with the others."""

    def __init__(self, rank: int, world_size: int, shared: _Shared) -> None:
        self.rank, self.world_size, self.is_main = rank, world_size, rank == 0
        self._shared = shared

    def gather_objects(self, value: T) -> list[T]:
        self._shared.values[self.rank] = value
        self._shared.barrier.wait(WAIT_S)
        found = [self._shared.values[rank] for rank in range(self.world_size)]
        self._shared.barrier.wait(WAIT_S)
        return found

    def broadcast(self, value: object, src: int = 0) -> Any:
        return self.gather_objects(value)[src]

    def any(self, flag: bool) -> bool:
        return any(self.gather_objects(flag))


class _Shared:
    def __init__(self, world_size: int) -> None:
        self.barrier = threading.Barrier(world_size)
        self.values: dict[int, Any] = {}


def on_ranks(world_size: int, function: Callable[[Any], T]) -> list[T | Exception]:
    """What a function returned, or raised, on each rank."""
    shared, found = _Shared(world_size), dict[int, Any]()

    def run(rank: int) -> None:
        try:
            found[rank] = function(Ranks(rank, world_size, shared))
        except Exception as error:  # noqa: BLE001  the test compares it
            found[rank] = error

    threads = [threading.Thread(target=run, args=(n,)) for n in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world_size)]


_COUNTS: list[Counter[str]] = []
"""Where opened files are counted; a hook can never be removed."""


def _count(event: str, args: tuple[Any, ...]) -> None:
    if event == "open" and _COUNTS and isinstance(args[0], str):
        _COUNTS[-1][Path(args[0]).name] += 1


@contextmanager
def counting_opens() -> Iterator[Counter[str]]:
    """Count the files that Python opens inside, by name."""
    if not _COUNTS:
        sys.addaudithook(_count)
    _COUNTS.append(Counter())
    try:
        yield _COUNTS[-1]
    finally:
        _COUNTS.append(Counter())
