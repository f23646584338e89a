"""Ranks end together: when one fails, when it dies, and when their launcher is killed."""

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

POLL_S = 0.5
"""Seconds between two looks at the launcher and at the other ranks."""

GRACE_S = 10.0
"""Seconds that a rank has to end by itself, saving what it can, before it is ended."""


class Watchdog:
    """Ends this rank with the others.

    An exception that leaves the program prints its traceback, unless it only follows from
    another rank's failure: then one line says so, and the first traceback on the screen is
    the one that matters. A thread looks for two things that no exception tells of: another
    rank has failed while this one waits for it, or the launcher was killed.

    Parameters
    ----------
    ranks
        Ranks to end with.
    launcher
        Process beside the parents whose end is this rank's.

    Notes
    -----
    Killing torchrun or DeepSpeed's launcher with SIGKILL leaves the ranks running, since
    neither can pass the signal on. The rank first asks itself to stop by SIGTERM, which a
    fit answers by saving; after ``GRACE_S`` seconds it is ended.
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
        """True if this process is watched already; once is enough."""
        return isinstance(getattr(sys.excepthook, "__self__", None), Watchdog)

    def _on_exception(
        self,
        kind: type[BaseException],
        error: BaseException,
        traceback: TracebackType | None,
    ) -> None:
        """Show what failed first, once, and tell the others."""
        self._quiet.set()
        # Leaving a group politely waits for ranks that may be gone.
        atexit.unregister(disconnect)
        if isinstance(error, PeerError):
            return
        first = self._ranks.first_failure()
        if first is None or first[0] == self._ranks.rank:
            self._ranks.report_failure(error)
            self._hook(kind, error, traceback)
        else:
            rank, reason = first
            text = f"rank {self._ranks.rank}: ended, since rank {rank} failed: {reason}"
            print(text, file=sys.stderr)  # noqa: T201 - in the place of a traceback
        sys.stderr.flush()

    def _poll(self) -> None:
        """Poll until told to stop."""
        while not self._quiet.wait(POLL_S):
            if self._launchers() != self._parents:
                self._end_process("its launcher is gone", signal.SIGTERM)
                return
            failed = self._ranks.first_failure()
            if failed is not None and failed[0] != self._ranks.rank:
                self._end_process(f"rank {failed[0]} failed: {failed[1]}", None)
                return

    def _launchers(self) -> tuple[int, ...]:
        """Processes that started this one, as far as they are alive."""
        found = find_launchers(os.getppid())
        if self._launcher is not None and is_alive(self._launcher):
            found = (*found, self._launcher)
        return found

    def _end_process(self, reason: str, ask: signal.Signals | None) -> None:
        """Give the program time to end by itself, then end it."""
        if ask is not None:
            os.kill(os.getpid(), ask)
        time.sleep(GRACE_S)
        os.write(2, f"rank {self._ranks.rank}: ended, since {reason}\n".encode())
        os._exit(1)


def find_launchers(pid: int) -> tuple[int, ...]:
    """The parent process, and DeepSpeed's outer launcher where the parent is its inner one.

    DeepSpeed starts ranks by two processes, of which either may be killed: ``runner``, the
    command that the user typed, and ``launch`` below it. Without ``/proc`` only the parent
    is known.
    """
    parent = Path("/proc") / str(pid)
    try:
        if b"deepspeed.launcher.launch" not in (parent / "cmdline").read_bytes():
            return (pid,)
        # Fields after the command's name, which is in brackets: state, parent, ...
        fields = (parent / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return (pid,)
    return pid, int(fields[1])


def is_alive(pid: int) -> bool:
    """True if there is such a process, even another user's."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
