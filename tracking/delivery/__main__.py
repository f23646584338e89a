"""The delivery process: ``python -m tracking.delivery --follow``.

It reads the journal while training writes it, so training neither waits for delivery
nor knows how far it is. It continues when training has ended, however that ended, and
exits when all is delivered, or when a server has not answered for a while.

With ``--follow`` the training process hands runs over on stdin (see ``service``). Else
one is on the command line, or each line of stdin is the path of one as JSON. With
``--sync`` it delivers runs that have ended, and compares all that MLflow has with the
journal. With ``--read FOLDER`` it only writes down what MLflow has. Both print one line
of JSON for each run to stdout.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import logging
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from tracking.delivery.log import configure_logging, log_to_file
from tracking.delivery.options import read_options
from tracking.delivery.process import (
    ask_for_handover,
    is_being_delivered,
    lock_path,
    outlive_sigterm,
)
from tracking.delivery.retry import GaveUpError
from tracking.delivery.service import DeliveryService, Request, SummaryProcess
from tracking.delivery.state import DeliveryState
from tracking.delivery.summaries import write_summaries
from tracking.delivery.sync import SyncResult
from tracking.delivery.worker import DeliveryWorker, lower_priority
from tracking.durable import hold_lock
from tracking.errors import DeliveryError, TrackingError
from tracking.mlflow_store.client import (
    StoreClient,
    UnreachableError,
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
_summaries = SummaryProcess()


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
    prepare_environment(options.patience if options.read else None)
    options.silent = {}
    options.here = Path.cwd()
    options.is_hurried = lambda: options.sync
    try:
        if options.follow:
            return _follow(settings, options)
        if options.summaries:
            return _write_summaries()
        runs = _list_runs(options)
        if options.read:
            return max((_read(run, settings, options) for run in runs), default=0)
        return max((_deliver(run, settings, options)[0] for run in runs), default=0)
    except Exception:  # noqa: BLE001 (the default message would show secrets)
        sys.stderr.write(settings.redact(traceback.format_exc()))
        return 1


def _list_runs(options: argparse.Namespace) -> Iterator[Path]:
    """Return the run of the command line, or those of stdin as they are named."""
    if options.run is not None:
        return iter([options.run.absolute()])
    return (Path(json.loads(line)) for line in sys.stdin)


def _follow(settings: Settings, options: argparse.Namespace) -> int:
    """Deliver the runs that the training process names, until it has ended."""
    options.lock_wait = None
    reports = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no report

    def deliver(request: Request) -> Callable[[], None] | None:
        with _writing_errors(settings):
            code, worker = _deliver(request.run, settings, options, request)
            if code == 0 and worker is not None:
                return lambda: _summarize(worker, settings)
        return None

    service = DeliveryService(deliver, requests=0, reports=reports)
    options.is_hurried = lambda: not service.is_training
    service.serve()
    _summaries.close()
    return 0


@contextlib.contextmanager
def _writing_errors(settings: Settings) -> Iterator[None]:
    """Write what the block raises to stderr: nobody watches this process."""
    try:
        yield
    except Exception:  # noqa: BLE001 (the default message would show secrets)
        sys.stderr.write(settings.redact(traceback.format_exc()))


def _deliver(
    path: Path,
    settings: Settings,
    options: argparse.Namespace,
    request: Request | None = None,
) -> tuple[int, DeliveryWorker | None]:
    """Deliver a run, unless another process does; with ``--sync``, report it.

    Summaries follow at once if there is no request, for which other runs may be waiting.
    """
    worker = None
    try:
        code, result, worker = _deliver_locked(path, settings, options, request)
    except OSError as error:  # its folder cannot be used; the other runs' can
        code = 1
        result = _describe(path, phase="gave up", error=settings.redact(str(error)))
    if options.sync:
        _report(dataclasses.asdict(result))
    return code, worker


def _summarize(worker: DeliveryWorker, settings: Settings) -> None:
    """Summarize a run that was delivered, unless it is deleted or delivered again."""
    path = worker.run_path
    if not path.is_dir():
        return
    with _writing_errors(settings), hold_lock(lock_path(path), 0.0) as is_held:
        if is_held:
            with log_to_file(path, settings.redact):
                worker.send_summaries()


def _describe(path: Path, **changes: Any) -> SyncResult:
    """Result of a run that nothing is known of but its last state."""
    state = DeliveryState.read_or_none(path) or DeliveryState()
    return SyncResult.from_state(path.name, state, **changes)


def _deliver_locked(
    path: Path, settings: Settings, options: argparse.Namespace, request: Request | None
) -> tuple[int, SyncResult, DeliveryWorker | None]:
    """Deliver a run while holding its lock: exit code, what to report, and by whom."""
    lock = lock_path(path)
    lock.parent.mkdir(exist_ok=True)
    if lock.parent.is_symlink():
        raise NotADirectoryError(
            f"run {path.name!r}: expected a folder {lock.parent.name!r} in it, got a "
            "link, which may lead anywhere. Remove it."
        )
    asking = contextlib.ExitStack()
    if options.sync and is_being_delivered(path):
        asking.enter_context(ask_for_handover(path))
    with asking, hold_lock(lock, options.lock_wait) as is_held:
        if not is_held:
            return int(options.sync), _describe(path, phase="busy"), None
        with log_to_file(path, settings.redact):
            return _run_worker(path, settings, options, request)


def _run_worker(
    path: Path, settings: Settings, options: argparse.Namespace, request: Request | None
) -> tuple[int, SyncResult, DeliveryWorker | None]:
    """Deliver a run: exit code, what to report, and by whom."""
    worker = None
    code = 1
    changes: dict[str, Any] = {}
    try:
        worker = _make_worker(path, settings, options, request)
        # Not before the page exists: it is wanted soon, and training may use all cores.
        worker.deliver(
            on_page=lambda: lower_priority(0 if options.is_hurried() else NICENESS)
        )
        code = 0
        if request is None:
            worker.send_summaries()
    except GaveUpError:
        pass
    except Exception as error:  # noqa: BLE001 (nobody watches this process)
        reason = settings.redact(f"{type(error).__name__}: {error}")
        _record_failure(path, reason)
        changes = {"phase": "gave up", "error": reason}
    if worker is None:
        return code, _describe(path, **changes), None
    changes |= {"sent": worker.num_sent, "present": worker.num_present}
    # Its own state: the file is an earlier one where the disk is full.
    return code, SyncResult.from_state(path.name, worker.state, **changes), worker


def _record_failure(path: Path, error: str) -> None:
    """Log an unexpected error, and show it in the run's state."""
    if not path.is_dir():  # the run was deleted
        return
    _log.exception("giving up")
    state = DeliveryState.read_or_none(path) or DeliveryState()
    state.phase, state.error = "gave up", error
    state.write(path)


