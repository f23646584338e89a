"""Delivery as the training process sees it: hand runs over, and wait for them.

Training ends without waiting for MLflow. The interpreter does wait at its end, once for
all its runs: a container, for example, ends with its first process, and the delivery with
it.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tracking.delivery.options import read_options
from tracking.delivery.process import (
    DeliveryProcess,
    Surroundings,
    set_group_niceness,
)
from tracking.delivery.state import DeliveryState, rows_behind
from tracking.errors import (
    DeliveryError,
    get_terminal_width,
    is_terminal,
    warn,
    write_stderr,
)
from tracking.redaction import redact
from tracking.settings import read_environment
from tracking.store import Manifest, find_start_folder, get_working_folder

if TYPE_CHECKING:
    from multiprocessing.util import Finalize

SILENT_S: Final = 10.0
"""Time that the end of the interpreter waits for a server that does not answer."""

_MAX_STARTS: Final = 3
_MAX_READ: Final = 20
_POLL_S: Final = 0.1
_SHOW_AFTER_S: Final = 0.5


class RunDelivery:
    """Delivery of a run, seen from the training process.

    Attributes
    ----------
    is_done
        Whether MLflow has the whole run.
    wait_s : seconds
        How long the end of the interpreter waits for the run.
    """

    def __init__(self, run_path: Path) -> None:
        self.run_path = run_path
        self.is_done = False
        self.wait_s = 0.0
        self._pid = os.getpid()
        self._is_new = False
        self._num_starts = 1
        self._process: DeliveryProcess | None = None
        self._number = 0
        self._is_over = threading.Event()

    @property
    def is_over(self) -> bool:
        """Whether no process of this one delivers the run any more."""
        process = self._process
        return self._is_over.is_set() or process is None or process.is_lost

    def start(self, manifest: Manifest, *, is_new: bool = False) -> None:
        """Hand the run over to a process that delivers it.

        Parameters
        ----------
        is_new
            Whether the run was just created, so that MLflow cannot have it.
        """
        if not _is_installed("mlflow"):
            warn(
                "start(delivery=True): expected mlflow to be installed, got no such "
                f"package. The run is recorded in {self.run_path} only: install mlflow "
                f"and run 'harness sync {self.run_path.name}', or pass delivery=False."
            )
            return
        self.wait_s = read_options(manifest).wait_s
        self._is_new = is_new
        surroundings = Surroundings(
            environment=read_environment(),
            folder=str(get_working_folder()),
            started_in=str(find_start_folder(self.run_path, manifest)),
        )
        try:
            (self.run_path / "delivery").mkdir(exist_ok=True)
            _deliveries.add(self, surroundings)
        except OSError as error:
            warn(
                f"start(delivery=True): expected to start the delivery process, got "
                f"{error}. The run is recorded: 'harness sync {self.run_path.name}' "
                "delivers it."
            )

    def hand_to(self, process: DeliveryProcess, number: int) -> bool:
        """Hand the run over to a process; False if it takes no more runs."""
        request = {"number": number, "run": str(self.run_path), "is_new": self._is_new}
        if not process.take(request):
            return False
        self._process, self._number = process, number
        self._is_new = False
        return True

    def is_left_by(self, process: DeliveryProcess) -> bool:
        """Whether a process that has ended was to deliver the run."""
        return self._process is process and not self._is_over.is_set()

    def may_start_again(self) -> bool:
        """Count another start of the delivery; False if there were too many."""
        self._num_starts += 1
        return self._num_starts <= _MAX_STARTS

    def end(self, is_done: bool) -> None:
        """Note whether the run is delivered, now that it is decided."""
        self.is_done = is_done
        self._is_over.set()

    def wake(self) -> None:
        """Have the delivery look at the run now, and not at the end of its pause."""
        if self._process is not None and not self._is_over.is_set():
            self._process.take({"wake": self._number})

    def hurry(self) -> None:
        """Let the delivery be as fast as other processes."""
        if self._process is not None:
            set_group_niceness(self._process.pid, 0)

    def pause(self, seconds: float) -> None:
        """Wait for the end of the delivery, at most for some time."""
        self._is_over.wait(seconds)

    def read_state(self) -> DeliveryState:
        """How far the delivery is."""
        return DeliveryState.read_or_new(self.run_path)

    def is_behind(self) -> bool:
        """Whether MLflow is missing anything; ``harness sync`` may have sent it meanwhile."""
        state = self.read_state()
        return state.phase != "done" or rows_behind(self.run_path, state) > 0

    def wait_for_run_id(self, timeout_s: float) -> str:
        """Wait until delivery has created the MLflow run; return its id."""
        deadline = time.monotonic() + timeout_s
        self.wake()
        while True:
            is_over = self.is_over
            state = DeliveryState.read_or_none(self.run_path)
            if state and state.mlflow_run_id:
                return state.mlflow_run_id
            if is_over or time.monotonic() > deadline:
                reason = (state and state.error) or "no answer from it"
                reason = "no delivery process" if self._process is None else reason
                raise DeliveryError(
                    f"Run.mlflow_run_id: expected delivery to create the MLflow run "
                    f"within {timeout_s:g} s, got {reason}. See "
                    f"{self.run_path / 'delivery/log.txt'}; "
                    f"'harness sync {self.run_path.name}' tries again."
                )
            self._is_over.wait(_POLL_S)

    def wait(self, timeout_s: float | None, last_seq: int | None = None) -> bool:
        """Wait until MLflow has the run; show the progress on a terminal.

        Parameters
        ----------
        timeout_s : seconds
            Maximum time to wait; None: until delivery has ended.
        last_seq
            ``seq`` of the last row to wait for, if the run is still being written.

        Returns
        -------
        whether MLflow has it; True if the run is not delivered at all
        """
        if self._process is None:
            return True
        if self._pid != os.getpid():  # a forked child: nothing reports to it
            return False

        def has_rows() -> bool:
            return last_seq is not None and self.read_state().delivered >= last_seq

        is_live = last_seq is not None
        self.wake()
        _wait_for([self], timeout_s, is_enough=has_rows, is_live=is_live)
        return self.is_done or has_rows()


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # replaced by an object without a spec
        return True


class _Deliveries:
    """All deliveries of this process, and the processes that they run in.

    Attributes
    ----------
    thinned
        Runs of which MLflow has fewer points than were logged, and of which metrics.
    """

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._processes: list[DeliveryProcess] = []
        self.forget_all()

    def forget_all(self) -> None:
        """Take no part in the deliveries of the process that forked this one."""
        self._lock = threading.RLock()  # another thread may have held it
        for process in self._processes:
            process.close()
        self._processes = []
        self._runs: dict[int, RunDelivery] = {}
        self.thinned: list[tuple[str, dict[str, int]]] = []
        self._waits_as_worker = False

    def add(self, run: RunDelivery, surroundings: Surroundings) -> None:
        """Hand a run over to a process with these surroundings; start one if needed."""
        with self._lock:
            number = next(self._numbers)
            self._runs[number] = run  # first: the report may come at once
            try:
                self._hand_over(run, number, surroundings)
            except OSError:
                del self._runs[number]
                raise
            if not self._waits_as_worker:
                self._waits_as_worker = True
                call_at_worker_end(wait_at_end, 0)

    def _hand_over(
        self, run: RunDelivery, number: int, surroundings: Surroundings
    ) -> None:
        for process in self._processes:
            if process.surroundings == surroundings and run.hand_to(process, number):
                return
        run.hand_to(self._start(run.run_path, surroundings), number)

    def prepare(self, surroundings: Surroundings) -> None:
        """Start a process with these surroundings, if there is none, for runs to come."""
        with self._lock:
            if all(process.surroundings != surroundings for process in self._processes):
                self._start(None, surroundings)

    def _start(
        self, run_path: Path | None, surroundings: Surroundings
    ) -> DeliveryProcess:
        process = DeliveryProcess(
            run_path, surroundings, self._note_report, self._replace
        )
        self._processes.append(process)
        return process

    def list_unsent(self) -> list[RunDelivery]:
        """Runs that MLflow does not have completely."""
        with self._lock:
            return list(self._runs.values())

    def _note_report(self, number: int, is_done: bool) -> None:
        with self._lock:
            run = self._runs.get(number)
            if run is not None:
                run.end(is_done)
                if is_done:
                    del self._runs[number]
                    if thinned := run.read_state().list_thinned():
                        self.thinned.append((run.run_path.name, thinned))

    def _replace(self, ended: DeliveryProcess) -> None:
        """Hand over again what a process did not deliver that was killed or just ended."""
        with self._lock:
            self._processes.remove(ended)
            ended.close()
            left = {n: run for n, run in self._runs.items() if run.is_left_by(ended)}
            for number, run in left.items():
                try:
                    if ended.has_failed or not run.may_start_again():
                        run.end(False)
                        continue
                    self.add(run, ended.surroundings)
                    del self._runs[number]
                except OSError:
                    run.end(False)


_deliveries = _Deliveries()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_deliveries.forget_all)


def prepare_delivery() -> None:
    """Start the process that delivers runs, for a new run that is about to be started here.

    It imports MLflow meanwhile.
    """
    if _is_installed("mlflow"):
        folder = str(get_working_folder())
        environment = read_environment()
        surroundings = Surroundings(environment, folder=folder, started_in=folder)
        with contextlib.suppress(OSError):  # the run tries again, and says so
            _deliveries.prepare(surroundings)


# ------------------------------------------------------- the end of the interpreter


@atexit.register  # before any run registers its own end, so that this comes last
def wait_at_end() -> None:
    """Wait for the delivery of all runs; say on stderr what is waited for and what is left.

    An interrupt ends the wait; the delivery continues in the background.
    """
    runs = _deliveries.list_unsent()
    with _catch_interrupt() as is_interrupted:
        limit_s = max((run.wait_s for run in runs), default=0.0)
        _wait_for(runs, limit_s, is_enough=is_interrupted, is_last=True)
        _report_unsent([run for run in runs if not run.is_done and run.is_behind()])
        _report_thinned(_deliveries.thinned)


def is_worker() -> bool:
    """Whether multiprocessing has started this process."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def call_at_worker_end(
    function: Callable[[], None], priority: int = 1
) -> Finalize | None:
    """Call a function at the end of a process of multiprocessing, which skips exit handlers.

    Parameters
    ----------
    priority
        A higher one is called earlier; the wait for deliveries has 0.

    Returns
    -------
    what can cancel the call; None in any other process, which calls nothing
    """
    util = sys.modules.get("multiprocessing.util")
    if util is None or not is_worker():
        return None
    finalize: Finalize = util.Finalize(None, function, exitpriority=priority)
    return finalize


