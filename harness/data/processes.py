"""Processes of this machine: which one is meant, and whether it still runs."""

from __future__ import annotations

import os
import select
import threading
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Process:
    """One process, and no later one that gets the same number."""

    pid: int  #: its number, where it can be seen
    #: when it began, in clock ticks since the machine started; None without ``/proc``
    began: int | None

    @classmethod
    def current(cls) -> Process:
        """The process that calls it."""
        pid = os.getpid()
        fields = read_stat(pid)
        return cls(pid, None if fields is None else int(fields[_BEGAN]))

    def state(self) -> str | None:
        """State as ``ps`` shows it, such as ``S`` or ``T``; None if it has ended.

        A process that has ended but is still listed by its parent has ended, too.
        """
        fields = read_stat(self.pid)
        if fields is None or int(fields[_BEGAN]) != self.began or fields[0] in "ZX":
            return None
        return fields[0]


_BEGAN = 19
"""Place of the time that a process began, counted from its state; see proc(5)."""


def read_stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/<pid>/stat``: state, parent, group and so on; None if there are none."""
    try:
        text = (Path("/proc") / str(pid) / "stat").read_text(errors="replace")
    except OSError:
        return None
    # The command's name comes first, in brackets, and may contain any character.
    return text.rpartition(")")[2].split()


def end_with(process: Process) -> None:
    """End this process as soon as another one has ended, however that happened.

    A thread waits for it, and does not have to ask now and then. Only Linux has what it
    needs (``pidfd_open``); elsewhere nothing is done.
    """
    if not hasattr(os, "pidfd_open"):
        return
    try:
        fd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        os._exit(1)
    except OSError:  # a kernel or a sandbox without it
        return
    if process.began is not None and process.state() is None:
        # Another process has its number.
        os._exit(1)
    threading.Thread(target=_wait_and_end, args=[fd], daemon=True).start()


def _wait_and_end(fd: int) -> None:
    ended = select.poll()
    ended.register(fd, select.POLLIN)
    ended.poll()
    os._exit(1)
