"""MLflow as this package sees it: the one module that imports it.

What can go wrong is told apart as delivery must: a row that MLflow refuses
(`RefusedError`), a run that is no longer there (`GoneError`), and everything else,
which may be over a minute later (`UnreachableError`). The fluent API is never used, so
no active run, tracking URI or variable of the user's changes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.metadata
import json
import os
import sqlite3
import sys
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa

from tracking.errors import TrackingError
from tracking.mlflow_store.template import alone, ensure_database
from tracking.mlflow_store.uris import sqlite_path, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_BATCH: Final = 1000
"""Metrics, params and tags of one call together."""

MAX_PARAMS: Final = 100
MAX_PARAM_LENGTH: Final = 6000
MAX_TAG_LENGTH: Final = 8000

HISTORY: Final = pa.schema(
    [
        pa.field("key", pa.string()),
        pa.field("time_ms", pa.int64()),
        pa.field("step", pa.int64()),
        pa.field("value", pa.float64()),
    ]
)

# Retries are delivery's own: with MLflow's seven one call blocks for minutes.
_DEFAULTS: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
}
_SQL: Final = "mlflow.store.tracking.sqlalchemy_store"
_REFUSALS: Final = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")


class RefusedError(TrackingError):
    """MLflow does not take what was sent, however often it is sent."""


class GoneError(TrackingError):
    """The run or experiment is not there, or in MLflow's bin.

    Attributes
    ----------
    is_binned
        Whether it can be restored there.
    """

    def __init__(self, message: str, *, is_binned: bool = False) -> None:
        super().__init__(message)
        self.is_binned = is_binned


class UnreachableError(TrackingError):
    """MLflow could not be reached, or could not do its work now."""


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class MlflowRun:
    """What MLflow knows of a run, its histories aside."""

    run_id: str
    experiment_id: str
    name: str
    status: str
    start_ms: int
    end_ms: int | None
    tags: dict[str, str]
    params: dict[str, str]
    keys: tuple[str, ...]


class StoreClient:
    """A store of MLflow's: a tracking server, or a database.

    Parameters
    ----------
    uri
        As `resolved_uri` gives it.
    cache
        Folder for prepared databases.

    Raises
    ------
    UnreachableError
        If it cannot be opened.
    """

    def __init__(self, uri: str, cache: Path) -> None:
        self.uri = uri
        path = sqlite_path(uri)
        with _translated():
            import_mlflow(_SQL if path else "mlflow")
            if path is None or path.exists():
                self._client = _client(uri)
                return
            version = importlib.metadata.version("mlflow")
            with alone(cache) as folder:
                ensure_database(path, folder, version, _build_database)
                self._client = _client(uri)  # makes the default experiment, too

    def experiment_id(self, name: str | None, id_: str | None = None) -> str:
        """Id of an experiment, made if need be; without a name MLflow's default one."""
        with _translated():
            if name is None:
                return id_ or "0"
            found = self._client.get_experiment_by_name(name)
            if found is None:
                with contextlib.suppress(RefusedError), _translated(exists=True):
                    return self._client.create_experiment(name)
                found = self._client.get_experiment_by_name(name)
        if found is None or found.lifecycle_stage != "active":
            raise GoneError(
                f"delivery: expected an active experiment in MLflow, got {name!r} in "
                "its bin. Restore it there, or delete it for good.",
                is_binned=True,
            )
        return found.experiment_id

    def find_runs(self, experiment_id: str, tag: str, value: str) -> list[MlflowRun]:
        """Runs in an experiment that have a tag, newest first, those in the bin not."""
        with _translated():
            runs = self._client.search_runs(
                [experiment_id], f"tags.`{tag}` = '{value}'", max_results=100
            )
        return [_seen(run) for run in runs]

    def run(self, run_id: str) -> MlflowRun:
        """State of a run.

        Raises
        ------
        GoneError
            If it is not there, or in MLflow's bin.
        """
        with _translated():
            run = self._client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            raise GoneError(
                f"delivery: expected an active run in MLflow, got {run_id} in its bin. "
                "Restore it there, or run 'harness sync' for a new one.",
                is_binned=True,
            )
        return _seen(run)

    def create_run(
        self, experiment_id: str, name: str, start_ms: int, tags: Mapping[str, str]
    ) -> MlflowRun:
        """Make a run."""
        with _translated():
            run = self._client.create_run(experiment_id, start_ms, dict(tags), name)
        return _seen(run)

    def send(
        self,
        run_id: str,
        points: Sequence[Point] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        """Send metrics, and tags after them; at most 1000 of both, 100 of tags."""
        from mlflow.entities import Metric, RunTag  # noqa: PLC0415 (slow)

        with _translated():
            self._client.log_batch(
                run_id,
                metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in points],
                tags=[RunTag(key, value) for key, value in (tags or {}).items()],
            )

    def send_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Send at most 100 params; one that MLflow has with another value fails all."""
        from mlflow.entities import Param  # noqa: PLC0415 (slow)

        with _translated():
            self._client.log_batch(
                run_id, params=[Param(key, value) for key, value in params.items()]
            )

    def send_artifact(self, run_id: str, file: Path, folder: str | None) -> None:
        """Upload a file into a folder of the run's artifacts, over what is there."""
        with _translated():
            self._client.log_artifact(run_id, str(file), folder)

    def send_input(
        self, run_id: str, dataset: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Note a dataset that the run used."""
        from mlflow.entities import (  # noqa: PLC0415 (slow)
            Dataset,
            DatasetInput,
            InputTag,
        )

        marks = [InputTag(key, value) for key, value in tags.items()]
        with _translated():
            self._client.log_inputs(run_id, [DatasetInput(Dataset(**dataset), marks)])

    def set_status(
        self, run_id: str, status: str, end_ms: int | None, name: str | None = None
    ) -> None:
        """Set a run's status, and its name if one is given."""
        with _translated():
            if end_ms is not None:
                self._client.set_terminated(run_id, status, end_ms)
                status = ""
            if status or name:
                self._client.update_run(run_id, status or None, name)

    def history(self, run_id: str) -> pa.Table:
        """All values of all metrics of a run, as `HISTORY` has them, in no order."""
        path = sqlite_path(self.uri)
        if path is not None:
            # Beside MLflow's own reading, which takes 40 us a point; let go of this
            # when MLflow reads in bulk. Another layout of the table is an error here.
            with contextlib.suppress(sqlite3.Error):
                return _read_sqlite(path, run_id)
        return self._read_by_key(run_id)

    def _read_by_key(self, run_id: str) -> pa.Table:
        """All values of a run's metrics by MLflow's own means."""
        with _translated():
            keys = self._client.get_run(run_id).data.metrics
            found = [
                (point.key, point.timestamp, point.step, point.value)
                for key in keys
                for point in self._client.get_metric_history(run_id, key)
            ]
        columns = list(zip(*found, strict=True)) or [()] * len(HISTORY)
        return pa.table([pa.array(c) for c in columns], HISTORY.names).cast(HISTORY)

    def artifacts(self, run_id: str, folder: str | None = None) -> dict[str, int]:
        """Size in bytes of each artifact of a run, by path."""
        found: dict[str, int] = {}
        with _translated():
            for item in self._client.list_artifacts(run_id, folder):
                if item.is_dir:
                    found |= self.artifacts(run_id, item.path)
                else:
                    found[item.path] = item.file_size or 0
        return found


def prepare_environment() -> None:
    """Set what MLflow reads from the environment, where the user has not.

    For a process of our own; telemetry is off unless the user turned it on.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)  # noqa: TID251 (before MLflow reads it)


def import_mlflow(module: str) -> None:
    """Import a module of MLflow's, which takes more than a second the first time.

    Without the garbage collector's rounds and without pandas, which MLflow can do
    without (mlflow-skinny has none), that is half of what it takes otherwise.
    """
    if module in sys.modules:
        return
    collecting = gc.isenabled()
    gc.disable()
    without_pandas = "pandas" not in sys.modules
    if without_pandas:
        sys.modules["pandas"] = None  # type: ignore[assignment]
    try:
        importlib.import_module(module)
    finally:
        if without_pandas:
            del sys.modules["pandas"]
        if collecting:
            gc.enable()


def _client(uri: str) -> MlflowClient:
    """Client of a store."""
    from mlflow import MlflowClient  # noqa: PLC0415 (slow)

    return MlflowClient(uri)


def _build_database(path: Path) -> None:
    """Make a database by MLflow's own means."""
    _client(sqlite_uri(path)).get_experiment("0")


def _read_sqlite(path: Path, run_id: str) -> pa.Table:
    """All values of a run's metrics from the database itself."""
    uri = f"file:{urllib.parse.quote(str(path))}?mode=ro"
    query = (
        "SELECT key, timestamp, step, CASE WHEN is_nan THEN NULL ELSE value END "
        "FROM metrics WHERE run_uuid = ?"
    )
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=60)) as database:
        rows = database.execute(query, (run_id,)).fetchall()
    columns = list(zip(*rows, strict=True)) or [()] * len(HISTORY)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, HISTORY, strict=True)]
    arrays[-1] = arrays[-1].fill_null(float("nan"))
    return pa.table(arrays, schema=HISTORY)


def _seen(run: Any) -> MlflowRun:
    """An MLflow run in our words."""
    info, data = run.info, run.data
    return MlflowRun(
        run_id=info.run_id,
        experiment_id=info.experiment_id,
        name=info.run_name or "",
        status=info.status,
        start_ms=info.start_time,
        end_ms=info.end_time,
        tags=dict(data.tags),
        params=dict(data.params),
        keys=tuple(data.metrics),
    )


@contextlib.contextmanager
def _translated(exists: bool = False) -> Iterator[None]:
    """Raise what goes wrong inside as one of this module's errors."""
    try:
        yield
    except (RefusedError, GoneError, UnreachableError):
        raise
    except Exception as error:  # drivers raise errors of their own
        code = getattr(error, "error_code", None)
        text = f"{type(error).__name__}: {error}"
        if code in _REFUSALS or (exists and code == "RESOURCE_ALREADY_EXISTS"):
            raise RefusedError(text) from error
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise GoneError(text) from error
        raise UnreachableError(text) from error


def as_json(value: object) -> str:
    """Compact JSON for a tag."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
