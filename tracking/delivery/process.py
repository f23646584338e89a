"""Start the process that delivers the runs of this one, talk to it, and see what it delivers."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from tracking.durable import hold_lock
from tracking.errors import DeliveryError
from tracking.settings import select_of_stores

# The folder of the packages goes to the end of the path, for a checkout that is not
# installed. -P keeps the user's folder out of it: its modules could hide others.
_BOOT: Final = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "from tracking.mlflow_store.imports import block_frames; block_frames(); "
    "runpy.run_module('tracking.delivery', run_name='__main__', alter_sys=True)"
)
_POLL_S: Final = 0.1
_SEND_WAIT_S: Final = 1.0
_PACKAGES: Final = str(Path(__file__).resolve().parents[2])
# Python warns about a process object that is deleted while its process runs.
_STARTED: Final[list[subprocess.Popen[bytes]]] = []


@atexit.register
def _detach() -> None:
    """Keep Python from warning about processes that outlive this one."""
    for process in _STARTED:
        if process.poll() is None:
            process.returncode = 0


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


def delivery_command(*arguments: str) -> list[str]:
    """Command line that starts a delivery process from any working directory."""
    # An embedded interpreter may have no program; starting "" is refused by the system.
    return [sys.executable or "", "-P", "-c", _BOOT, _PACKAGES, *arguments]


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


def set_group_niceness(pid: int, niceness: int) -> None:
    """Set how nice a process of its own session is to other sessions, where Linux has it.

    Linux shares the processor between sessions first, so ``nice`` alone counts for nothing.
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(niceness))


