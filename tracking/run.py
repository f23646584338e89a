"""A run that is being recorded: its manifest, its delivery and its end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType, MemberDescriptorType
from typing import Any, Final, Literal, NoReturn

from tracking import capture
from tracking.artifact_logger import ArtifactLogger
from tracking.delivery.waiting import RunDelivery, call_at_worker_end, is_worker
from tracking.errors import InvalidFileError, RunClosedError, RunNotFoundError, warn
from tracking.journal.reader import list_blocks
from tracking.store import (
    Manifest,
    describe_error,
    get_rank_dir,
    get_working_folder,
    write_failure,
)

_STATUSES: Final = ("finished", "failed", "killed")

_CAPTURE_WAIT_S: Final = 1.0
"""A first fit may be shorter than a look at its code."""


class Run(ArtifactLogger):
    """A run that is being recorded. ``tracking.start`` makes one.

    Use it as a context manager. Leaving the block finishes the run: as ``finished``, as
    ``failed`` after an exception, or as ``killed`` after Ctrl-C or a signal. A run that is
    still open when the interpreter exits ends then.

    Any thread and any signal handler may log. A number, bool or string whose ``log``
    call has returned survives if the process is killed at any later instant. A tensor
    survives as soon as it has been read from its device, at most a second later.

    Parameters
    ----------
    path
        Folder of the run.
    manifest
        Manifest of the run; None on a rank that does not write it.
    rank : >= 0
        Rank of this process.
    durability
        As in ``start``.

    Attributes
    ----------
    id
        Unique; sorts by start time.
    path
        Folder of the run.
    rank
        Rank of this process.
    fit
        Which fit of the run is logged, from 1; see ``begin_fit``.
    """

    def __init__(
        self,
        path: Path,
        manifest: Manifest | None,
        *,
        rank: int = 0,
        durability: Literal["process", "fsync"] = "process",
    ) -> None:
        self._manifest = manifest
        self._pid = os.getpid()
        self._status = "running"
        self._delivery = RunDelivery(path)
        self._capture: capture.Capture | None = None
        super().__init__(path, rank, durability)
        self._earlier_error = get_last_error()
        watch_exit()
        atexit.register(self._finish_at_exit)
        self._worker_exit = call_at_worker_end(self._finish_at_exit)

    def __reduce__(self) -> NoReturn:
        """Refuse a copy: a run is written by the process that started it."""
        raise TypeError(
            f"Run: expected to stay in its process, got a copy or pickle of {self.id!r}. "
            "Pass run.path: tracking.open reads it. Or start a run in the other process."
        )

    # --------------------------------------------------------- history and manifest

    def rewind(
        self,
        seq: int,
        rank: int | None = None,
        *,
        indices: Mapping[str, Any] | None = None,
    ) -> None:
        """Go back to a position: later rows are superseded, and stay on record.

        Parameters
        ----------
        seq : >= -1
            A value that ``position`` returned.
        rank
            Rank that wrote the rows, if that rank no longer exists; None: this one.
        indices
            What ``get_indices`` returned there; None: found by reading the whole journal.
        """
        if rank in (None, self.rank):
            super().rewind(seq, indices=indices)
            return
        if not list_blocks(get_rank_dir(self.path, rank)):  # it has recorded nothing
            return
        with Run(self.path, None, rank=rank) as other:
            other.rewind(seq)

    def begin_fit(self, number: int | None = None) -> int:  # noqa: D102
        number = super().begin_fit(number)
        manifest = self._manifest
        if manifest is not None and number > (manifest.num_fits or number):
            manifest.num_fits = number
            self.save_manifest()
        return number

    @property
    def name(self) -> str:
        """Readable name of the run."""
        return self._manifest.name if self._manifest else self.id

    @property
    def status(self) -> str:
        """``running``, ``finished``, ``failed`` or ``killed``."""
        return self._status

    @property
    def manifest(self) -> Manifest:
        """What is known about the run as a whole; ``save_manifest`` writes it."""
        if self._manifest is None:
            return Manifest.read(self.path)
        return self._manifest

    def save_manifest(self, **extra: Any) -> None:
        """Write the manifest on rank 0; ``extra`` is added to its field of that name."""
        if self._manifest is None or os.getpid() != self._pid:
            return
        try:
            json.dumps(extra)
        except (TypeError, ValueError) as error:  # it would spoil the run's end, too
            raise type(error)(
                f"Run.save_manifest: expected JSON values, got {extra!r:.200}: {error}. "
                "Convert them to numbers, texts, lists and dicts."
            ) from error
        self._manifest.extra |= extra
        try:
            self._manifest.write(self.path)
        except OSError as error:
            warn(
                f"run {self.id!r}: expected to write its manifest, got {error}. "
                "Training continues; free some space before the run ends."
            )

    def _start_capture(self, *, save_diff: bool) -> None:
        """Record the code, the packages and the system that the run was started on.

        They are found out beside training, and at once if an earlier run of this program
        knows them.

        Parameters
        ----------
        save_diff
            Keep uncommitted changes of the code as the artifact ``code.diff``.
        """
        manifest = self.manifest
        started = manifest.resumed[-1]["time"] if manifest.resumed else manifest.created
        folder = get_working_folder()

        def add(found: capture.Environment) -> None:
            manifest.add_environment(dataclasses.replace(found, started=started))
            if save_diff and found.diff:
                with contextlib.suppress(RunClosedError):
                    self.log_text(found.diff, "code.diff")

        found = capture.recall(folder, save_diff=save_diff)
        if found is not None:
            add(found)
            return
        self._capture = capture.begin(
            self.path, started, folder, save_diff=save_diff, on_end=add
        )

    def _end_capture(self) -> None:
        """Wait a moment for what is captured; what comes later stays in a file."""
        if self._capture is not None:
            self._capture.wait(0.0 if capture.is_prompt() else _CAPTURE_WAIT_S)

    # -------------------------------------------------------------------- delivery

    def deliver(self, *, is_new: bool = False) -> None:
        """Hand the run over to the process that sends the records to MLflow.

        Parameters
        ----------
        is_new
            Whether the run was just created, so that MLflow cannot have it.
        """
        self._delivery.start(self.manifest, is_new=is_new)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until MLflow has all that was logged; show the progress on a terminal.

        Nothing needs this: the interpreter waits at its end, once for all runs.

        Parameters
        ----------
        timeout_s : seconds
            Maximum time to wait; None: until MLflow has it or the delivery gives up.

        Returns
        -------
        whether MLflow has it; True if the run is not sent to MLflow from this process
        """
        last_seq = self.position() if self._status == "running" else None
        return self._delivery.wait(timeout_s, last_seq)

    @property
    def mlflow_run_id(self) -> str:
        """Id of the MLflow run; waits until delivery has made it.

        Raises
        ------
        DeliveryError
            If that takes more than 60 s, or the run is not delivered.
        """
        return self._delivery.wait_for_run_id(60.0)

    # ------------------------------------------------------------------ end of a run

    def finish(
        self,
        status: str = "finished",
        error: BaseException | None = None,
        wait_s: float = 0.0,
    ) -> None:
        """End the run; all that was logged is on record. A second call does nothing.

        Parameters
        ----------
        status
            ``finished``, ``failed`` or ``killed``.
        error
            Exception that ended a failed run.
        wait_s : seconds
            Time to wait for MLflow as well, as by ``wait``. The delivery continues in the
            background, and the interpreter waits for it at its end.
        """
        if status not in _STATUSES:
            raise ValueError(
                f"Run.finish: expected one of {', '.join(_STATUSES)}, got {status!r}."
            )
        if self._status != "running" or os.getpid() != self._pid:
            return
        self._status = status
        self._forget_exit()
        with contextlib.ExitStack() as last:  # Ctrl-C ends no more than a wait
            last.callback(self._journal.close)
            last.callback(_again_after_interrupt, self._record_end, status, error)
            last.callback(self._journal.begin_close)
            self._end_capture()
            self.flush()
        if self._deferred:
            warn(
                f"run {self.id!r}: expected no logging while it finishes, got "
                f"{len(self._deferred)} tensors, which are lost. Log before finish()."
            )
        self._delivery.wake()
        if wait_s > 0:
            self._delivery.wait(wait_s)

    def _abandon(self) -> None:
        """Stop recording without ending the run, whose manifest stays as it is."""
        self._status = "killed"
        self._forget_exit()
        self._end_capture()
        self._deferred.clear()
        self._journal.close()

    def _record_end(self, status: str, error: BaseException | None) -> None:
        """Write how the run ended.

        This happens before the journal's lock is released: an unlocked run whose
        manifest says ``running`` counts as killed.
        """
        if self._manifest is not None:
            self._manifest.status = status
            self._manifest.ended = utc_now()
            if error is not None:
                self._manifest.error = describe_error(error)
            self.save_manifest()
            if self._capture is not None and self._has_packages():
                self._capture.remove_file()
        elif error is not None:
            write_failure(self._rank_dir, error, utc_now())

    def _has_packages(self) -> bool:
        """Whether what was captured is in the manifest's file, even on a full disk."""
        with contextlib.suppress(InvalidFileError, RunNotFoundError):
            return bool(Manifest.read(self.path).packages)
        return False

    def _forget_exit(self) -> None:
        atexit.unregister(self._finish_at_exit)
        if self._worker_exit is not None:
            self._worker_exit.cancel()

    def _finish_at_exit(self) -> None:
        """Finish the run by the exception that ended the interpreter, if any."""
        # A process of multiprocessing ends while the exception is on its way.
        error = find_error(self._earlier_error) or sys.exception()
        status = _get_status(error)
        self.finish(status, error if status == "failed" else None)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, _: object, exc: BaseException | None, __: object) -> None:
        status = _get_status(exc)
        self.finish(status, exc if status == "failed" else None)

    def __repr__(self) -> str:
        return f"<Run {self.id} {self._status}>"


