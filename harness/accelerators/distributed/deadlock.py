"""Notice ranks that wait in different collectives, each of them for the others, without end.

So ends a program that calls a layer at ZeRO 3, or a collective of its own, on some ranks
only. Neither torch nor DeepSpeed tells of it.
"""

from __future__ import annotations

import sys
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from harness.accelerators.distributed.heartbeat import SilenceTimer
from harness.accelerators.distributed.named_barrier import (
    describe_place,
    is_in,
    list_calls,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_DEEPSPEED = ("deepspeed",)
WAITING = (
    *("torch.distributed.distributed_c10d", "deepspeed.comm", "deepspeed.utils.nvtx"),
    *("deepspeed.runtime.comm", "deepspeed.runtime.zero"),
)
"""Modules that wait for other ranks; beside them are some that write files for long."""

_IDLE_FRAC = 0.02
"""Part of the time that a process computes at most while it waits; sending takes more."""

_LONGEST_LOOK_S = 10.0

_MOST = 4
"""Places that a message names."""

ADVICE = (
    "Run the same layers and collectives on every rank, in the same order. At ZeRO 3 that"
    " goes for layers whose result a batch does not need, too; or use ZeRO 2."
)


@dataclass(frozen=True, kw_only=True)
class Wait:
    """What the main thread of a rank waits in."""

    place: str  #: where, for a person
    #: number of all its calls, the same on ranks that wait in the same collective of
    #: the same layer
    stack: int


class Deadlock:
    """One rank's part in noticing that all ranks wait, and not in the same collective.

    A rank counts as waiting if its main thread has been in the same calls of torch or
    DeepSpeed for a while, and the process computed nothing.

    Parameters
    ----------
    rank, world_size
        This rank, and the number of ranks.
    after_s : > 0
        Seconds after which a rank counts as waiting.
    find_wait
        Finds what the main thread waits in; None if in nothing, or if that is not known.
    clock, count_busy
        Give seconds, and seconds in which the process computed.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        after_s: float,
        *,
        find_wait: Callable[[], Wait | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
        count_busy: Callable[[], float] = time.process_time,
    ) -> None:
        self._rank, self._world_size, self._after_s = rank, world_size, after_s
        self._find_wait = find_wait or MainThread().find_wait
        self._count_busy = count_busy
        self._still = SilenceTimer(clock, _LONGEST_LOOK_S)
        self._busy_at = 0.0
        self._reported: Wait | None = None
        self._looks = 0

    def look(self, store: Store) -> str | None:
        """Look at this rank and, if it waits, at the others.

        The watchdog calls it now and then, in a thread of its own.

        Returns
        -------
        str or None
            On rank 0, what all ranks wait in, if that cannot end.
        """
        wait, busy = self._find_wait(), self._count_busy()
        passed_s = self._still.update(wait)
        if not passed_s:
            self._busy_at = busy
        is_idle = busy - self._busy_at <= _IDLE_FRAC * passed_s
        self._report(store, wait if passed_s >= self._after_s and is_idle else None)
        if self._rank or not self._reported:
            return None
        all_wait = store.add("deadlock/waiting", 0) == self._world_size
        self._looks = self._looks + 1 if all_wait else 0
        # A rank that has just continued tells so at its next look.
        return self._describe(store) if self._looks > 1 else None

    def _report(self, store: Store, wait: Wait | None) -> None:
        """Tell the other ranks if this one begins to wait, or has continued."""
        if wait == self._reported:
            return
        if wait is not None:
            store.set(f"deadlock/{self._rank}", f"{wait.stack}:{wait.place}")
        change = int(wait is not None) - int(self._reported is not None)
        store.add("deadlock/waiting", change)
        self._reported = wait

    def _describe(self, store: Store) -> str | None:
        """What the ranks wait in; None if it is the same."""
        ranks: dict[str, list[int]] = {}
        for rank in range(self._world_size):
            ranks.setdefault(store.get(f"deadlock/{rank}").decode(), []).append(rank)
        if len(ranks) == 1:
            return None
        places = [
            f"{_name_ranks(found)} in {wait.partition(':')[2]}"
            for wait, found in list(ranks.items())[:_MOST]
        ]
        msg = "expected the ranks in the same collective, but they wait for one another"
        return f"{msg}: {'; '.join(places)}. {ADVICE}"


def _name_ranks(ranks: list[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    rest = f" and {len(ranks) - _MOST} more" if len(ranks) > _MOST else ""
    return f"ranks {', '.join(map(str, ranks[:_MOST]))}{rest}"


class MainThread:
    """What the main thread does, as another thread sees it."""

    def __init__(self) -> None:
        self._ident = threading.main_thread().ident or 0
        read = getattr(time, "pthread_getcpuclockid", None)  # not on macOS
        self._clock: int | None = None if read is None else read(self._ident)
        self._seen: tuple[object, float] = None, 0.0

    def find_wait(self) -> Wait | None:
        """What the thread waits in; None if it is in no call of torch or DeepSpeed.

        Another one, if it computed since the last call: then it only came back to the same
        place.
        """
        frame: FrameType | None = sys._current_frames().get(self._ident)
        if frame is None or self._clock is None or not is_in(frame, WAITING):
            return None
        calls = tuple((id(one.f_code), one.f_lasti) for one in list_calls(frame))
        busy = time.clock_gettime(self._clock)
        before, was_busy = self._seen
        self._seen = calls, busy
        if calls != before or busy - was_busy > 1e-3:
            return None
        return describe_wait(frame)


def describe_wait(frame: FrameType) -> Wait:
    """Describe what a thread waits in by its innermost call."""
    calls = list(list_calls(frame))
    texts = [f"{one.f_code.co_name} {one.f_lineno}" for one in calls]
    doing = next(
        (
            one.f_code.co_name
            for one in calls
            if is_in(one, WAITING) and "wrap" not in one.f_code.co_name
        ),
        "a collective",
    )
    for one in calls:
        # DeepSpeed 0.19.8, PartitionedParameterCoordinator: the layer that it gathers.
        if is_in(one, _DEEPSPEED) and "current_submodule" in one.f_locals:
            layer = one.f_locals["current_submodule"]
            doing += f" of a layer {type(layer).__name__}"
            texts.append(str(getattr(layer, "ds_id", None)))
            break
    stack = zlib.crc32(" ".join(texts).encode())
    return Wait(place=f"{describe_place(frame)}, {doing}", stack=stack)
