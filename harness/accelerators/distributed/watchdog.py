"""End all ranks together when one fails or dies, or when their launcher is killed."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import ClassVar

from harness.accelerators.devices import use_in_thread
from harness.accelerators.distributed.agreement import BatchAgreement
from harness.accelerators.distributed.deadlock import Deadlock
from harness.accelerators.distributed.environment import LOST_AFTER_S
from harness.accelerators.distributed.group import (
    STORE_IS_GONE,
    PeerError,
    RankGroup,
    disconnect,
    format_error,
)
from harness.accelerators.distributed.heartbeat import (
    WORKING,
    Heartbeat,
    Member,
    SilenceTimer,
)
from harness.accelerators.distributed.launcher import is_inner_launcher
from harness.accelerators.distributed.named_barrier import (
    RANKS_AT_ONCE,
    NamedBarrier,
    is_of_collective,
)
from tracking.durable import read_stat
from tracking.errors import write_stderr

POLL_S = 0.5
"""Seconds between two looks; with many ranks, each asks the store more rarely."""

PENDING_S = 0.05
"""The same, while ranks agree on something."""

GRACE_S = 10.0
"""Seconds that a rank has to exit before it is killed, because another rank failed."""

SAVE_GRACE_S = 30.0
"""The same, because its launcher is gone: time to save, as much as launchers give."""

JOIN_S = 5.0
"""Seconds that the end of the process waits for the threads."""


class Watchdog:
    """Ends this rank with the others, and asks them what needs no collective.

    An uncaught exception prints its traceback, unless it follows from another rank's
    failure. Then it prints one line, so that the first traceback on the screen is the
    cause. Two threads check for what raises no exception. One asks the store: whether
    another rank fails while this one waits for it, whether one is lost (``Heartbeat``),
    whether all wait for one another (``Deadlock``), and what ranks agree on
    (``BatchAgreement``). The other one needs no answer: it checks
    whether the launcher is killed, and whether the store still answers.

    Parameters
    ----------
    launcher
        Id of a process, besides the parents, whose end also ends this rank.
    poll_s : > 0
        Seconds between two checks of the launcher and the other ranks.
    lost_after_s : >= 0
        Seconds without a sign of life after which a rank is lost, and in which ranks may
        wait for one another; 0: never.

    Notes
    -----
    When torchrun or DeepSpeed's launcher is killed with SIGKILL, it cannot pass the signal
    on, so its ranks keep running. The rank then sends SIGTERM to itself, on which a fit
    saves and stops. After ``SAVE_GRACE_S`` seconds the process exits in any case.

    The threads end before the interpreter does. Python would stop them inside a call of the
    store, whose C++ code then aborts the process.
    """

    _current: ClassVar[Watchdog | None] = None

    def __init__(
        self,
        ranks: RankGroup,
        launcher: int | None = None,
        *,
        poll_s: float = POLL_S,
        lost_after_s: float = LOST_AFTER_S,
    ) -> None:
        self._ranks, self._poll_s = ranks, poll_s
        self.barrier = NamedBarrier(ranks)
        self.failure: tuple[int, str] | None = None
        self._launcher = launcher
        self._parents = self._launchers()
        self._is_working = False
        self._agreements: dict[str, BatchAgreement] = {}
        self._num_agreements = self._num_answers = 0
        self._woken: SimpleQueue[None] = SimpleQueue()  # safe in a signal handler
        self._quiet = threading.Event()
        self._is_ending = threading.Event()
        self._hook = sys.excepthook
        sys.excepthook = self._on_exception
        Watchdog._current = self
        self._asked = ranks.for_thread()
        # Without a client of its own, the thread has to wait while the group waits.
        self._lost_after_s = lost_after_s if ranks.has_clients else 0.0
        self._heartbeat = Heartbeat(
            Member.current(ranks.rank),
            ranks.world_size,
            self._lost_after_s,
            is_waiting=lambda: self.barrier.is_waiting,
        )
        self._deadlock = Deadlock(ranks.rank, ranks.world_size, self._lost_after_s)
        self._threads = [
            threading.Thread(target=work, name=f"harness-{name}", daemon=True)
            for name, work in {"watch": self._watch, "ask": self._ask}.items()
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.stop)

    @classmethod
    def find(cls) -> Watchdog | None:
        """The watchdog of this process, if it has one.

        A second one would count meetings anew, and take those of the first for its own.
        """
        return cls._current

    def stop(self) -> None:
        """Stop watching, because the interpreter ends."""
        Watchdog._current = None
        self._quiet.set()
        self._is_ending.set()
        self._woken.put(None)
        for thread in self._threads:
            thread.join(JOIN_S)
        self.barrier.leave()

    def set_working(self, is_working: bool) -> None:
        """Tell the others whether they need this rank, as in a fit, if it vanishes."""
        self._is_working = is_working
        with contextlib.suppress(RuntimeError):  # what serves the store is gone
            key = f"{WORKING}/{self._ranks.rank}"
            self._ranks.store.set(key, str(int(is_working)))

    def make_agreement(self, name: str) -> BatchAgreement:
        """Make an agreement, in place of the earlier one of that name."""
        self._num_agreements += 1
        agreement = BatchAgreement(
            f"agreement/{self._num_agreements}/{name}",
            self._ranks.rank,
            self._ranks.world_size,
            wake=lambda: self._woken.put(None),
            find_failure=lambda: self.failure,
        )
        self._agreements[name] = agreement
        return agreement

    def _on_exception(
        self,
        kind: type[BaseException],
        error: BaseException,
        traceback: TracebackType | None,
    ) -> None:
        """Show the first failure once, and report it to the other ranks."""
        if self.report(error):
            self._hook(kind, error, traceback)

    def report(self, error: BaseException) -> bool:
        """Report an exception that ends this rank to the others.

        Returns
        -------
        True if this rank is the first that failed, and should show the exception
        """
        self._quiet.set()
        # Destroying the group would wait for ranks that may be gone.
        atexit.unregister(disconnect)
        if isinstance(error, PeerError):
            return False
        try:
            rank, reason = self._find_cause(error)
        except (RuntimeError, ConnectionError):  # what serves the store is gone
            rank, reason = STORE_IS_GONE
        if rank == self._ranks.rank:
            return True
        text = f"rank {self._ranks.rank}: ended because rank {rank} failed: {reason}"
        write_stderr(f"{text}\n")  # instead of a traceback
        return False

    def _find_cause(self, error: BaseException) -> tuple[int, str]:
        """Report the rank that failed first: one of this machine that was killed, or this."""
        cause = self._ranks.rank, format_error(error)
        failed = self._ranks.read_failure()
        if failed is None and is_of_collective(error.__traceback__):
            cause = self._heartbeat.find_gone(self._ranks.store) or cause
        return failed or self._ranks.report_failure(*cause)

    def _watch(self) -> None:
        """Watch what needs no answer of the store."""
        answers = SilenceTimer(time.monotonic, 10 * self._poll_s)
        while not self._quiet.wait(self._poll_s):
            if self._launchers() != self._parents:
                os.kill(os.getpid(), signal.SIGTERM)
                self._end_process("its launcher is gone", SAVE_GRACE_S)
                return
            silent_s = answers.update(self._num_answers)
            is_asking = self._lost_after_s and self.failure is None
            if is_asking and silent_s > self._lost_after_s:
                server = f"{self._ranks.server}, which serves the store of the ranks"
                self._end_process(f"{server}, was {answers.describe()}", 0.0)
                return

    def _ask(self) -> None:
        """Ask the store until the process ends."""
        use_in_thread(self._ranks.device)
        seldom = max(1.0, self._ranks.world_size / RANKS_AT_ONCE)
        while not self._quiet.is_set():
            try:
                self.failure = self._ask_once()
            except (RuntimeError, ConnectionError):  # what serves the store is gone
                self.failure = STORE_IS_GONE  # an agreement that waits ends by it
                if not (self._is_working or self.barrier.is_waiting):
                    self._lost_after_s = 0.0
                    return  # as at the end of a program
            if self.failure is not None:
                rank, reason = self.failure
                self._end_process(f"rank {rank} failed: {reason}", GRACE_S)
                return
            self._num_answers += 1
            is_deciding = any(one.is_deciding for one in self._agreements.values())
            wait_s = PENDING_S if is_deciding else self._poll_s
            with contextlib.suppress(Empty):
                self._woken.get(timeout=wait_s * seldom)

    def _ask_once(self) -> tuple[int, str] | None:
        """Ask the store for all there is; returns the failure of a rank."""
        store = self._asked.store
        failed = self._asked.read_failure()
        if failed is not None or store is None:
            return failed
        for agreement in list(self._agreements.values()):
            agreement.exchange(store)
        self.barrier.watch(store)
        if not self._lost_after_s:
            return None
        found = self._heartbeat.look(store)
        if found is None and (waiting := self._deadlock.look(store)) is not None:
            found = 0, waiting
        return None if found is None else self._asked.report_failure(*found)

    def _launchers(self) -> tuple[int, ...]:
        """Processes that started this one and are alive."""
        found = find_launchers(os.getppid())
        if self._launcher is not None and is_alive(self._launcher):
            found = (*found, self._launcher)
        return found

    def _end_process(self, reason: str, grace_s: float) -> None:
        """Wait for the process to end by itself, then end it."""
        if self._is_ending.wait(grace_s):
            return
        os.write(2, f"rank {self._ranks.rank}: ended because {reason}\n".encode())
        os._exit(1)


def find_launchers(pid: int) -> tuple[int, ...]:
    """The parent process, and DeepSpeed's outer launcher where the parent is its inner one.

    DeepSpeed starts ranks by two processes, and either may be killed: ``runner``, which the
    user's command starts, and its child ``launch``. Without ``/proc`` only the parent is
    known.
    """
    fields = read_stat(pid) if is_inner_launcher(pid) else None
    return (pid,) if fields is None else (pid, int(fields[1]))


def is_alive(pid: int) -> bool:
    """True if the process exists, even if it belongs to another user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
