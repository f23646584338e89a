"""The process that takes a run to MLflow: ``python -m tracking.delivery RUN_PATH``.

It tails the journal, so the trainer neither waits for it nor knows how far it is, and
it goes on when the trainer is gone, however that ended. It ends by itself once all is
delivered, or once a server has not answered for a while after the trainer's end.

With ``--sync`` it delivers runs that have ended and compares all that MLflow has with
the journal; with ``--read FOLDER`` it only writes down what MLflow has. Both tell on
stdout what they did, a line of JSON for each run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from tracking.delivery.retry import GaveUpError
from tracking.delivery.state import DeliveryState
from tracking.delivery.summaries import write_summaries
from tracking.delivery.thinning import check_options
from tracking.delivery.worker import DeliveryWorker
from tracking.durable import hold_lock
from tracking.errors import TrackingError
from tracking.mlflow_store.client import StoreClient, prepare_environment
from tracking.mlflow_store.runs import RunResolver
from tracking.mlflow_store.uris import resolve_uri
from tracking.settings import Settings
from tracking.store import Manifest

NICENESS: Final = 10
LOCK_WAIT_S: Final = 10.0
MAX_LOG_BYTES: Final = 1 << 20


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the process; 0 if all is delivered, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tracking.delivery")
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_PATH")
    parser.add_argument("--sync", action="store_true")
    parser.add_argument("--read", type=Path, metavar="FOLDER")
    parser.add_argument("--patience", type=float, metavar="SECONDS")
    parser.add_argument("--lock-wait", type=float, default=LOCK_WAIT_S)
    options = parser.parse_args(arguments)
    settings = Settings.read()
    prepare_environment()
    report = sys.stdout
    sys.stdout = sys.stderr = _Redacting(sys.stderr, settings.redact)
    paths = [path.absolute() for path in options.runs]
    if options.read:
        return max(_read(path, options.read, settings, report) for path in paths)
    deliver = partial(_sync, report=report) if options.sync else _deliver
    return max(
        deliver(path, settings, options.patience, options.lock_wait) for path in paths
    )


def _deliver(
    path: Path, settings: Settings, patience_s: float | None, lock_wait_s: float
) -> int:
    """Deliver a run that is being written."""
    with _hold_run(path, lock_wait_s) as is_ours:
        if not is_ours:
            return 0
        worker = _make_worker(path, settings, patience_s, is_thorough=False)
        # Not before: the page is wanted soon, beside a trainer that takes all cores.
        return _run(worker, path, lambda: lower_priority(NICENESS), settings.redact)


def _sync(
    path: Path,
    settings: Settings,
    patience_s: float | None,
    lock_wait_s: float,
    report: Any,
) -> int:
    """Deliver what MLflow lacks of a run, and tell."""
    told: dict[str, Any] = {"run": path.name}
    code = 1
    with _hold_run(path, lock_wait_s) as is_ours:
        if is_ours:
            worker = _make_worker(path, settings, patience_s, is_thorough=True)
            code = _run(worker, path, lambda: lower_priority(0), settings.redact)
            told |= {"sent": worker.num_sent, "present": worker.num_present}
        state = DeliveryState.read(path) or DeliveryState()
        told |= {
            "phase": state.phase if is_ours else "busy",
            "error": state.error,
            "behind": state.behind,
            "flags": state.flags,
            "tracking_uri": state.tracking_uri,
            "experiment_id": state.experiment_id,
            "mlflow_run_id": state.mlflow_run_id,
            "page": state.page,
        }
    print(json.dumps(told), file=report, flush=True)
    return code


def _read(path: Path, folder: Path, settings: Settings, report: Any) -> int:
    """Write down what MLflow has of a run: a file of its metrics, and a line."""
    told: dict[str, Any] = {"run": path.name}
    code = 1
    try:
        resolver = _resolver(path, settings)
        run = resolver.find()
        if run is None:
            told["error"] = "no such run there"
        else:
            file = folder / f"{path.name}.arrow"
            history = resolver.remote.history(run.run_id)
            with pa.ipc.new_file(str(file), history.schema) as writer:
                writer.write_table(history)
            told |= {
                "mlflow_run_id": run.run_id,
                "experiment_id": run.experiment_id,
                "tracking_uri": resolver.uri,
                "status": run.status,
                "params": run.params,
                "tags": run.tags,
                "artifacts": resolver.remote.artifacts(run.run_id),
            }
            code = 0
    except (TrackingError, OSError) as error:
        told["error"] = settings.redact(str(error))
    print(json.dumps(told), file=report, flush=True)
    return code


def _run(
    worker: DeliveryWorker,
    path: Path,
    on_page: Callable[[], None],
    redact: Callable[[str], str],
) -> int:
    """Deliver, and write down what went wrong if something did."""
    try:
        worker.deliver(on_page)
    except GaveUpError:
        return 1
    except Exception as error:  # noqa: BLE001 (nobody watches this process)
        if not path.is_dir():  # the run was deleted
            return 1
        _log(path, redact(traceback.format_exc()))
        worker.state.phase = "gave up"
        worker.state.error = redact(f"{type(error).__name__}: {error}")
        worker.state.write(path)
        return 1
    return 0


def _make_worker(
    path: Path, settings: Settings, patience_s: float | None, *, is_thorough: bool
) -> DeliveryWorker:
    """Worker of a run."""
    resolver = _resolver(path, settings)
    options = check_options(resolver.manifest.delivery)
    return DeliveryWorker(
        path,
        resolver,
        patience_s=options.patience_s if patience_s is None else patience_s,
        is_thorough=is_thorough,
        write_summaries=write_summaries,
        redact=settings.redact,
        log=lambda text: _log(path, settings.redact(text)),
    )


def _resolver(path: Path, settings: Settings) -> RunResolver:
    """Resolver of a run: in the store of the environment, else where it was before."""
    manifest = Manifest.read(path)
    state = DeliveryState.read(path)
    before = (state and state.tracking_uri) or manifest.mlflow.get("tracking_uri")
    here = Path.cwd()
    started_in = Path(manifest.cwd)
    if settings.tracking_uri:
        uri = resolve_uri(here, settings.tracking_uri)
    else:
        uri = before or resolve_uri(started_in if started_in.is_dir() else here, None)
    if started_in.is_dir():
        os.chdir(started_in)  # a new experiment's artifacts lie below it
    return RunResolver(
        path,
        uri,
        lambda uri: StoreClient(uri, settings.cache),
        experiment_name=settings.experiment_name,
        experiment_id=settings.experiment_id,
        redact=settings.redact,
    )


def _hold_run(path: Path, wait_s: float) -> contextlib.AbstractContextManager[bool]:
    """Lock a run's delivery; gives False if another process keeps delivering it.

    A process whose trainer ended may be about to exit while the run is resumed, so this
    waits a little. If that process stays, it has seen the new trainer.
    """
    folder = path / "delivery"
    folder.mkdir(exist_ok=True)
    return hold_lock(folder / "lock", wait_s)


def lower_priority(niceness: int) -> None:
    """Leave the processor to others where they want it, and use less of it.

    A quarter of the time that MLflow takes for a batch is the garbage collector's, which
    looks through all that was imported again and again.
    """
    gc.freeze()
    gc.set_threshold(100_000, 20, 50)
    with contextlib.suppress(OSError):
        os.nice(niceness)


def _log(path: Path, text: str) -> None:
    """Add a line to the run's log, which does not grow without end."""
    file = path / "delivery" / "log.txt"
    with contextlib.suppress(OSError):
        if file.exists() and file.stat().st_size > MAX_LOG_BYTES:
            file.replace(file.with_name("log.old.txt"))
        with file.open("a", encoding="utf-8", errors="replace") as log:
            log.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {text.rstrip()}\n")


class _Redacting(io.TextIOBase):
    """A text stream that secrets do not get through."""

    def __init__(self, stream: Any, redact: Callable[[str], str]) -> None:
        super().__init__()
        self._stream = stream
        self._redact = redact

    def write(self, text: str) -> int:
        """Write a text without what must not be told."""
        self._stream.write(self._redact(text))
        return len(text)

    def flush(self) -> None:
        """Pass on what has been written."""
        self._stream.flush()


if __name__ == "__main__":
    sys.exit(main())
