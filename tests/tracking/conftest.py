"""A real MLflow for the tests of delivery: databases, a server, and bad connections."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import tracking
from tracking.delivery.state import DeliveryState
from tracking.delivery.worker import DeliveryWorker
from tracking.mlflow_store.keys import plain_key
from tracking.mlflow_store.runs import RunResolver
from tracking.mlflow_store.server import Server

Points = list[tuple[str, int, float, int]]


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, and an environment in which nothing leaves the machine."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # one for all workers
    fonts = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    with pytest.MonkeyPatch.context() as patch:
        # Elsewhere matplotlib would look for its fonts anew, which takes seconds.
        patch.setenv(
            "MPLCONFIGDIR", os.environ.get("MPLCONFIGDIR", f"{fonts}/matplotlib")
        )
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        yield folder / "cache" / "luz-harness"


@pytest.fixture(scope="session")
def remote_class() -> Any:
    """The client of MLflow, with MLflow imported; its imports warn of code of others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401, PLC0415

        from tracking.mlflow_store.client import StoreClient  # noqa: PLC0415
    return StoreClient


@pytest.fixture
def store(tmp_path: Path) -> str:
    """Tracking URI of a database that is not there yet."""
    return f"sqlite:///{tmp_path}/mlflow.db"


class Recorded:
    """A run with known rows, for delivering; not delivered by itself."""

    def __init__(self, run: tracking.Run) -> None:
        self.run = run
        self.path = run.path

    def log_curve(self, num_rows: int, first: int = 0, scale: float = 1.0) -> None:
        """Log a loss and an accuracy at some indices."""
        for i in range(first, first + num_rows):
            values = {"loss": scale / (i + 1), "accuracy": i / 1000}
            self.run.log("metrics", "train", values, index=i, step=10 * i)


@pytest.fixture
def record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Recorded]]:
    """Starts runs that are not delivered by a process of their own."""
    monkeypatch.chdir(tmp_path)  # no repository, whose state would be asked for
    runs: list[tracking.Run] = []

    def start(delivery: dict[str, Any] | None = None, **options: Any) -> Recorded:
        options = {"experiment": "digits", "delivery": False, **options}
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
def worker(cache: Path, remote_class: Any) -> Callable[..., DeliveryWorker]:
    """Makes the worker of a run, as the delivery process does."""

    def make(path: Path, store: str, **options: Any) -> DeliveryWorker:
        resolver = RunResolver(path, store, lambda uri: remote_class(uri, cache))
        options = {"patience_s": 0.0, **options}
        return DeliveryWorker(path, resolver, **options)

    return make


@pytest.fixture
def deliver(worker: Callable[..., DeliveryWorker]) -> Callable[..., DeliveryWorker]:
    """Delivers a run to the end, in this process."""

    def run(path: Path, store: str, **options: Any) -> DeliveryWorker:
        made = worker(path, store, **options)
        made.deliver()
        return made

    return run


class Delivering:
    """A worker at work in a thread, beside a run that is written in this one."""

    def __init__(self, made: DeliveryWorker) -> None:
        self.worker = made
        self.thread = threading.Thread(target=made.deliver, daemon=True)
        self.thread.start()

    @property
    def state(self) -> DeliveryState:
        return DeliveryState.read(self.worker.run_path) or DeliveryState()

    def join(self) -> DeliveryState:
        self.thread.join(300)
        assert not self.thread.is_alive()
        return self.worker.state


@pytest.fixture
def delivering(worker: Callable[..., DeliveryWorker]) -> Callable[..., Delivering]:
    """Begins to deliver a run, in a thread."""

    def start(path: Path, store: str, **options: Any) -> Delivering:
        return Delivering(worker(path, store, **{"patience_s": 60.0, **options}))

    return start


@pytest.fixture
def client(remote_class: Any, cache: Path) -> Callable[[str], Any]:
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
def in_journal() -> Callable[[Path], Points]:
    """All points that a run's journal holds, worked out row by row."""

    def read(path: Path) -> Points:
        rows = tracking.open(path).records(rank=0).to_pylist()
        rows = [row for row in rows if row["kind"] in ("float", "int", "bool")]
        return sorted(
            (
                plain_key((row["what"], row["set"], row["name"])),
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
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real tracking server with a database of its own."""
    folder = tmp_path_factory.mktemp("server")
    with Server(f"sqlite:///{folder}/mlflow.db", folder=folder) as started:
        yield started


class Proxy:
    """A connection to a server, as bad as `mode` says.

    Attributes
    ----------
    mode
        ``pass``; ``gone`` (does not answer, nor listen once closed); ``error`` (answers
        500), ``hang`` (takes the request, answers not),
        ``drop`` (the server has done it, but its answer gets lost), ``refuse 400`` (what
        holds the text `refused` is refused).
    num_faults
        Requests that were not passed on, or whose answer was not.
    """

    def __init__(self, port: int, listen: int = 0) -> None:
        self.mode = "pass"
        self.refused = b"\0"
        self.num_faults = 0
        self.num_passed = 0
        self.released = threading.Event()
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                proxy.answer(self, port, self.rfile.read(length))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

            def log_message(self, *_: Any) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", listen), Handler)
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def answer(
        self, handler: http.server.BaseHTTPRequestHandler, port: int, body: bytes
    ) -> None:
        """Answer a request as the mode says."""
        mode = self.mode
        if mode == "gone":
            handler.close_connection = True
            return
        if mode == "error":
            self.num_faults += 1
            self._reply(handler, 500, b"out of order")
            return
        if mode == "hang":
            self.num_faults += 1
            self.released.wait(60)
            handler.close_connection = True
            return
        if mode == "refuse 400" and self.refused in body:
            self.num_faults += 1
            text = b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'
            self._reply(handler, 400, text)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        headers = {k: v for k, v in handler.headers.items() if k != "Connection"}
        with contextlib.closing(upstream):
            try:
                upstream.request(handler.command, handler.path, body, headers)
                reply = upstream.getresponse()
                text = reply.read()
            except OSError:
                handler.close_connection = True
                return
        if mode == "drop" and handler.command != "GET":
            self.num_faults += 1
            handler.close_connection = True
            return
        self.num_passed += 1
        self._reply(handler, reply.status, text)

    def close(self) -> None:
        """Stop listening; again, if need be."""
        if not self._thread.is_alive():
            return
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @staticmethod
    def _reply(
        handler: http.server.BaseHTTPRequestHandler, status: int, text: bytes
    ) -> None:
        with contextlib.suppress(OSError):
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(text)))
            handler.end_headers()
            handler.wfile.write(text)


@pytest.fixture
def connect() -> Iterator[Callable[..., Proxy]]:
    """Makes connections to a server that can be made bad."""
    made: list[Proxy] = []

    def make(*ports: int) -> Proxy:
        made.append(Proxy(*ports))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.fixture
def proxy(server: Server, connect: Callable[..., Proxy]) -> Proxy:
    """A connection to the server."""
    return connect(server.port)


@pytest.fixture
def until() -> Callable[..., None]:
    """Waits until something is so."""

    def wait(is_so: Callable[[], Any], timeout_s: float = 300.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not is_so():
            assert time.monotonic() < deadline, "it did not come about"
            time.sleep(0.02)

    return wait
