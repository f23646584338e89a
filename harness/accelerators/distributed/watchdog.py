"""End all ranks together when one fails or dies, or when their launcher is killed."""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

from harness.accelerators.distributed.group import PeerError, RankGroup, disconnect
from tracking.errors import write_stderr

POLL_S = 0.5
"""Seconds between two checks of the launcher and the other ranks."""

GRACE_S = 10.0
"""Seconds that a rank has to save and exit before it is killed."""


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

    Notes
    -----
    When torchrun or DeepSpeed's launcher is killed with SIGKILL, it cannot pass the signal
    on, so its ranks keep running. The rank then sends SIGTERM to itself, on which a fit
    saves and stops. After ``GRACE_S`` seconds the process exits in any case.
    """

    def __init__(self, ranks: RankGroup, launcher: int | None = None) -> None:
        self._ranks = ranks
        self._launcher = launcher
        self._parents = self._launchers()
        self._quiet = threading.Event()
        self._hook = sys.excepthook
        sys.excepthook = self._on_exception
        threading.Thread(target=self._poll, name="harness-watch", daemon=True).start()

    @staticmethod
    def is_running() -> bool:
        """True if this process already has a watchdog."""
        return isinstance(getattr(sys.excepthook, "__self__", None), Watchdog)

    def _on_exception(
        self,
        kind: type[BaseException],
        error: BaseException,
        traceback: TracebackType | None,
    ) -> None:
        """Show the first failure once, and report it to the other ranks."""
        self._quiet.set()
        # Destroying the group would wait for ranks that may be gone.
        atexit.unregister(disconnect)
        if isinstance(error, PeerError):
            return
        first = self._ranks.first_failure()
        if first is None or first[0] == self._ranks.rank:
            self._ranks.report_failure(error)
            self._hook(kind, error, traceback)
        else:
            rank, reason = first
            text = (
                f"rank {self._ranks.rank}: ended because rank {rank} failed: {reason}"
            )
            write_stderr(f"{text}\n")  # instead of a traceback

    def _poll(self) -> None:
        """Poll until an uncaught exception stops it."""
        while not self._quiet.wait(POLL_S):
            if self._launchers() != self._parents:
                self._end_process("its launcher is gone", signal.SIGTERM)
                return
            failed = self._ranks.first_failure()
            if failed is not None and failed[0] != self._ranks.rank:
                self._end_process(f"rank {failed[0]} failed: {failed[1]}", None)
                return

    def _launchers(self) -> tuple[int, ...]:
        """Processes that started this one and are alive."""
        found = find_launchers(os.getppid())
        if self._launcher is not None and is_alive(self._launcher):
            found = (*found, self._launcher)
        return found

    def _end_process(self, reason: str, signal_first: signal.Signals | None) -> None:
        """Wait for the process to exit by itself, then end it."""
        if signal_first is not None:
            os.kill(os.getpid(), signal_first)
        time.sleep(GRACE_S)
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
        if b"deepspeed.launcher.launch" not in (parent / "cmdline").read_bytes():
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
