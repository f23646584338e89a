"""Processes of this machine: which one is meant, and whether it still runs."""

from __future__ import annotations

import os
import select
import threading
from dataclasses import dataclass

from tracking.durable import read_start, read_stat


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
        return cls(pid, read_start(pid))

    def state(self) -> str | None:
        """State as ``ps`` shows it, such as ``S`` or ``T``; None if it has ended."""
        fields = read_stat(self.pid)
        if fields is None or read_start(self.pid) != self.began:
            return None
        return fields[0]


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
