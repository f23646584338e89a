"""Runs to deliver, MLflow stores to look into, and connections that can be broken."""

from __future__ import annotations

import contextlib
import http.client
import http.server
import logging
import multiprocessing
import os
import sqlite3
import sys
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tracking
from tracking.delivery.state import DeliveryState
from tracking.delivery.worker import DeliveryWorker


def get_run(client: Any, store: str, state: DeliveryState) -> Any:
    """MLflow's own view of a delivered run."""
    return client(store).get_run(state.mlflow_run_id)


def all_runs(client: Any, store: str) -> list[Any]:
    """All runs of a store, as MLflow shows them."""
    experiments = client(store).search_experiments()
    return list(client(store).search_runs([e.experiment_id for e in experiments]))


def execute_sql(store: str, statement: str) -> list[Any]:
    """Execute a statement in the database of a store; return the rows it gives."""
    path = store.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        return database.execute(statement).fetchall()


class Recorded:
    """A run to deliver, with known rows."""

    def __init__(self, run: tracking.Run) -> None:
        self.run = run
        self.path = run.path

    def log_curve(self, num_rows: int, first: int = 0, scale: float = 1.0) -> None:
        """Log a loss and an accuracy at some indices."""
        for i in range(first, first + num_rows):
            values = {"loss": scale / (i + 1), "accuracy": i / 1000}
            self.run.log("metrics", "train", values, index=i, step=10 * i)


class Delivering:
    """Delivers in a thread a run that the test still writes."""

    def __init__(self, worker: DeliveryWorker) -> None:
        self.worker = worker
        self.thread = threading.Thread(target=worker.deliver, daemon=True)
        self.thread.start()

    @property
    def state(self) -> DeliveryState:
        return DeliveryState.read(self.worker.run_path) or DeliveryState()

    def join(self) -> DeliveryState:
        self.thread.join(300)
        assert not self.thread.is_alive()
        return self.worker.state


@dataclass(frozen=True)
class TrackingServer:
    """Where a tracking server of MLflow answers."""

    port: int

    @property
    def address(self) -> str:
        """URL of the server."""
        return f"http://127.0.0.1:{self.port}"


def serve_mlflow(store: str, folder: Path, ready: Connection) -> None:
    """Serve MLflow's application in this process, as ``mlflow server`` sets it up.

    It ends with the process that started it, even if that was killed.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    os.chdir(folder)
    import mlflow.server as mlflow_server  # noqa: PLC0415 (only where it is needed)
    from werkzeug.serving import make_server  # noqa: PLC0415

    names = vars(mlflow_server)
    os.environ[names["BACKEND_STORE_URI_ENV_VAR"]] = store
    os.environ[names["ARTIFACT_ROOT_ENV_VAR"]] = "mlflow-artifacts:/"
    os.environ[names["ARTIFACTS_DESTINATION_ENV_VAR"]] = str(folder / "artifacts")
    os.environ[names["SERVE_ARTIFACTS_ENV_VAR"]] = "true"
    server = make_server("127.0.0.1", 0, mlflow_server.app, threaded=True)
    ready.send(server.port)
    server.serve_forever()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class ForkedDelivery:
    """A delivery process, forked from this one, which has imported MLflow.

    Parameters
    ----------
    words
        Its command line.
    output
        File for what it prints.
    """

    def __init__(self, words: Sequence[str], output: Path, **variables: str) -> None:
        self._output = output
        context = multiprocessing.get_context("fork")
        self._process = context.Process(
            target=self._run, args=(words, variables), daemon=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads are beside it
            self._process.start()

    def _run(self, words: Sequence[str], variables: Mapping[str, str]) -> None:
        warnings.resetwarnings()
        os.environ.update(variables)
        with self._output.open("w") as file:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (open(n, "w", closefd=False) for n in (1, 2))  # noqa: SIM115
        from tracking.delivery.__main__ import main  # noqa: PLC0415 (slow)

        code = main(list(words))
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    def wait(self) -> tuple[int, str]:
        """Its exit code, and what it printed."""
        self._process.join(300)
        assert self._process.exitcode is not None
        return self._process.exitcode, self._output.read_text()

    def kill(self) -> None:
        """End it at once, as SIGKILL does; safe to call twice."""
        self._process.kill()
        self._process.join()


class Proxy:
    """A connection to a server that fails as `mode` says.

    Attributes
    ----------
    mode
        ``pass``; ``gone`` (closes connections); ``error`` (answers 500); ``hang``
        (accepts the request and does not answer); ``drop`` (passes the request on and
        drops the answer); ``refuse 400`` (refuses requests that contain `refused`).
    num_faults
        Requests that were not passed on, or whose answer was dropped.
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
        """Answer a request, or fail, according to the mode."""
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
            self.released.wait(300)
            handler.close_connection = True
            return
        if mode == "refuse 400" and self.refused in body:
            self.num_faults += 1
            text = b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no"}'
            self._reply(handler, 400, text)
            return
        upstream = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
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
        """Stop listening; safe to call twice."""
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