def _get_status(error: BaseException | None) -> str:
    """Status of a run that ended with this exception, or without one."""
    if error is None or isinstance(error, GeneratorExit):
        return "finished"
    if isinstance(error, KeyboardInterrupt):
        return "killed"
    if isinstance(error, SystemExit):
        if not error.code:
            return "finished"
        # After signal N a process exits with code 128 + N, as in a shell.
        is_signal = isinstance(error.code, int) and error.code > 128
        return "killed" if is_signal else "failed"
    return "failed"


def utc_now() -> str:
    """Current time in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat()


# --------------------------------------------------------- how the interpreter ends

_python_exit: Final = sys.exit
_python_print_exc: Final = traceback.print_exc
_uncaught: list[BaseException | None] = []


class _ExitCode:
    """``SystemExit.code``, which notes when the interpreter or multiprocessing reads it.

    They do so only for an exception that nobody caught, before they call exit handlers; the
    interpreter when no Python code is running any more.
    """

    def __init__(self, member: MemberDescriptorType) -> None:
        self._member = member

    def __get__(self, error: SystemExit | None, owner: type | None = None) -> Any:
        code = self._member.__get__(error, owner)
        caller = sys._getframe().f_back
        if error is not None and (caller is None or _ends_worker(caller)):
            _uncaught.append(SystemExit(code))
        return code

    def __set__(self, error: SystemExit, code: object) -> None:
        self._member.__set__(error, code)


def get_last_error() -> BaseException | None:
    """Return the last exception that was printed because nobody caught it."""
    return getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)


def watch_exit() -> None:
    """Note the exit code of ``sys.exit``, ``exit`` and ``SystemExit`` from now on.

    Python (3.11 to 3.14) tells exit handlers of an uncaught exception, but not of an exit
    code. Remove this when it does.
    """
    if sys.exit is _python_exit:
        sys.exit = _exit
    if is_worker():
        traceback.print_exc = _print_exc
    # The dictionary behind the read-only view; without one, codes are not noted.
    (attributes, *_) = gc.get_referents(SystemExit.__dict__) or [{}]
    member = attributes.get("code")
    if isinstance(member, MemberDescriptorType):
        attributes["code"] = _ExitCode(member)
        ctypes.pythonapi.PyType_Modified(ctypes.py_object(SystemExit))


def _print_exc(*args: Any, **options: Any) -> None:
    """As Python's; notes what ends a process of multiprocessing.

    Python 3.13 calls the exit handlers of such a process when the exception is gone.
    """
    if _ends_worker(sys._getframe(1)):
        _uncaught.append(sys.exception())
    _python_print_exc(*args, **options)


def _ends_worker(caller: FrameType) -> bool:
    process = sys.modules.get("multiprocessing.process")
    if process is None:
        return False
    runs_all: bool = caller.f_code is process.BaseProcess._bootstrap.__code__
    return runs_all


def _exit(status: Any = None, /) -> NoReturn:
    """Exit the interpreter by raising SystemExit(status)."""
    raise SystemExit(status)  # Python 3.11 itself would raise no instance


def find_error(earlier: BaseException | None) -> BaseException | None:
    """Find what ends the interpreter; None if nothing went wrong.

    Parameters
    ----------
    earlier
        What ``get_last_error`` returned when the run started.
    """
    error = get_last_error()
    # A prompt prints errors and continues.
    if hasattr(sys, "ps1") or sys.flags.interactive or error is earlier:
        error = None
    return error or next(iter(_uncaught), None)


def _again_after_interrupt(function: Callable[..., object], *args: object) -> None:
    """Call a function; one that Ctrl-C interrupts is called once more, before it is raised."""
    try:
        function(*args)
    except KeyboardInterrupt:
        _again_after_interrupt(function, *args)
        raise