@dataclass(frozen=True)
class Surroundings:
    """What a delivery process inherits; runs that differ in it need another process."""

    #: Environment variables. Those that have to do with MLflow's store are compared:
    #: its address, credentials, proxies. A program may change others from run to run.
    environment: Mapping[str, str] = field(compare=False)
    folder: str  #: working folder, which relative addresses start from
    #: folder that the run was started in; MLflow makes new folders there
    started_in: str
    _of_stores: Mapping[str, str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_of_stores", select_of_stores(self.environment))


class DeliveryProcess:
    """A process that delivers all runs that this process hands over to it.

    It imports MLflow once and delivers each run in a thread of its own. It ends when this
    process has ended, or when it has had nothing to do for a while.

    Parameters
    ----------
    run_path
        Folder of the first run; its log gets what Python writes if it fails to start. None:
        the process imports MLflow until it gets its first run.
    surroundings
        What the process inherits.
    on_report
        Called from another thread with a run's number and whether it is delivered.
    on_exit
        Called from another thread with this object, when the process has ended.
    """

    def __init__(
        self,
        run_path: Path | None,
        surroundings: Surroundings,
        on_report: Callable[[int, bool], None],
        on_exit: Callable[[DeliveryProcess], None],
    ) -> None:
        self.surroundings = surroundings
        self._on_report = on_report
        self._on_exit = on_exit
        (requests, self._requests), (self._reports, reports) = os.pipe(), os.pipe()
        try:
            self._process = _start(
                run_path,
                "--follow",
                # For who looks at the list of processes.
                *([] if run_path is None else [str(run_path)]),
                stdin=requests,
                stdout=reports,
                env=surroundings.environment,
                cwd=surroundings.folder,
            )
        except BaseException:
            self.close()
            raise
        finally:
            os.close(requests)
            os.close(reports)
        self.pid = self._process.pid
        # Training does not wait for a process that does not read.
        os.set_blocking(self._requests, False)
        # It also takes the exit code: without that, a process that ended is a zombie.
        reader = threading.Thread(
            target=self._read_reports, name="tracking-delivery", daemon=True
        )
        self._has_reader = True
        try:
            reader.start()
        except RuntimeError:  # the system has no more threads
            self._has_reader = False

    @property
    def is_lost(self) -> bool:
        """Whether the process has ended and no thread is there to tell."""
        return not self._has_reader and self._process.poll() is not None

    @property
    def has_failed(self) -> bool:
        """Whether the process ended with an error of its own; not if it was killed."""
        return (self._process.returncode or 0) > 0

    def take(self, request: Mapping[str, Any]) -> bool:
        """Hand a run over, or wake its delivery; False if the process takes no more.

        Parameters
        ----------
        request
            Fields of ``service.Request``, or ``wake`` with the number of one.
        """
        if self._send(json.dumps(request).encode() + b"\n"):
            return True
        self._close_requests()  # what follows half a line would not be understood
        return False

    def _send(self, data: bytes) -> bool:
        deadline = time.monotonic() + _SEND_WAIT_S
        while data:
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                left_s = max(0.0, deadline - time.monotonic())
                if not select.select([], [self._requests], [], left_s)[1]:
                    return False
            except OSError:
                return False
        return True

    def close(self) -> None:
        """Close the pipes. A forked child does, which has no part in this delivery."""
        self._close_requests()
        _close(self._reports)
        self._reports = -1

    def _close_requests(self) -> None:
        # Another thread may be about to write, and the number soon be that of a file.
        requests, self._requests = self._requests, -1
        _close(requests)

    def _read_reports(self) -> None:
        """Pass on which runs are delivered, until the process has ended."""
        rest = b""
        with contextlib.suppress(OSError):  # closed meanwhile
            while data := os.read(self._reports, 1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    report = json.loads(line)
                    self._on_report(report["number"], report["is_done"])
        self._process.wait()
        self._on_exit(self)  # which closes the pipes


def _close(fd: int) -> None:
    with contextlib.suppress(OSError):
        os.close(fd)


class RunByRunProcess:
    """A delivery process that handles one run after another, as it is asked to.

    The runs are named on its stdin: a command line has no room for thousands. It imports
    MLflow once, with the first run.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self._process: subprocess.Popen[str] | None = None
        self._errors: IO[str]

    def ask(
        self, path: Path, is_wanted: Callable[[], bool] = lambda: True
    ) -> dict[str, Any]:
        """Let the process handle a run; return its report.

        Parameters
        ----------
        is_wanted
            Asked again and again; if it says no, the process is killed, and the report is
            empty.
        """
        process = self._process or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(OSError):  # it has ended
            process.stdin.write(f"{json.dumps(str(path.absolute()))}\n")
            process.stdin.flush()
        while not select.select([process.stdout], [], [], _POLL_S)[0]:
            if not is_wanted():
                process.kill()
                self.close()
                return {}
        if line := process.stdout.readline():
            report: dict[str, Any] = json.loads(line)
            return report
        code = process.wait()
        self._errors.seek(0)
        reason = self._errors.read()[-2000:].strip()
        self.close()
        raise DeliveryError(
            f"delivery of {path.name}: expected a report, got exit code {code}: {reason}"
        )

    def close(self) -> None:
        """End the process, after the run that it is at; a later run starts another one."""
        if self._process is not None:
            with self._errors, contextlib.suppress(OSError), self._process:
                pass  # this closes its stdin
            self._process = None

    def _start(self) -> subprocess.Popen[str]:
        self._errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            delivery_command(*self._options),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        return self._process

    def __enter__(self) -> RunByRunProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def start_detached(run_path: Path) -> None:
    """Start a process that delivers one run and that nothing waits for."""
    _start(run_path, str(run_path), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def open_log(run_path: Path | None) -> Iterator[IO[bytes]]:
    """Open a run's log for what is written to stderr; without a run, nobody reads that."""
    log = Path(os.devnull)
    if run_path is not None:
        log = run_path / "delivery" / "log.txt"
        log.parent.mkdir(exist_ok=True)
    with log.open("ab") as errors:
        yield errors


def _start(
    run_path: Path | None, *arguments: str, stdin: int, stdout: int, **options: Any
) -> subprocess.Popen[bytes]:
    """Start a delivery process, detached from this one and its terminal."""
    # The file is for what Python writes if it fails to start.
    with open_log(run_path) as errors, block_sigterm():
        process = subprocess.Popen(
            delivery_command(*arguments),
            stdin=stdin,
            stdout=stdout,
            stderr=errors,
            start_new_session=True,
            **options,
        )
    _STARTED[:] = [one for one in _STARTED if one.returncode is None] + [process]
    return process
