"""The delivery process: ``python -m tracking.delivery --follow``.

It reads the journal while training writes it, so training neither waits for delivery
nor knows how far it is. It continues when training has ended, however that ended, and
exits when all is delivered, or when a server has not answered for a while.

With ``--follow`` the training process hands runs over on stdin (see ``service``). Without a
run on the command line, it imports MLflow before the first one comes. Else a run is on the
command line, or each line of stdin is the path of one as JSON. With ``--sync`` it delivers
runs that have ended, and compares all that MLflow has with the journal. With ``--read
FOLDER`` it only writes down what MLflow has. Both print one line of JSON for each run to
stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from tracking.delivery.log import configure_logging, log_to_file
from tracking.delivery.options import read_options
from tracking.delivery.process import (
    ask_for_handover,
    is_being_delivered,
    lock_path,
    open_log,
    outlive_sigterm,
    set_group_niceness,
)
from tracking.delivery.retry import GaveUpError
from tracking.delivery.service import DeliveryService, Request, SummaryProcess
from tracking.delivery.state import DeliveryState
from tracking.delivery.sync import SyncResult
from tracking.delivery.worker import DeliveryWorker, lower_priority
from tracking.durable import hold_lock
from tracking.errors import DeliveryError, TrackingError
from tracking.mlflow_store.client import (
    StoreClient,
    UnreachableError,
    import_for,
    limit_requests,
    name_error,
    prepare_environment,
)
from tracking.mlflow_store.runs import RunResolver
from tracking.mlflow_store.uris import local_path, relocate, resolve_uri
from tracking.settings import Settings
from tracking.store import Manifest, find_start_folder

LOCK_WAIT_S: Final = 10.0
"""A process whose training has ended may be about to exit while the run is resumed."""

NICENESS: Final = 10

_log = logging.getLogger("tracking.delivery")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the process; return 0 if all is delivered, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tracking.delivery")
    parser.add_argument("run", type=Path, nargs="?", metavar="RUN_PATH")
    parser.add_argument("--follow", action="store_true")
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--read", type=Path, metavar="FOLDER")
    parser.add_argument("--summaries", action="store_true")
    parser.add_argument("--patience", type=float, metavar="SECONDS")
    parser.add_argument("--lock-wait", type=float, default=LOCK_WAIT_S)
    options = parser.parse_args(arguments)
    if not (options.sync or options.read or options.summaries):
        outlive_sigterm()
    settings = Settings.read()
    configure_logging()
    prepare_environment()
    if options.read:
        limit_requests(options.patience)
    program = Program(options, settings, Path.cwd())
    with program.writing_errors():
        if options.follow:
            return program.follow()
        if options.summaries:
            return _write_summaries()
        # The run of the command line, or those of stdin as they are named.
        paths: Iterable[Path] = (Path(json.loads(line)) for line in sys.stdin)
        if options.run is not None:
            paths = [options.run.absolute()]
        do = program.read if options.read else program.deliver
        return max(map(do, paths), default=0)
    return 1


@dataclass
class Program:
    """What one call of the program does with runs.

    Parameters
    ----------
    options
        Of the command line.
    here
        Working folder at the start; relative addresses of stores start from it.
    """

    options: argparse.Namespace
    settings: Settings
    here: Path
    _summaries: SummaryProcess = field(default_factory=SummaryProcess)
    _service: DeliveryService | None = None
    _silent: dict[str, UnreachableError] = field(default_factory=dict)

    @contextlib.contextmanager
    def writing_errors(self) -> Iterator[None]:
        """Write what the block raises to stderr: nobody watches this process."""
        try:
            yield
        except Exception:  # noqa: BLE001 (the default message would show secrets)
            sys.stderr.write(self.settings.redact(traceback.format_exc()))

    def follow(self) -> int:
        """Deliver the runs that the training process names, until it has ended."""
        self.options.lock_wait = None
        reports = os.dup(1)
        os.dup2(2, 1)  # what a library prints is no report
        if self.options.run is None:
            set_group_niceness(os.getpid(), NICENESS)  # nothing waits for it yet
            threading.Thread(target=self._import_mlflow, daemon=True).start()

        def deliver(request: Request) -> Callable[[], None] | None:
            if self.options.run is None:
                self._begin_first(request.run)
            with self.writing_errors():
                code, _, worker = self._deliver(request.run, request)
                if code == 0 and worker is not None:
                    return lambda: self._summarize(worker)
            return None

        self._service = DeliveryService(deliver, requests=0, reports=reports)
        self._service.serve()
        self._summaries.close()
        return 0

    def _import_mlflow(self) -> None:
        pa.array([0])  # Arrow looks for pandas now, while there is none
        with contextlib.suppress(Exception):  # a run's delivery says why
            import_for(resolve_uri(self.here, self.settings.tracking_uri))

    def _begin_first(self, path: Path) -> None:
        """Continue as a process does that was started with this run."""
        self.options.run = path
        set_group_niceness(os.getpid(), 0)
        with contextlib.suppress(OSError), open_log(path) as errors:
            os.dup2(errors.fileno(), 1)
            os.dup2(errors.fileno(), 2)

    def deliver(self, path: Path) -> int:
        """Deliver a run with its summaries; with ``--sync``, report it."""
        code, result, _ = self._deliver(path, None)
        if self.options.sync:
            _report(asdict(result))
        return code

    def _deliver(
        self, path: Path, request: Request | None
    ) -> tuple[int, SyncResult, DeliveryWorker | None]:
        """Deliver a run, unless another process does: exit code, report, and by whom."""
        lock = lock_path(path)
        try:
            lock.parent.mkdir(exist_ok=True)
            if lock.parent.is_symlink():
                raise NotADirectoryError(
                    f"run {path.name!r}: expected a folder {lock.parent.name!r} in it, "
                    "got a link, which may lead anywhere. Remove it."
                )
            asking = contextlib.ExitStack()
            if self.options.sync and is_being_delivered(path):
                asking.enter_context(ask_for_handover(path))
            with asking, hold_lock(lock, self.options.lock_wait) as is_held:
                if not is_held:
                    return int(self.options.sync), _describe(path, phase="busy"), None
                with log_to_file(path, self.settings.redact):
                    return self._run_worker(path, request)
        except OSError as error:  # its folder cannot be used; the other runs' can
            reason = self.settings.redact(str(error))
            return 1, _describe(path, phase="gave up", error=reason), None

    def _run_worker(
        self, path: Path, request: Request | None
    ) -> tuple[int, SyncResult, DeliveryWorker | None]:
        """Deliver a run, as ``_deliver``.

        Summaries follow at once if there is no request, for which other runs may be waiting.
        """
        worker = None
        code = 1
        changes: dict[str, Any] = {}
        try:
            worker = self._make_worker(path, request)
            if self.options.sync:  # each run waits for a silent server
                limit_requests(self.options.patience)
            worker.deliver(on_page=self._begin_to_send)
            code = 0
            if request is None:
                worker.send_summaries()
        except GaveUpError:
            pass
        except Exception as error:  # noqa: BLE001 (nobody watches this process)
            reason = self.settings.redact(name_error(error))
            _record_failure(path, reason)
            changes = {"phase": "gave up", "error": reason}
        if worker is None:
            return code, _describe(path, **changes), None
        changes |= {"sent": worker.num_sent, "present": worker.num_present}
        # Its own state: the file is an earlier one where the disk is full.
        return code, SyncResult.from_state(path.name, worker.state, **changes), worker

    def _begin_to_send(self) -> None:
        """Give the server time, which has answered, and let training go first.

        Training may use all cores, so this is not before its page exists.
        """
        if self.options.sync:
            limit_requests()
        is_training = self._service is None or self._service.is_training
        lower_priority(NICENESS if is_training and not self.options.sync else 0)

    def _summarize(self, worker: DeliveryWorker) -> None:
        """Summarize a run that was delivered, unless it is deleted or delivered again."""
        path = worker.run_path
        if not path.is_dir():
            return
        with self.writing_errors(), hold_lock(lock_path(path), 0.0) as is_held:
            if is_held:
                with log_to_file(path, self.settings.redact):
                    worker.send_summaries()

    def _make_worker(self, path: Path, request: Request | None) -> DeliveryWorker:
        is_new = request is not None and request.is_new
        resolver = self.make_resolver(path, is_new=is_new)
        patience_s = self.options.patience
        if patience_s is None:
            patience_s = read_options(resolver.manifest).patience_s
        return DeliveryWorker(
            path,
            resolver,
            patience_s=patience_s,
            is_sync=self.options.sync,
            write_summaries=self._summaries.write,
            pause=time.sleep if request is None else request.pause,
        )

    def make_resolver(self, path: Path, *, is_new: bool = False) -> RunResolver:
        """Make the resolver for the store of the environment, else the one used before.

        The one of a project that was moved or copied is the one at its new place.
        """
        settings = self.settings
        manifest = Manifest.read(path)
        state = DeliveryState.read_or_none(path)
        before = (state and state.tracking_uri) or manifest.mlflow.get("tracking_uri")
        started_in = find_start_folder(path, manifest)
        if settings.tracking_uri:
            uri = resolve_uri(self.here, settings.tracking_uri)
        elif before:
            lay_in = (state and state.run_path) or manifest.path or str(path)
            uri = relocate(before, Path(lay_in), path)
            _check_place(path, uri)
        else:
            uri = resolve_uri(started_in if started_in.is_dir() else self.here, None)
        if started_in.is_dir():
            os.chdir(
                started_in
            )  # the artifacts of a new experiment are stored below it
        return RunResolver(
            path,
            uri,
            lambda uri: StoreClient(uri, settings.cache),
            settings,
            may_exist=not is_new or state is not None,
        )

    def read(self, path: Path) -> int:
        """Write down what MLflow has of a run: its points into a file, the rest to stdout."""
        report: dict[str, Any] = {"run": path.name}
        began = time.monotonic()
        try:
            resolver = self.make_resolver(path)
            if resolver.uri in self._silent:  # each run would wait for it again
                raise self._silent[resolver.uri]
            state = DeliveryState.read_or_new(path, resolver.uri)
            run = resolver.find(state.mlflow_run_id)
            if run is None:
                report["error"] = "no such run there"
            else:
                history = resolver.client.history(run.run_id)
                target = self.options.read / f"{path.name}.arrow"
                with pa.ipc.new_file(target, history.schema) as file:
                    file.write_table(history)
                report |= {
                    "mlflow_run_id": run.run_id,
                    "experiment_id": run.experiment_id,
                    "tracking_uri": resolver.uri,
                    "status": run.status,
                    "params": run.params,
                    "tags": run.tags,
                    "artifacts": resolver.client.artifacts(run.run_id),
                }
        except Exception as error:  # noqa: BLE001 (the other runs can be read)
            is_clear = isinstance(error, TrackingError | OSError)
            text = str(error) if is_clear else name_error(error)
            report["error"] = self.settings.redact(text)
            waited_s = time.monotonic() - began
            if isinstance(error, UnreachableError) and waited_s > (
                self.options.patience or math.inf
            ):
                self._silent[resolver.uri] = error
        _report(report)
        return int("error" in report)


def _describe(path: Path, **changes: Any) -> SyncResult:
    """Result of a run that nothing is known of but its last state."""
    return SyncResult.from_state(path.name, DeliveryState.read_or_new(path), **changes)


def _record_failure(path: Path, error: str) -> None:
    """Log an unexpected error, and show it in the run's state."""
    if not path.is_dir():  # the run was deleted
        return
    _log.exception("giving up")
    state = DeliveryState.read_or_new(path)
    state.phase, state.error = "gave up", error
    state.write(path)


def _write_summaries() -> int:
    """Write the summaries of the runs named on stdin; this process may die of it."""
    from tracking.delivery.summaries import write_summaries  # noqa: PLC0415 (only here)

    with contextlib.suppress(OSError):  # of all processes, it is the least needed
        Path("/proc/self/oom_score_adj").write_text("1000")
    for line in sys.stdin:
        _report({"files": [str(f) for f in write_summaries(Path(json.loads(line)))]})
    return 0


def _report(values: dict[str, Any]) -> None:
    """Print a line of JSON for the process that started this one."""
    sys.stdout.write(f"{json.dumps(values)}\n")
    sys.stdout.flush()


def _check_place(run_path: Path, uri: str) -> None:
    """Refuse a store whose folder is gone; it would be made anew, and empty."""
    store = local_path(uri)
    if store is not None and not store.parent.is_dir():
        raise DeliveryError(
            f"run {run_path.name!r}: expected its store at {str(store)!r}, got no such "
            "folder. If the project was moved, set MLFLOW_TRACKING_URI to the store at "
            "its new place, e.g. sqlite:///mlflow.db."
        )


if __name__ == "__main__":
    sys.exit(main())