@contextlib.contextmanager
def _catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Note Ctrl-C inside the block instead of raising; yields whether it came."""
    interrupted = threading.Event()
    try:
        before = signal.getsignal(signal.SIGINT)
        if callable(before):  # it may be ignored
            signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    except ValueError:  # not in the main thread
        before = None
    try:
        yield interrupted.is_set
    finally:
        if callable(before):
            signal.signal(signal.SIGINT, before)


def _wait_for(
    runs: Sequence[RunDelivery],
    timeout_s: float | None,
    *,
    is_enough: Callable[[], bool],
    is_last: bool = False,
    is_live: bool = False,
) -> None:
    """Wait until the delivery of some runs is over; show what is left to do.

    Parameters
    ----------
    timeout_s : seconds
        Maximum time to wait; None: no limit.
    is_live
        Whether training goes on beside the delivery, which then stays nice.
    is_last
        Whether the interpreter waits, which waits less for a server that does not answer,
        and always says so.
    """
    began = time.monotonic()
    silent_since = began
    shown = ""
    while left := [run for run in runs if not run.is_over]:
        now = time.monotonic()
        if (timeout_s is not None and now - began > timeout_s) or is_enough():
            break
        states = [run.read_state() for run in left[:_MAX_READ]]
        if any(state.phase != "waiting" for state in states):
            silent_since = now
        if is_last and now - silent_since > SILENT_S:
            break
        if now - began > _SHOW_AFTER_S:
            shown = _show(left, states, timeout_s if is_last else None, shown)
        if not is_live:
            left[0].hurry()
        left[0].pause(_POLL_S)
    if shown and is_terminal():
        write_stderr("\r\x1b[K")


def _show(
    left: Sequence[RunDelivery],
    states: Sequence[DeliveryState],
    limit_s: float | None,
    shown: str,
) -> str:
    """Show what is waited for: each time on a terminal, else once at the end."""
    what = left[0].run_path.name if len(left) == 1 else f"{len(left)} runs"
    behind = sum(state.behind for state in states)
    text = f"waiting until MLflow has {what}"
    if is_terminal():
        text += f" ({behind:,} rows to go)" if behind else ""
        text += "" if limit_s is None else "; Ctrl-C leaves it to the background"
        # A longer line would be two, of which only the second is written over.
        write_stderr(f"\r{text[: get_terminal_width() - 1]}\x1b[K")
    elif not shown and limit_s is not None:
        write_stderr(f"{text}, at most {limit_s:g} s\n")
    return text


def _report_unsent(runs: Sequence[RunDelivery]) -> None:
    """Say on stderr what MLflow does not have yet."""
    if not runs:
        return
    states = [run.read_state() for run in runs]
    run_id = runs[0].run_path.name
    what, word = (run_id, f" {run_id}") if len(runs) == 1 else (f"{len(runs)} runs", "")
    behind = sum(state.behind for state in states)
    count = f"{behind} rows" if behind else "some rows"
    errors = [state.error for state in states if state.error]
    reason = f" ({redact(errors[0])})" if errors else ""
    is_over = all(run.is_over for run in runs)
    how = "" if is_over else "delivery continues in the background; "
    write_stderr(
        f"{count} of {what} are not in MLflow yet{reason}: {how}"
        f"'harness sync{word}' sends the rest.\n"
    )


def _report_thinned(runs: Sequence[tuple[str, Mapping[str, int]]]) -> None:
    """Say on stderr of which metrics MLflow has fewer points than were logged."""
    if not runs:
        return
    what = runs[0][0] if len(runs) == 1 else f"{len(runs)} runs"
    (name, per_key), *more = runs[0][1].items()
    names = f"{name} and others" if more or len(runs) > 1 else name
    write_stderr(
        f"MLflow has at most {per_key} points of {names} of {what}; the records have all. "
        "delivery={'per_key': None} sends all.\n"
    )
