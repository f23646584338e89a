"""A barrier with a name, at which each rank says what it does next.

Every rank must reach it, such as at a call of fit or an epoch that ends early. A rank that gets
there alone would wait for the others forever, or mix up what they send. So ranks meet in the store
first, without a collective, and a rank that waits alone is told what the others do.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, NoReturn

from harness.accelerators.distributed.group import PeerError, RankGroup

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

ENDED = "ended"
"""Key in the store with the rank that ended its program last; with a number, of that rank."""

BLOCKED_S = 3.0
"""Seconds in one collective after which a rank does not come to a meeting any more."""

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.0005, 0.1

RANKS_AT_ONCE = 128
"""More ranks ask the store more rarely, so that it gets no more questions a second."""

_COLLECTIVES = ("torch.distributed", "deepspeed.comm")
_LIBRARIES = (
    *("torch", "deepspeed", "contextlib", "typing_extensions"),
    "harness.accelerators.deepspeed.zero3_weights",  # calls methods of DeepSpeed
)


class NamedBarrier:
    """Barriers of the ranks of a process group, one after another."""

    def __init__(self, ranks: RankGroup) -> None:
        self._ranks, self._count = ranks, 0
        self._announced: Counter[str] = Counter()
        self._problem: RuntimeError | None = None
        self._blocked_since: float | None = None
        self.is_waiting = False
        self._longest_s = _LONGEST_WAIT_S * max(1, ranks.world_size / RANKS_AT_ONCE)

    def wait(self, what: str) -> None:
        """Wait until every rank does the same.

        Each rank asks the store as often for two ranks as for a thousand.

        Raises
        ------
        RuntimeError
            If another rank does something else, waits in a collective, or has ended. After
            the last two this rank meets no other again: it would wait for another meeting.
        PeerError
            If another rank has failed.
        """
        if self._problem is not None:
            raise self._problem
        self._count += 1
        self._announced.clear()
        if self._ranks.store is None:
            return
        self.is_waiting = True
        try:
            self._arrive(self._ranks.store, what)
        finally:
            self.is_waiting = False

    def _arrive(self, store: Store, what: str) -> None:
        key, mine = f"meeting/{self._count}", f"{self._ranks.rank}:{what}"
        if store.add(f"{key}/place", 1) == 1:
            store.set(f"{key}/first", mine)
        self._wait_for_ranks(lambda: store.check([f"{key}/first"]), what)
        first = store.get(f"{key}/first").decode()
        if first.partition(":")[2] != what:
            store.set(f"{key}/other", mine)
            self._refuse(what, first)
        store.add(f"{key}/came", 1)

        def is_complete() -> bool:
            if store.add(f"{key}/came", 0) == self._ranks.world_size:
                return True
            if store.check([f"{key}/other"]):
                self._refuse(what, store.get(f"{key}/other").decode())
            return False

        self._wait_for_ranks(is_complete, what)

    def _wait_for_ranks(self, is_done: Callable[[], bool], what: str) -> None:
        self._problem = self._poll(is_done, lambda: self._find_problem(what))
        if self._problem is not None:
            raise self._problem

    def _poll(
        self,
        is_done: Callable[[], bool],
        find_problem: Callable[[], RuntimeError | None],
    ) -> RuntimeError | None:
        """Wait until something is done; returns why it cannot be, or None."""
        wait_s = _FIRST_WAIT_S
        while not is_done():
            failed = self._ranks.first_failure()
            problem = find_problem() if failed is None else PeerError(*failed)
            if problem is not None and not is_done():  # it may have come and gone
                return problem
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, self._longest_s)
        return None

    def _refuse(self, what: str, found: str) -> NoReturn:
        other, _, does = found.partition(":")
        msg = f"{what}: expected the same on every rank"
        got = f"got it on rank {self._ranks.rank} and {does} on rank {other}"
        raise RuntimeError(
            f"{msg}, {got}. Do the same on every rank, in the same order."
        )

    def _find_problem(self, what: str) -> RuntimeError | None:
        """Find why a rank cannot come to the present meeting; None if all can."""
        store, blocked = self._ranks.store, f"meeting/{self._count}/blocked"
        if store.check([blocked]):
            other, _, place = store.get(blocked).decode().partition(":")
            does = f"waits in {place}"
        elif store.check([ENDED]):
            other, does = store.get(ENDED).decode(), "has ended its program"
        else:
            return None
        rank = self._ranks.rank
        msg = f"{what}: expected it on every rank, got it on rank {rank}"
        advice = "Decide from what every rank knows, such as accelerator.any(flag)."
        return RuntimeError(f"{msg}, while rank {other} {does}. {advice}")

    def announce(self, what: str) -> None:
        """Tell the other ranks that rank 0 has done something, which they may wait for."""
        key = self._name_next(what)
        if self._ranks.store is not None:
            self._ranks.store.set(key, "1")

    def _name_next(self, what: str) -> str:
        """Key of what rank 0 does next; before a meeting it may have done the same alone."""
        self._announced[what] += 1
        return f"done/{self._count}/{what}/{self._announced[what]}"

    def await_main(self, what: str) -> None:
        """Wait until rank 0 announces what this rank leaves to it.

        Raises
        ------
        RuntimeError
            If rank 0 does something else, in which it waits for this rank, or has ended.
        PeerError
            If another rank has failed.
        """
        store, key = self._ranks.store, self._name_next(what)
        if store is None:
            return
        problem = self._poll(
            lambda: store.check([key]), lambda: self._find_other_work(what)
        )
        if problem is not None:
            raise problem

    def _find_other_work(self, what: str) -> RuntimeError | None:
        """Find what rank 0 does, in place of what this rank waits for without a meeting."""
        store, coming = self._ranks.store, f"meeting/{self._count + 1}/first"
        if store.check([coming]):
            rank, _, does = store.get(coming).decode().partition(":")
        elif store.check([ENDED]):
            rank, does = store.get(ENDED).decode(), "the end of its program"
        else:
            return None
        if rank != "0":
            return None
        msg = f"{what}: expected it on rank 0, got {does} there"
        return RuntimeError(f"{msg}. Call it on every rank, or on rank 0 alone.")

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
        is_awaited = store.check([f"meeting/{count + 1}/first"])
        place = find_collective() if is_awaited else None
        if place is None or count != self._count:
            self._blocked_since = None
            return
        now = time.monotonic()
        if self._blocked_since is None:
            self._blocked_since = now
        elif now - self._blocked_since >= BLOCKED_S:
            store.set(f"meeting/{count + 1}/blocked", f"{self._ranks.rank}:{place}")

    def leave(self) -> None:
        """Tell the others that this rank ends its program."""
        store, rank = self._ranks.store, self._ranks.rank
        try:
            if store is not None:
                store.set(f"{ENDED}/{rank}", "1")
                store.set(ENDED, str(rank))
        except RuntimeError:  # rank 0, which holds the store, is gone
            pass


def find_collective() -> str | None:
    """Where the main thread calls the collective that it waits in; None if it is in none."""
    ident = threading.main_thread().ident
    frame: FrameType | None = sys._current_frames().get(ident or 0)
    if frame is None or not is_in(frame, _COLLECTIVES):
        return None
    return describe_place(frame)


def describe_place(frame: FrameType) -> str:
    """The innermost call outside of torch and DeepSpeed, for a person."""
    outside = (one for one in list_calls(frame) if not is_in(one, _LIBRARIES))
    found = next(outside, None)
    if found is None:
        return "a collective"
    path = Path(found.f_code.co_filename)
    return f"{found.f_code.co_name} ({path.name}, line {found.f_lineno})"


def is_of_collective(traceback: TracebackType | None) -> bool:
    """Whether an error was raised in a collective."""
    while traceback is not None:
        if is_in(traceback.tb_frame, _COLLECTIVES):
            return True
        traceback = traceback.tb_next
    return False


def list_calls(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame and those that called it, from the innermost."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_in(frame: FrameType, packages: tuple[str, ...]) -> bool:
    """Whether a call is of one of these packages; a user's folder may have the same name."""
    name = f"{frame.f_globals.get('__name__')}."
    return any(name.startswith(f"{package}.") for package in packages)
