"""Start the delivery process beside training, ask for its progress, and wait for it."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tracking.delivery.state import DeliveryState
from tracking.durable import hold_lock
from tracking.errors import DeliveryError, is_terminal, warn, write_stderr
from tracking.redaction import redact

# The folder of the packages goes to the end of the path, for a checkout that is not
# installed. -P keeps the user's folder out of it: its modules could hide others.
_BOOT: Final = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module('tracking.delivery', run_name='__main__', alter_sys=True)"
)
_PACKAGES: Final = str(Path(__file__).resolve().parents[2])
_POLL_S: Final = 0.1
# Python warns about a process object that is deleted while its process runs.
_STARTED: Final[list[subprocess.Popen[bytes]]] = []


@atexit.register
def _detach() -> None:
    """Keep Python from warning about processes that outlive this one."""
    for process in _STARTED:
        if process.poll() is None:
            process.returncode = 0


def delivery_command(*arguments: str) -> list[str]:
    """Command line that starts a delivery process from any working directory."""
    return [sys.executable, "-P", "-c", _BOOT, _PACKAGES, *arguments]


def lock_path(run_path: Path) -> Path:
    """Lock file that a process holds while it delivers a run."""
    return run_path / "delivery" / "lock"


def handover_path(run_path: Path) -> Path:
    """File that asks a delivery that waits for MLflow to end: another one takes over."""
    return run_path / "delivery" / "handover"


@contextlib.contextmanager
def ask_for_handover(run_path: Path) -> Iterator[None]:
    """Ask a delivery that waits for MLflow to end, while the block runs."""
    handover_path(run_path).touch()
    try:
        yield
    finally:
        handover_path(run_path).unlink(missing_ok=True)


def is_being_delivered(run_path: Path) -> bool:
    """Whether a process delivers a run now."""
    try:
        with hold_lock(lock_path(run_path), timeout_s=0.0) as is_held:
            return not is_held
    except OSError:
        return False


def wait_for_delivery(run_path: Path, timeout_s: float) -> bool:
    """Wait until no process delivers a run; False if one still does at the timeout."""
    deadline = time.monotonic() + timeout_s
    while is_being_delivered(run_path):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # replaced by an object without a spec
        return True


@contextlib.contextmanager
def block_sigterm() -> Iterator[None]:
    """Block SIGTERM for this thread and for processes that it starts, where there is one."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_sigterm() -> None:
    """Ignore SIGTERM in the delivery process while its training process lives.

    Launchers and batch systems end a training by SIGTERM to all its processes. How it ends
    is still to be delivered.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return
    training = os.getppid()

    def end_after_training(signum: int, _: object) -> None:
        if os.getppid() != training:
            sys.exit(128 + signum)

    signal.signal(signal.SIGTERM, end_after_training)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})  # see block_sigterm


class DeliveryProcess:
    """The delivery process of a run, seen from the training process.

    Parameters
    ----------
    run_path
        Folder of the run.
    """

    def __init__(self, run_path: Path) -> None:
        self._run_path = run_path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, detached from this one and its terminal."""
        if not _is_installed("mlflow"):
            warn(
                "start(delivery=True): expected mlflow to be installed, got no such "
                f"package. The run is recorded in {self._run_path} only: install mlflow "
                f"and run 'harness sync {self._run_path.name}', or pass delivery=False."
            )
            return
        log = self._run_path / "delivery" / "log.txt"
        try:
            log.parent.mkdir(exist_ok=True)
            # The file is for what Python writes if it fails to start.
            with log.open("ab") as output, block_sigterm():
                process = subprocess.Popen(
                    delivery_command(str(self._run_path)),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
        except OSError as error:
            warn(
                f"start(delivery=True): expected to start the delivery process, got "
                f"{error}. The run is recorded: 'harness sync {self._run_path.name}' "
                "delivers it."
            )
            return
        self._process = process
        _STARTED[:] = [one for one in _STARTED if one.returncode is None] + [process]
        # Or it stays a zombie until this process ends.
        reaper = threading.Thread(
            target=process.wait, name="tracking-reaper", daemon=True
        )
        with contextlib.suppress(RuntimeError):  # the system has no more threads
            reaper.start()

    def wait_for_run_id(self, timeout_s: float) -> str:
        """Wait until delivery has created the MLflow run; return its id.

        Raises
        ------
        DeliveryError
            If delivery does not create it in time, or has ended.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            state = DeliveryState.read_or_none(self._run_path)
            if state and state.mlflow_run_id:
                return state.mlflow_run_id
            has_ended = self._process is None or self._process.poll() is not None
            if has_ended or time.monotonic() > deadline:
                reason = (state and state.error) or "no answer from it"
                reason = "no delivery process" if self._process is None else reason
                raise DeliveryError(
                    f"Run.mlflow_run_id: expected delivery to create the MLflow run "
                    f"within {timeout_s:g} s, got {reason}. See "
                    f"{self._run_path / 'delivery/log.txt'}; "
                    f"'harness sync {self._run_path.name}' tries again."
                )
            time.sleep(_POLL_S)

    def wait(self, last_seq: int, wait_s: float) -> None:
        """Wait until delivery has sent all rows; show the progress on a terminal.

        Parameters
        ----------
        last_seq
            ``seq`` of the run's last row.
        wait_s : seconds
            Maximum time to wait. A message on stderr then says what is left.
        """
        if self._process is None:
            return
        deadline = time.monotonic() + wait_s
        is_shown = False
        while True:
            has_ended = self._process.poll() is not None
            state = DeliveryState.read_or_none(self._run_path) or DeliveryState()
            if state.delivered >= last_seq or state.phase == "done":
                break
            if has_ended or state.phase == "gave up" or time.monotonic() > deadline:
                self._report_unsent(state)
                break
            if is_terminal():
                is_shown = True
                count = f"delivering to MLflow: {state.behind} rows to go"
                write_stderr(f"\r{count}\x1b[K")
            time.sleep(_POLL_S)
        if is_shown:
            write_stderr("\r\x1b[K")

    def _report_unsent(self, state: DeliveryState) -> None:
        """Say on stderr what MLflow does not have yet."""
        assert self._process is not None
        run_id = self._run_path.name
        count = f"{state.behind} rows" if state.behind else "some rows"
        reason = f" ({redact(state.error)})" if state.error else ""
        continues = self._process.returncode is None and state.phase != "gave up"
        how = "delivery continues in the background; " if continues else ""
        write_stderr(
            f"{count} of {run_id} are not in MLflow yet{reason}: {how}"
            f"'harness sync {run_id}' sends the rest.\n"
        )
