"""The delivery process of a training process: deliver each run that it hands over.

The training process writes one line of JSON for each run to stdin, and reads from stdout
which runs are delivered. All runs share MLflow, whose import takes longer than the
delivery of a short run. Each has a thread of its own, so one that a server keeps waiting
holds up no other. A line of stdin may also ask to look at a run now, which saves a wait
for the next look.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tracking.delivery.process import RunByRunProcess, set_group_niceness
from tracking.store import get_rank_dir, is_being_written

LINGER_S: Final = 30.0
"""Time without a run after which the process ends; a later run starts a new one."""

FIRST_LOOK_S: Final = 0.2
"""Time that a run gets before it is delivered: one that has ended takes fewer calls."""

QUIET_S: Final = 1.0
LONGEST_WAIT_S: Final = 10.0
"""How long nothing is to be delivered before pictures are drawn, and the longest wait."""

_POLL_S: Final = 1.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A run to deliver."""

    number: int  #: which one it is for the training process
    run: Path
    #: whether the run was just created, so that MLflow cannot have it
    is_new: bool = False
    #: set by the training process to have the run looked at now
    wake: threading.Event = field(default_factory=threading.Event)

    def pause(self, seconds: float) -> None:
        """Wait, at most until the training process wakes this delivery."""
        self.wake.wait(seconds)
        self.wake.clear()


@dataclass
class DeliveryService:
    """Delivers runs in threads until nothing is left to do.

    Parameters
    ----------
    deliver
        Delivers a run, and raises nothing. Returns what is left to do when nothing else is
        to be delivered, or None if MLflow does not have all of the run.
    requests, reports
        Descriptors to read from and to write to.
    linger_s : seconds
        Time without a run after which the service ends.

    Attributes
    ----------
    is_training
        Whether the training process has not ended yet.
    """

    deliver: Callable[[Request], Callable[[], None] | None]
    requests: int
    reports: int
    linger_s: float = LINGER_S
    is_training: bool = True
    _threads: list[threading.Thread] = field(default_factory=list)
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _busy: dict[int, Request] = field(default_factory=dict)
    _busy_at: float = 0.0

    def __post_init__(self) -> None:
        os.set_blocking(self.reports, False)  # a training process that does not read

    def serve(self) -> None:
        """Deliver runs until the training process has ended, or hands over no more."""
        rest, is_open = b"", True
        idle_since = time.monotonic()
        while True:
            self._threads = [thread for thread in self._threads if thread.is_alive()]
            if self._threads:
                idle_since = time.monotonic()
            elif not is_open or time.monotonic() - idle_since > self.linger_s:
                return
            if not is_open:
                self._threads[0].join()
            elif select.select([self.requests], [], [], _POLL_S)[0]:
                data = os.read(self.requests, 1 << 16)
                *lines, rest = (rest + data).split(b"\n")
                is_open = bool(data)
                if not is_open:  # training has ended: nobody needs the processor more
                    self.is_training = False
                    set_group_niceness(os.getpid(), 0)
                for line in lines:
                    self._take(json.loads(line))

    def _take(self, fields: dict[str, Any]) -> None:
        """Start to deliver a run, or wake its delivery."""
        if (number := fields.get("wake")) is not None:
            if request := self._busy.get(number):
                request.wake.set()
            return
        request = Request(**fields | {"run": Path(fields["run"])})
        is_first = not self._busy_at
        with self._changed:
            self._busy[request.number] = request
            self._busy_at = time.monotonic()
        thread = threading.Thread(
            target=self._run,
            args=[request, 0.0 if is_first else FIRST_LOOK_S],
            name=request.run.name,
            daemon=True,
        )
        self._threads.append(thread)
        thread.start()

    def _run(self, request: Request, delay_s: float) -> None:
        request.wake.wait(delay_s)
        finish = self.deliver(request)
        report = {"number": request.number, "is_done": finish is not None}
        with contextlib.suppress(OSError):  # the training process has ended
            os.write(self.reports, f"{json.dumps(report)}\n".encode())
        with self._changed:
            del self._busy[request.number]
            self._busy_at = time.monotonic()
            self._changed.notify_all()
        if finish is not None:
            self._wait_until_quiet()
            finish()

    def _wait_until_quiet(self) -> None:
        """Wait until no run is being delivered, and none is likely to come soon.

        A program with many short fits waits at its end for its runs, not for their pictures.
        """
        deadline = time.monotonic() + LONGEST_WAIT_S
        with self._changed:
            while (now := time.monotonic()) < deadline:
                quiet_s = QUIET_S if self.is_training else 0.0
                if not self._busy and now - self._busy_at >= quiet_s:
                    return
                self._changed.wait(min(QUIET_S, deadline - now))


class SummaryProcess(RunByRunProcess):
    """Writes the summaries of runs, one after another, in a process of its own.

    They need memory in proportion to the rows; if there is not enough, the delivery
    continues without them.
    """

    def __init__(self) -> None:
        super().__init__("--summaries")
        self._lock = threading.Lock()

    def write(self, path: Path) -> list[Path]:
        """Write the summaries of a run; none if it is resumed meanwhile."""
        rank_dir = get_rank_dir(path, 0)
        with self._lock:
            report = self.ask(path, lambda: not is_being_written(rank_dir))
        return [Path(file) for file in report.get("files", [])]
