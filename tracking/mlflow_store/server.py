"""Start and stop MLflow's server on a store."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Final

from tracking.errors import TrackingError

HOST: Final = "127.0.0.1"
START_S: Final = 120.0
END_S: Final = 5.0

# Job execution (evaluations by language models) would start ten more processes.
_DEFAULTS: Final = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


class Server:
    """An ``mlflow server`` with one worker, running inside a ``with`` block.

    Parameters
    ----------
    store
        Tracking URI of a database or folder.
    port
        0: any free port.
    folder
        Its working directory; artifacts that it receives are stored below it.

    Attributes
    ----------
    address
        URL of the server.

    Raises
    ------
    TrackingError
        If the port is taken, or the server does not start.
    """

    def __init__(self, store: str, port: int = 0, folder: Path | None = None) -> None:
        self.port = _free_port(port)
        self.address = f"http://{HOST}:{self.port}"
        self.process: subprocess.Popen[bytes]
        self._store = store
        self._folder = folder
        self._output: IO[bytes]

    def __enter__(self) -> Server:
        self._output = tempfile.TemporaryFile()
        try:
            self.start()
        except BaseException:
            self._output.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        self._output.close()

    def start(self) -> None:
        """Start the server and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--workers", "1"]
        command += ["--host", HOST, "--port", str(self.port)]
        command += ["--backend-store-uri", self._store]
        environment = {**_DEFAULTS, **os.environ}  # noqa: TID251 (passed on unread)
        # In its own process group: Ctrl-C reaches only us, and `end` reaches its workers.
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            cwd=self._folder,
            env=environment,
            start_new_session=True,
        )
        try:
            self._wait()
        except BaseException:
            self.end()
            raise

    def wait(self) -> None:
        """Wait for the server to end.

        Raises
        ------
        TrackingError
            When it ends, which it should not do by itself.
        """
        code = self.process.wait()
        raise TrackingError(
            f"ui: expected MLflow's server to keep running, got exit code {code}. "
            f"Its output: {self._read_output()}"
        )

    def end(self) -> None:
        """Stop the server and its workers."""
        for number, wait_s in ((signal.SIGTERM, END_S), (signal.SIGKILL, END_S)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(wait_s)

    def _wait(self) -> None:
        deadline = time.monotonic() + START_S
        while not self._answers():
            code = self.process.poll()
            if code is not None or time.monotonic() > deadline:
                why = "no answer" if code is None else f"exit code {code}"
                raise TrackingError(
                    f"ui: expected MLflow's server to answer at {self.address}, got "
                    f"{why}. Its output: {self._read_output()}"
                )
            time.sleep(0.1)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _read_output(self) -> str:
        """Last 1000 bytes that the server wrote."""
        self._output.seek(0)
        return self._output.read()[-1000:].decode(errors="replace").strip()


def _free_port(port: int) -> int:
    """Check that a port is free; choose one for 0."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise TrackingError(
                f"ui: expected port {port} of {HOST} to be free, got {error.strerror}. "
                "Choose another one with --port, or 0 for any free port."
            ) from error
        return int(probe.getsockname()[1])
