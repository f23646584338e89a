"""The trainer's side of delivery: starting its process, and asking how far it is."""

from __future__ import annotations

import atexit
import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from tracking.delivery.state import DeliveryState
from tracking.errors import DeliveryError, warn
from tracking.redaction import redact

# The package's own folder goes to the end of the path, for a checkout that is not
# installed; -P keeps the user's folder, and modules of his that hide others, out of it.
_BOOT: Final = (
    "import runpy, sys; sys.path.append(sys.argv.pop(1)); "
    "runpy.run_module('tracking.delivery', run_name='__main__', alter_sys=True)"
)
_PACKAGES: Final = str(Path(__file__).resolve().parents[2])
_POLL_S: Final = 0.1
# Python complains of a process object that goes while its process goes on.
_STARTED: Final[list[subprocess.Popen[bytes]]] = []


@atexit.register
def _let_go() -> None:
    """Leave the processes that outlive this one, without Python's complaint of it."""
    for process in _STARTED:
        if process.poll() is None:
            process.returncode = 0


def delivery_command(*arguments: str) -> list[str]:
    """Command line of a delivery process, whatever the folder it is started in."""
    return [sys.executable, "-P", "-c", _BOOT, _PACKAGES, *arguments]


class DeliveryProcess:
    """A delivery process that was started, or none.

    Parameters
    ----------
    run_path
        Folder of the run.
    """

    def __init__(self, run_path: Path) -> None:
        self._run_path = run_path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, which goes on by itself, away from the terminal."""
        if importlib.util.find_spec("mlflow") is None:
            warn(
                "start(delivery=True): expected mlflow to be installed, got no such "
                f"package. The run is recorded in {self._run_path} only: install mlflow "
                f"and run 'harness sync {self._run_path.name}', or pass delivery=False."
            )
            return
        folder = self._run_path / "delivery"
        try:
            folder.mkdir(exist_ok=True)
            with (folder / "log.txt").open("ab") as log:
                self._process = subprocess.Popen(
                    delivery_command(str(self._run_path)),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            _STARTED.append(self._process)
        except OSError as error:
            warn(
                f"start(delivery=True): expected to start the delivery to MLflow, got "
                f"{error}. The run is recorded all the same: 'harness sync "
                f"{self._run_path.name}' delivers it."
            )

    def wait_for_run_id(self, timeout_s: float) -> str:
        """Id of the MLflow run, once delivery has made it.

        Raises
        ------
        DeliveryError
            If it does not within ``timeout_s``, or nothing delivers.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            state = DeliveryState.read(self._run_path)
            if state and state.mlflow_run_id:
                return state.mlflow_run_id
            is_over = self._process is None or self._process.poll() is not None
            if is_over or time.monotonic() > deadline:
                why = (state and state.error) or "no answer from it"
                why = "no delivery process" if self._process is None else why
                raise DeliveryError(
                    f"Run.mlflow_run_id: expected delivery to make the MLflow run "
                    f"within {timeout_s:g} s, got {why}. See "
                    f"{self._run_path / 'delivery/log.txt'}; "
                    f"'harness sync {self._run_path.name}' tries again."
                )
            time.sleep(_POLL_S)

    def wait(self, last_seq: int, wait_s: float) -> None:
        """Wait until delivery has come to a row, with a count on a terminal.

        Parameters
        ----------
        last_seq
            The run's last row.
        wait_s : s
            At most so long; what is left then is told on stderr.
        """
        if self._process is None:
            return
        deadline = time.monotonic() + wait_s
        is_shown = False
        while True:
            is_over = self._process.poll() is not None
            state = DeliveryState.read(self._run_path) or DeliveryState()
            if state.delivered >= last_seq or state.phase == "done":
                break
            if is_over or state.phase == "gave up" or time.monotonic() > deadline:
                self._tell_what_is_left(state)
                break
            if sys.stderr.isatty():
                is_shown = True
                count = f"delivering to MLflow: {state.behind} rows to go"
                sys.stderr.write(f"\r{count}\x1b[K")
                sys.stderr.flush()
            time.sleep(_POLL_S)
        if is_shown:
            sys.stderr.write("\r\x1b[K")

    def _tell_what_is_left(self, state: DeliveryState) -> None:
        """Say on stderr how much MLflow lacks."""
        assert self._process is not None
        run_id = self._run_path.name
        left = f"{state.behind} rows" if state.behind else "some rows"
        why = f" ({redact(state.error)})" if state.error else ""
        is_going = self._process.returncode is None and state.phase != "gave up"
        how = "delivery goes on in the background; " if is_going else ""
        sys.stderr.write(
            f"{left} of {run_id} are still to go to MLflow{why}: {how}"
            f"'harness sync {run_id}' sends what is left.\n"
        )