def _write_summaries() -> int:
    """Write the summaries of the runs named on stdin; this process may die of it."""
    with contextlib.suppress(OSError):  # of all processes, it is the least needed
        Path("/proc/self/oom_score_adj").write_text("1000")
    for line in sys.stdin:
        _report({"files": [str(f) for f in write_summaries(Path(json.loads(line)))]})
    return 0


def _read(path: Path, settings: Settings, options: argparse.Namespace) -> int:
    """Write down what MLflow has of a run: its points into a file, the rest to stdout."""
    report: dict[str, Any] = {"run": path.name}
    code = 1
    began = time.monotonic()
    try:
        resolver = _make_resolver(path, settings, options.here)
        if resolver.uri in options.silent:  # each run would wait for it again
            raise options.silent[resolver.uri]
        run = resolver.find(_known_id(path, resolver))
        if run is None:
            report["error"] = "no such run there"
        else:
            history = resolver.client.history(run.run_id)
            target = options.read / f"{path.name}.arrow"
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
            code = 0
    except (TrackingError, OSError) as error:
        report["error"] = settings.redact(str(error))
        patience_s = options.patience or math.inf
        if (
            isinstance(error, UnreachableError)
            and time.monotonic() > began + patience_s
        ):
            options.silent[resolver.uri] = error
    except Exception as error:  # noqa: BLE001 (the other runs can be read)
        report["error"] = settings.redact(f"{type(error).__name__}: {error}")
    _report(report)
    return code


def _report(values: dict[str, Any]) -> None:
    """Print a line of JSON for the process that started this one."""
    sys.stdout.write(f"{json.dumps(values)}\n")
    sys.stdout.flush()


def _make_worker(
    path: Path, settings: Settings, options: argparse.Namespace, request: Request | None
) -> DeliveryWorker:
    is_new = request is not None and request.is_new
    resolver = _make_resolver(path, settings, options.here, is_new=is_new)
    patience_s = options.patience
    if patience_s is None:
        patience_s = read_options(resolver.manifest).patience_s
    return DeliveryWorker(
        path,
        resolver,
        patience_s=patience_s,
        is_sync=options.sync,
        write_summaries=_summaries.write,
        redact=settings.redact,
        pause=time.sleep if request is None else request.pause,
    )


def _make_resolver(
    path: Path, settings: Settings, here: Path, *, is_new: bool = False
) -> RunResolver:
    """Resolver for the store of the environment, else the one that was used before.

    The one of a project that was moved or copied is the one at its new place. Relative
    addresses start from ``here``.
    """
    manifest = Manifest.read(path)
    state = DeliveryState.read_or_none(path)
    before = (state and state.tracking_uri) or manifest.mlflow.get("tracking_uri")
    started_in = find_start_folder(path, manifest)
    if settings.tracking_uri:
        uri = resolve_uri(here, settings.tracking_uri)
    elif before:
        lay_in = (state and state.run_path) or manifest.path or str(path)
        uri = relocate(before, Path(lay_in), path)
        _check_place(path, uri)
    else:
        uri = resolve_uri(started_in if started_in.is_dir() else here, None)
    if started_in.is_dir():
        os.chdir(started_in)  # the artifacts of a new experiment are stored below it
    return RunResolver(
        path,
        uri,
        lambda uri: StoreClient(uri, settings.cache),
        experiment_name=settings.experiment_name,
        experiment_id=settings.experiment_id,
        may_exist=not is_new or state is not None,
        redact=settings.redact,
        redact_address=settings.redact_address,
    )


def _check_place(run_path: Path, uri: str) -> None:
    """Refuse a store whose folder is gone; it would be made anew, and empty."""
    store = local_path(uri)
    if store is not None and not store.parent.is_dir():
        raise DeliveryError(
            f"run {run_path.name!r}: expected its store at {str(store)!r}, got no such "
            "folder. If the project was moved, set MLFLOW_TRACKING_URI to the store at "
            "its new place, e.g. sqlite:///mlflow.db."
        )


def _known_id(path: Path, resolver: RunResolver) -> str | None:
    """Id of the MLflow run that an earlier delivery to this store used."""
    state = DeliveryState.read_or_none(path)
    is_same_store = state is not None and state.tracking_uri == resolver.uri
    return state.mlflow_run_id if state and is_same_store else None


if __name__ == "__main__":
    sys.exit(main())
