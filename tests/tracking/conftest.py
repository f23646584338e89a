"""Real MLflow stores, servers and connections for the tests of delivery."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tracking
from tests.tracking.stores import (
    Delivering,
    ForkedDelivery,
    Proxy,
    Recorded,
    TrackingServer,
    serve_mlflow,
)
from tracking.delivery.sync import MlflowContents
from tracking.delivery.worker import DeliveryWorker
from tracking.mlflow_store.keys import SeriesId, plain_key
from tracking.mlflow_store.runs import RunResolver

Points = list[tuple[str, int, float, int]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, and an environment in which MLflow sends nothing out."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one for all workers
    fonts = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        # In another folder matplotlib would search its fonts again, for seconds.
        patch.setenv(
            "MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", f"{fonts}/matplotlib")
        )
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        yield folder / "cache" / "luz-harness"


@pytest.fixture(scope="session")
def client_class() -> Any:
    """Class of our client, with MLflow imported; the import warns about other code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401, PLC0415

        from tracking.mlflow_store.client import StoreClient  # noqa: PLC0415
    return StoreClient


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Tracking URI of a database that does not exist yet."""
    return f"sqlite:///{tmp_path}/mlflow.db"


@pytest.fixture(scope="session")
def no_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which runs are started: only for the first one, a process describes it."""
    return tmp_path_factory.mktemp("no_repository")


@pytest.fixture
def record(
    tmp_path: Path, no_repository: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Recorded]]:
    """Starts runs that no process delivers."""
    monkeypatch.chdir(tmp_path)
    runs: list[tracking.Run] = []

    def start(delivery: dict[str, Any] | None = None, **options: Any) -> Recorded:
        options = {"experiment": "digits", "delivery": False, **options}
        with contextlib.chdir(no_repository):
            run = tracking.start(runs_dir=tmp_path / "runs", **options)
        runs.append(run)
        if delivery is not None:
            run.manifest.delivery = delivery
            run.save_manifest()
        return Recorded(run)

    yield start
    for run in runs:
        run.finish()


@pytest.fixture
def make_worker(cache: Path, client_class: Any) -> Callable[..., DeliveryWorker]:
    """Creates the worker of a run as the delivery process does."""

    def make(path: Path, store: str, **options: Any) -> DeliveryWorker:
        resolver = RunResolver(path, store, lambda uri: client_class(uri, cache))
        options = {"patience_s": 0.0, **options}
        return DeliveryWorker(path, resolver, **options)

    return make


@pytest.fixture
def deliver(
    make_worker: Callable[..., DeliveryWorker],
) -> Callable[..., DeliveryWorker]:
    """Delivers a run completely, in this process."""

    def run(path: Path, store: str, **options: Any) -> DeliveryWorker:
        made = make_worker(path, store, **options)
        made.deliver()
        made.send_summaries()
        return made

    return run


@pytest.fixture
def fork_delivery(
    client_class: Any, tmp_path: Path
) -> Iterator[Callable[..., ForkedDelivery]]:
    """Starts delivery processes with a command line and variables of the environment."""
    made: list[ForkedDelivery] = []

    def start(*words: str, **variables: str) -> ForkedDelivery:
        output = tmp_path / f"delivery-{len(made)}.txt"
        made.append(ForkedDelivery(words, output, **variables))
        return made[-1]

    yield start
    for process in made:
        process.kill()


@pytest.fixture
def start_delivery(
    make_worker: Callable[..., DeliveryWorker],
) -> Callable[..., Delivering]:
    """Starts to deliver a run in a thread."""

    def start(path: Path, store: str, **options: Any) -> Delivering:
        return Delivering(make_worker(path, store, **{"patience_s": 300.0, **options}))

    return start


@pytest.fixture
def client(client_class: Any, cache: Path) -> Callable[[str], Any]:
    """MLflow's own client of a store."""

    def make(store: str) -> Any:
        import mlflow  # noqa: PLC0415

        return mlflow.MlflowClient(store)

    return make


@pytest.fixture
def in_mlflow(client: Callable[[str], Any]) -> Callable[..., Points]:
    """All points of a run, read by MLflow's client: key, step, value, time in ms."""

    def read(store: str, run_id: str) -> Points:
        found = client(store)
        keys = found.get_run(run_id).data.metrics
        return sorted(
            (p.key, p.step, p.value, p.timestamp)
            for key in keys
            for p in found.get_metric_history(run_id, key)
        )

    return read


@pytest.fixture
def read_back(client_class: Any, cache: Path) -> Callable[[Path, str], MlflowContents]:
    """What MLflow has of a run, read in this process."""

    def read(path: Path, store: str) -> MlflowContents:
        resolver = RunResolver(path, store, lambda uri: client_class(uri, cache))
        run = resolver.find()
        assert run is not None
        return MlflowContents(
            history=resolver.client.history(run.run_id),
            mlflow_run_id=run.run_id,
            experiment_id=run.experiment_id,
            tracking_uri=store,
            status=run.status,
            params=run.params,
            tags=run.tags,
            artifacts=resolver.client.artifacts(run.run_id),
        )

    return read


@pytest.fixture
def in_journal() -> Callable[[Path], Points]:
    """All points of a run's journal, computed row by row."""

    def read(path: Path) -> Points:
        rows = tracking.open(path).records(rank=0).to_pylist()
        rows = [row for row in rows if row["kind"] in ("float", "int", "bool")]
        return sorted(
            (
                plain_key(
                    SeriesId(row["what"], row["set"], row["name"], row.get("fit", 1))
                ),
                row["step"] if row["what"] == "steps" else row["index"],
                row["value"],
                round(row["time"].timestamp() * 1_000_000) // 1000,
            )
            for row in rows
            if row["what"] not in ("params", "tags", "artifacts", "inputs")
        )

    return read


# ------------------------------------------------------------- servers and faults


@pytest.fixture(scope="session")
def server(
    tmp_path_factory: pytest.TempPathFactory, client_class: Any
) -> Iterator[TrackingServer]:
    """MLflow's tracking server with its own database.

    It is forked from this process, which has imported MLflow. ``mlflow server`` imports
    it twice, which takes ten seconds.
    """
    folder = tmp_path_factory.mktemp("server")
    context = multiprocessing.get_context("fork")
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(
        target=serve_mlflow,
        args=(f"sqlite:///{folder}/mlflow.db", folder, writer),
        daemon=True,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        process.start()
    assert reader.poll(120)
    yield TrackingServer(reader.recv())
    process.kill()
    process.join()


@pytest.fixture
def connect() -> Iterator[Callable[..., Proxy]]:
    """Creates connections to a server that can fail."""
    made: list[Proxy] = []

    def make(*ports: int) -> Proxy:
        made.append(Proxy(*ports))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture
def proxy(server: TrackingServer, connect: Callable[..., Proxy]) -> Proxy:
    """A connection to the server."""
    return connect(server.port)


@pytest.fixture
def until() -> Callable[..., None]:
    """Waits until a condition is true; the bound is for a busy machine."""

    def wait(is_so: Callable[[], Any], timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, "the condition did not become true"
            time.sleep(0.02)

    return wait
