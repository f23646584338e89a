"""Client of an MLflow store. This is the only module that imports MLflow.

Every failure becomes one of three errors: MLflow refuses what was sent
(`RefusedError`), the run or experiment does not exist any more (`GoneError`), or
anything else, which may work when tried again (`UnreachableError`). The fluent API is
never used, so the user's active run, tracking URI and environment do not change.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import sqlite3
import tempfile
import threading
import urllib.parse
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pyarrow as pa

from tracking.errors import TrackingError
from tracking.mlflow_store.database import create_database, lock_cache
from tracking.mlflow_store.imports import import_mlflow
from tracking.mlflow_store.uris import local_path, sqlite_path, sqlite_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

MAX_BATCH: Final = 1000
"""Metrics, params and tags together in one call."""

MAX_PARAMS: Final = 100
MAX_PARAM_LENGTH: Final = 6000
MAX_TAG_LENGTH: Final = 8000
MAX_EXPERIMENT_NAME: Final = 256

HISTORY: Final = pa.schema(
    [
        pa.field("key", pa.dictionary(pa.int32(), pa.string())),
        pa.field("time_ms", pa.int64()),
        pa.field("step", pa.int64()),
        pa.field("value", pa.float64()),
    ]
)

# Delivery retries by itself: with MLflow's seven retries one call blocks for minutes.
_DEFAULTS: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_TIMEOUT: Final = "MLFLOW_HTTP_REQUEST_TIMEOUT"
_HAS_TIMEOUT: Final = bool(os.environ.get(_TIMEOUT))  # noqa: TID251 (MLflow's own)
_LOCKS: Final[defaultdict[Path, threading.RLock]] = defaultdict(threading.RLock)
"""A database takes one writer at a time and lets others fail after some seconds."""

_READERS: Final = 8
"""Requests at a time to read the metrics of a run from a server; each has one metric."""

_PAGE: Final = 1 << 16
"""Points that are read at a time from a database."""

_SQL: Final = "mlflow.store.tracking.sqlalchemy_store"
_REFUSALS: Final = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "MALFORMED_REQUEST")


class RefusedError(TrackingError):
    """MLflow refuses what was sent; trying again does not help."""


class GoneError(TrackingError):
    """The run or experiment does not exist, or is deleted.

    Attributes
    ----------
    is_restorable
        Whether it is only marked as deleted and can be restored in MLflow.
    """

    def __init__(self, message: str, *, is_restorable: bool = False) -> None:
        super().__init__(message)
        self.is_restorable = is_restorable


class UnreachableError(TrackingError):
    """MLflow did not answer, or failed; trying again may help."""


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    time_ms: int
    step: int


@dataclass(frozen=True)
class MlflowRun:
    """A run as MLflow has it, without the histories of its metrics."""

    run_id: str
    experiment_id: str
    status: str
    end_ms: int | None
    tags: dict[str, str]
    params: dict[str, str]


class StoreClient:
    """Client of one MLflow store: a tracking server or a database.

    Parameters
    ----------
    cache
        Folder for prepared databases.

    Raises
    ------
    UnreachableError
        If the store cannot be opened.
    """

    def __init__(self, uri: str, cache: Path) -> None:
        self.uri = uri
        self._artifact_roots: dict[str, str] = {}
        self._checked_roots: set[str] = set()
        path = sqlite_path(uri)
        self._lock = contextlib.nullcontext() if path is None else _LOCKS[path]
        with self._call():
            import_for(uri)
            if path is None or path.exists():
                self._client = _open_client(uri)
                return
            version = importlib.metadata.version("mlflow")
            with lock_cache(cache) as folder:
                create_database(path, folder, version, _migrate)
                self._client = _open_client(uri)  # makes the default experiment, too

    @contextlib.contextmanager
    def _call(self, *, exists: bool = False) -> Iterator[None]:
        """Call MLflow inside the block: one thread at a time if it is a database."""
        with self._lock, _translate_errors(exists):
            yield

    def experiment_id(self, name: str | None, id_: str | None = None) -> str:
        """Id of an experiment, created if needed.

        Without a name: ``id_``, or else MLflow's default experiment.
        """
        if name is None:
            return id_ or "0"
        name = fit_experiment_name(name)
        with self._call():
            found = self._client.get_experiment_by_name(name)
            if found is None:
                try:
                    with self._call(exists=True):
                        return self._client.create_experiment(name)
                except RefusedError as error:  # unless another process made it
                    found = self._client.get_experiment_by_name(name)
                    if found is None:
                        raise RefusedError(
                            f"delivery: expected an experiment's name that MLflow takes, "
                            f"got {name!r}: {error}. Start the run with another one."
                        ) from error
        if found.lifecycle_stage != "active":
            raise GoneError(
                f"delivery: expected an active experiment in MLflow, got {name!r}, which "
                "is deleted. Restore it there, or delete it permanently.",
                is_restorable=True,
            )
        return found.experiment_id

    def find_runs(self, experiment_id: str, tag: str, value: str) -> list[MlflowRun]:
        """Active runs of an experiment that have a tag, newest first."""
        operator, pattern = "=", value
        if "'" in value:  # a filter cannot quote it: any letter matches at its place
            operator, pattern = "LIKE", value.replace("'", "_")
        with self._call():
            runs = self._client.search_runs(
                [experiment_id], f"tags.`{tag}` {operator} '{pattern}'", max_results=100
            )
        return [self._take(run) for run in runs if run.data.tags.get(tag) == value]

    def run(self, run_id: str) -> MlflowRun:
        """Read a run.

        Raises
        ------
        GoneError
            If it does not exist, or is deleted.
        """
        with self._call():
            run = self._client.get_run(run_id)
        if run.info.lifecycle_stage != "active":
            raise GoneError(
                f"delivery: expected an active run in MLflow, got {run_id}, which is "
                "deleted. Restore it there, or run 'harness sync' for a new one.",
                is_restorable=True,
            )
        return self._take(run)

    def create_run(
        self, experiment_id: str, name: str, start_ms: int, tags: Mapping[str, str]
    ) -> MlflowRun:
        """Create a run."""
        with self._call():
            run = self._client.create_run(experiment_id, start_ms, dict(tags), name)
        return self._take(run)

    def _take(self, run: Any) -> MlflowRun:
        """Convert a run of MLflow's, and remember where its artifacts are."""
        info, data = run.info, run.data
        self._artifact_roots[info.run_id] = info.artifact_uri
        return MlflowRun(
            run_id=info.run_id,
            experiment_id=info.experiment_id,
            status=info.status,
            end_ms=info.end_time,
            tags=dict(data.tags),
            params=dict(data.params),
        )

    def send(
        self,
        run_id: str,
        points: Sequence[Point] = (),
        tags: Mapping[str, str] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """Send params, then metrics, then tags: at most 1000, of them 100 params, 100 tags.

        All fail if MLflow has one of the params with another value.
        """
        from mlflow.entities import Metric, Param, RunTag  # noqa: PLC0415 (slow)

        with self._call():
            self._client.log_batch(
                run_id,
                metrics=[Metric(p.key, p.value, p.time_ms, p.step) for p in points],
                params=[Param(key, value) for key, value in (params or {}).items()],
                tags=[RunTag(key, value) for key, value in (tags or {}).items()],
            )

    def send_artifact(self, run_id: str, file: Path, folder: str | None) -> None:
        """Upload a file into a folder of the run's artifacts; replace an existing one."""
        with _translate_errors():  # a large file keeps nobody waiting
            self._check_artifact_root(run_id)
            root = self._artifact_roots.get(run_id)
            if root is None or self.uri.startswith(("databricks", "uc")):
                self._client.log_artifact(run_id, str(file), folder)
            else:  # the client would read the run to find its folder
                _open_artifacts(root, self.uri).log_artifact(str(file), folder)

    def _check_artifact_root(self, run_id: str) -> None:
        """Refuse to make the folder of a project anew that was moved with its store.

        MLflow (3.17) keeps the absolute path of ``mlruns/EXPERIMENT/RUN/artifacts``.
        """
        if local_path(self.uri) is None or run_id in self._checked_roots:
            return
        if run_id not in self._artifact_roots:
            self._take(self._client.get_run(run_id))
        root = self._artifact_roots[run_id]
        path = local_path(root) if root.startswith("file:") else Path(root)
        is_local = urllib.parse.urlsplit(root).scheme in ("", "file")
        if is_local and path and not [*path.parents][:4][-1].is_dir():
            raise RefusedError(
                f"delivery: expected the folder of artifacts {str(path)!r}, got no such "
                "project. It was moved, and MLflow has its former place."
            )
        self._checked_roots.add(run_id)

    def send_model(
        self,
        run_id: str,
        experiment_id: str,
        name: str,
        folder: Path,
        step: int,
        complete: Callable[[str, str], None],
    ) -> str:
        """Log a folder as a model of a run; returns the model's id.

        Parameters
        ----------
        complete
            Called with the id and the place of the model before the folder is uploaded.
        """
        from mlflow.entities import LoggedModelOutput  # noqa: PLC0415 (slow)

        with _translate_errors():
            self._check_artifact_root(run_id)
            model = self._client.create_logged_model(experiment_id, name, run_id)
            model_id: str = model.model_id
            complete(model_id, model.artifact_location)
            self._client.log_model_artifacts(model_id, str(folder))
            self._client.finalize_logged_model(model_id, "READY")
            self._client.log_outputs(run_id, [LoggedModelOutput(model_id, step)])
        return model_id

    def send_input(
        self, run_id: str, dataset: Mapping[str, str], tags: Mapping[str, str]
    ) -> None:
        """Add a data set to the run's inputs."""
        from mlflow import entities  # noqa: PLC0415 (slow)

        input_tags = [entities.InputTag(key, value) for key, value in tags.items()]
        used = entities.DatasetInput(entities.Dataset(**dataset), input_tags)
        with self._call():
            self._client.log_inputs(run_id, [used])

    def set_status(
        self, run_id: str, status: str, end_ms: int | None, name: str | None = None
    ) -> None:
        """Set a run's status, and its name if ``name`` is given."""
        with self._call():
            if end_ms is not None:
                self._client.set_terminated(run_id, status, end_ms)
                status = ""
            if status or name:
                self._client.update_run(run_id, status or None, name)

    def history(self, run_id: str) -> pa.Table:
        """Read all points of a run, in any order, as a table with the schema `HISTORY`."""
        path = sqlite_path(self.uri)
        if path is not None:
            # MLflow's own client takes 40 us a point. Remove this when MLflow reads in
            # bulk. If a later version changes the table, sqlite raises an error here.
            with contextlib.suppress(sqlite3.Error):
                return _read_sqlite(path, run_id)
        return self._read_by_key(run_id)

    def _read_by_key(self, run_id: str) -> pa.Table:
        """Read all points with MLflow's client, which has a call for one key only."""
        with self._call():
            keys = list(self._client.get_run(run_id).data.metrics)
            read = functools.partial(self._client.get_metric_history, run_id)
            with ThreadPoolExecutor(_READERS) as pool:
                tables = [_as_table(points) for points in pool.map(read, keys)]
        return _concat(tables)

    def artifacts(self, run_id: str, folder: str | None = None) -> dict[str, int]:
        """Size in bytes of each artifact of a run, by path."""
        found: dict[str, int] = {}
        with self._call():
            for item in self._client.list_artifacts(run_id, folder):
                if item.is_dir:
                    found |= self.artifacts(run_id, item.path)
                else:
                    found[item.path] = item.file_size or 0
        return found


def fit_experiment_name(name: str) -> str:
    """Shorten an experiment's name that is too long for MLflow; the same each time."""
    if len(name) <= MAX_EXPERIMENT_NAME:
        return name
    digest = hashlib.sha256(name.encode(errors="replace")).hexdigest()[:8]
    return f"{name[: MAX_EXPERIMENT_NAME - 9]}-{digest}"


def limit_requests(timeout_s: float | None = None) -> None:
    """Set how long a server may take for an answer from now on, unless the user has set it.

    Only for the delivery process.

    Parameters
    ----------
    timeout_s : seconds
        For one request; None: 30 s.
    """
    if timeout_s is None:
        timeout_s = 30.0
    if not _HAS_TIMEOUT:  # MLflow takes whole seconds, for each request
        seconds = min(max(1, timeout_s), 86_400)  # it may be infinite
        os.environ[_TIMEOUT] = f"{seconds:.0f}"  # noqa: TID251 (MLflow reads it)


def import_for(uri: str) -> None:
    """Import what the client of a store needs, which takes more than a second."""
    import_mlflow(_SQL if sqlite_path(uri) else "mlflow")


def prepare_environment() -> None:
    """Set defaults for MLflow's environment variables that the user has not set.

    Only for the delivery process. Telemetry is off unless the user turned it on.
    """
    environment = os.environ  # noqa: TID251 (before MLflow reads it)
    limit_requests()
    for name, value in _DEFAULTS.items():
        environment.setdefault(name, value)
    try:
        Path.home()
    except RuntimeError:  # a container's user may have none; MLflow needs one
        environment["HOME"] = tempfile.gettempdir()
    # MLflow's log records reach our handlers, which redact them, and no others.
    environment["MLFLOW_CONFIGURE_LOGGING"] = "false"


def _open_client(uri: str) -> MlflowClient:
    from mlflow import MlflowClient  # noqa: PLC0415 (slow)

    return MlflowClient(uri)


def _open_artifacts(root: str, uri: str) -> Any:
    """Open the place of a run's artifacts, as MLflow's client does once it knows it."""
    from mlflow.store.artifact import artifact_repository_registry  # noqa: PLC0415

    open_artifacts = artifact_repository_registry.get_artifact_repository
    return open_artifacts(root, tracking_uri=uri)


def _migrate(path: Path) -> None:
    """Create a database with MLflow, which runs all its migrations."""
    _open_client(sqlite_uri(path)).get_experiment("0")


def _read_sqlite(path: Path, run_id: str) -> pa.Table:
    """Read all points of a run from the database file."""
    uri = f"file:{urllib.parse.quote(str(path))}?mode=ro"
    query = (
        "SELECT key, timestamp, step, CASE WHEN is_nan THEN NULL ELSE value END "
        "FROM metrics WHERE run_uuid = ?"
    )
    tables = []
    with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=60)) as database:
        cursor = database.execute(query, (run_id,))
        while rows := cursor.fetchmany(_PAGE):
            tables.append(_make_page(*zip(*rows, strict=True)))
    return _concat(tables)


