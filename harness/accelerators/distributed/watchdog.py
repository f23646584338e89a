"""End all ranks together when one fails or dies, or when their launcher is killed."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
from pathlib import Path
from types import TracebackType

from harness.accelerators.devices import use_in_thread
from harness.accelerators.distributed.group import PeerError, RankGroup, disconnect
from harness.accelerators.distributed.launcher import is_inner_launcher
from harness.accelerators.distributed.meeting import Meeting
from tracking.errors import write_stderr

POLL_S = 0.5
GRACE_S = 10.0
"""Seconds that a rank has to exit before it is killed, because another rank failed."""

SAVE_GRACE_S = 30.0
"""The same, because its launcher is gone: time to save, as much as launchers give."""

JOIN_S = 5.0
"""Seconds that the end of the process waits for the thread."""


class Watchdog:
    """Ends this rank with the others.

    An uncaught exception prints its traceback, unless it follows from another rank's
    failure. Then it prints one line, so that the first traceback on the screen is the
    cause. A thread checks for two events that raise no exception: another rank fails while
    this one waits for it, and the launcher is killed.

    Parameters
    ----------
    ranks
        Ranks to end together with.
    launcher
        Id of a process, besides the parents, whose end also ends this rank.
    poll_s : > 0
        Seconds between two checks of the launcher and the other ranks.

    Notes
    -----
    When torchrun or DeepSpeed's launcher is killed with SIGKILL, it cannot pass the signal
    on, so its ranks keep running. The rank then sends SIGTERM to itself, on which a fit
    saves and stops. After ``SAVE_GRACE_S`` seconds the process exits in any case.

    The thread ends before the interpreter does. Python would stop it inside a call of the
    store, whose C++ code then aborts the process.
    """

    def __init__(
        self,
        ranks: RankGroup,
        launcher: int | None = None,
        *,
        poll_s: float = POLL_S,
    ) -> None:
        self._ranks, self._poll_s = ranks, poll_s
        self.meeting = Meeting(ranks)
        self._launcher = launcher
        self._parents = self._launchers()
        self._quiet = threading.Event()
        self._is_ending = threading.Event()
        self._hook = sys.excepthook
        sys.excepthook = self._on_exception
        self._asked = ranks.for_thread()
        self._thread = threading.Thread(
            target=self._poll, name="harness-watch", daemon=True
        )
        self._thread.start()
        atexit.register(self.stop)

    @staticmethod
    def find() -> Watchdog | None:
        """The watchdog of this process, if it has one."""
        found = getattr(sys.excepthook, "__self__", None)
        return found if isinstance(found, Watchdog) else None

    def stop(self) -> None:
        """Stop watching, because the interpreter ends."""
        self._quiet.set()
        self._is_ending.set()
        self._thread.join(JOIN_S)
        self.meeting.leave()

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
        first = self._ranks.first_failure()
        if first is None or first[0] == self._ranks.rank:
            self._ranks.report_failure(error)
            return True
        rank, reason = first
        text = f"rank {self._ranks.rank}: ended because rank {rank} failed: {reason}"
        write_stderr(f"{text}\n")  # instead of a traceback
        return False

    def _poll(self) -> None:
        """Poll until an uncaught exception stops it."""
        use_in_thread(self._ranks.device)
        while not self._quiet.wait(self._poll_s):
            if self._launchers() != self._parents:
                os.kill(os.getpid(), signal.SIGTERM)
                self._end_process("its launcher is gone", SAVE_GRACE_S)
                return
            failed = self._asked.first_failure()
            if failed is not None and failed[0] != self._ranks.rank:
                self._end_process(f"rank {failed[0]} failed: {failed[1]}", GRACE_S)
                return
            self.meeting.watch(self._asked.store)

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
    parent = Path("/proc") / str(pid)
    try:
        if not is_inner_launcher(parent):
            return (pid,)
        # After the command's name in brackets come the state and the parent's id.
        fields = (parent / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return (pid,)
    return pid, int(fields[1])


def is_alive(pid: int) -> bool:
    """True if the process exists, even if it belongs to another user."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
