"""Meetings: points that every rank must reach, such as a call of fit or an epoch that ends early.

A rank that gets there alone would wait for the others forever, or mix up what they send. So
ranks meet in the store first, without a collective, and a rank that waits alone is told
what the others do.
"""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from harness.accelerators.distributed.group import PeerError, RankGroup

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BLOCKED_S = 3.0
"""Seconds in one collective after which a rank does not come to a meeting any more."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.0005, 0.1

_COLLECTIVES = ("torch/distributed/", "deepspeed/comm/")
_LIBRARIES = ("/torch/", "/deepspeed/", "/contextlib.py")


class Meeting:
    """Where the ranks of a process group meet.

    Parameters
    ----------
    ranks
        The ranks.
    """

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks, self._count = ranks, 0
        self._blocked_since: float | None = None

    def meet(self, what: str) -> None:
        """Wait until every rank does the same.

        Parameters
        ----------
        what
            What the rank does, for messages.

        Raises
        ------
        RuntimeError
            If another rank does something else, waits in a collective, or has ended.
        PeerError
            If another rank has failed.
        """
        self._count += 1
        store, rank = self._ranks.store, self._ranks.rank
        if store is None:
            return
        store.set(self._key(self._count, rank), what)
        store.set(self._key(self._count), what)
        wait_s = _FIRST_WAIT_S
        for other in range(self._ranks.world_size):
            key = self._key(self._count, other)
            while not self._has(key):
                self._check_others(what)
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            found = store.get(key).decode()
            if found != what:
                msg = f"{what}: expected the same on every rank"
                advice = "Do the same on every rank, in the same order."
                raise RuntimeError(
                    f"{msg}, got it on rank {rank} and {found} on rank {other}. {advice}"
                )

    def _check_others(self, what: str) -> None:
        """Raise if a rank cannot come to the present meeting."""
        failed = self._ranks.first_failure()
        if failed is not None:
            raise PeerError(*failed)
        for other in range(self._ranks.world_size):
            does = None
            if self._has(f"blocked/{self._count}/{other}"):
                key = f"blocked/{self._count}/{other}"
                does = f"waits in {self._ranks.store.get(key).decode()}"
            elif self._has(f"ended/{other}"):
                does = "has ended its program"
            if does is not None:
                rank = self._ranks.rank
                msg = f"{what}: expected it on every rank, got it on rank {rank}"
                advice = (
                    "Decide from what every rank knows, such as accelerator.any(flag)."
                )
                raise RuntimeError(f"{msg}, while rank {other} {does}. {advice}")

    def watch(self, store: Store | None) -> None:
        """Tell the others if they meet while this rank waits for them in a collective.

        The watchdog calls it now and then, in a thread of its own.

        Parameters
        ----------
        store
            The store of the ranks, by a client of that thread.
        """
        count = self._count
        if store is None:
            return
        is_awaited = store.check([self._key(count + 1)])
        place = find_collective() if is_awaited else None
        if place is None or count != self._count:
            self._blocked_since = None
            return
        now = time.monotonic()
        if self._blocked_since is None:
            self._blocked_since = now
        elif now - self._blocked_since >= BLOCKED_S:
            key = f"blocked/{count + 1}/{self._ranks.rank}"
            store.set(key, place)

    def leave(self) -> None:
        """Tell the others that this rank ends its program."""
        try:
            if self._ranks.store is not None:
                self._ranks.store.set(f"ended/{self._ranks.rank}", "1")
        except RuntimeError:  # rank 0, which holds the store, is gone
            pass

    def _has(self, key: str) -> bool:
        return self._ranks.store is not None and bool(self._ranks.store.check([key]))

    @staticmethod
    def _key(number: int, rank: int | None = None) -> str:
        """Key of a rank that came to a meeting; None: of any rank."""
        return f"meeting/{number}/{'any' if rank is None else rank}"


def find_collective() -> str | None:
    """Where the main thread calls the collective that it waits in; None if it is in none."""
    ident = threading.main_thread().ident
    frame: FrameType | None = sys._current_frames().get(ident or 0)
    if frame is None or not _is_in(frame, _COLLECTIVES):
        return None
    while frame is not None and _is_in(frame, _LIBRARIES):
        frame = frame.f_back
    if frame is None:
        return "a collective"
    path = Path(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({path.name}, line {frame.f_lineno})"


def _is_in(frame: FrameType, parts: tuple[str, ...]) -> bool:
    path = Path(frame.f_code.co_filename).as_posix()
    return any(part in path for part in parts)