def _as_table(points: Sequence[Any]) -> pa.Table:
    """Points of one key, from MLflow's entities."""
    rows = [(p.key, p.timestamp, p.step, p.value) for p in points]
    return _make_page(*zip(*rows, strict=True)) if rows else HISTORY.empty_table()


def _make_page(*columns: Sequence[Any]) -> pa.Table:
    key, *numbers = columns
    arrays = [pa.array(key, pa.string()).dictionary_encode()]
    arrays += [
        pa.array(c, f.type) for c, f in zip(numbers, [*HISTORY][1:], strict=True)
    ]
    arrays[-1] = arrays[-1].fill_null(float("nan"))
    return pa.table(arrays, schema=HISTORY)


def _concat(tables: list[pa.Table]) -> pa.Table:
    """One table with one dictionary of keys."""
    return pa.concat_tables([HISTORY.empty_table(), *tables]).unify_dictionaries()


@contextlib.contextmanager
def _translate_errors(exists: bool = False) -> Iterator[None]:
    """Turn every exception inside the block into one of this module's errors."""
    try:
        yield
    except (RefusedError, GoneError, UnreachableError):
        raise
    except Exception as error:  # database drivers raise their own errors
        code = getattr(error, "error_code", None)
        text = name_error(error)
        if code in _REFUSALS or (exists and code == "RESOURCE_ALREADY_EXISTS"):
            raise RefusedError(text) from error
        if code == "RESOURCE_DOES_NOT_EXIST":
            raise GoneError(text) from error
        raise UnreachableError(text) from error


def name_error(error: Exception) -> str:
    """Class and text of an error; some, such as ``MemoryError``, have no text.

    SQLAlchemy's advice above the text of a database and the statement below are left out.
    """
    lines = str(error).partition("\n[SQL: ")[0].splitlines()
    text = "\n".join(line for line in lines if "session.no_autoflush" not in line)
    return f"{type(error).__name__}: {text}".removesuffix(": ")


def as_json(value: object) -> str:
    """Compact JSON for a tag."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
