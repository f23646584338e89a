"""Delivering runs that have ended, and reading back what MLflow has of them.

MLflow is imported by a process of its own here too: neither its variables nor its
threads get into the caller's.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from tracking.delivery.process import DeliveryProcess, delivery_command
from tracking.delivery.state import DeliveryState, rows_behind
from tracking.durable import hold_lock
from tracking.errors import DeliveryError
from tracking.read import PastRun
from tracking.store import get_rank_dir, is_being_written

DEFAULT_PATIENCE_S: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class SyncResult:
    """What `sync` did for a run.

    Attributes
    ----------
    run
        Id of the run.
    phase
        ``done``; ``gave up``, see ``error``; ``busy`` if another process delivers it at
        this moment; ``started`` if it is still being written and now is again delivered.
    sent
        Metric rows that were sent now.
    present
        Metric rows that MLflow has in the end, as they should be.
    behind
        Rows that MLflow still lacks.
    flags
        What MLflow cannot hold as it is.
    """

    run: str
    phase: str
    sent: int = 0
    present: int = 0
    behind: int = 0
    error: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    mlflow_run_id: str | None = None
    experiment_id: str | None = None
    tracking_uri: str | None = None
    page: str | None = None


@dataclass(frozen=True, kw_only=True)
class MlflowContents:
    """What MLflow has of a run.

    Attributes
    ----------
    history
        All values of all metrics: key, time_ms, step, value.
    artifacts
        Size in bytes by path.
    """

    history: pa.Table
    mlflow_run_id: str
    experiment_id: str
    tracking_uri: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    artifacts: dict[str, int]


def sync(
    runs: Iterable[PastRun], patience_s: float = DEFAULT_PATIENCE_S
) -> list[SyncResult]:
    """Deliver what MLflow lacks of runs, compared row by row.

    Parameters
    ----------
    runs
        Runs, in any state.
    patience_s : seconds
        How long a server that does not answer is waited for, per run.

    Returns
    -------
    one for each run, in order

    Notes
    -----
    Runs go to the store of ``MLFLOW_TRACKING_URI``; without it, to the one where they
    went before, or MLflow's default for the folder that they were started in.
    """
    runs = list(runs)
    at_once = {run.id: _begun_again(run.path) for run in runs}
    ended = [run.path for run in runs if at_once[run.id] is None]
    wait = ["--patience", str(patience_s), "--lock-wait", str(patience_s)]
    lines = _told("--sync", *wait, paths=ended)
    done = {line["run"]: SyncResult(**line) for line in lines}
    return [at_once[run.id] or done[run.id] for run in runs]


def read_mlflow(run: PastRun) -> MlflowContents:
    """What MLflow has of a run.

    Raises
    ------
    DeliveryError
        If it has none, or cannot be reached.
    """
    with tempfile.TemporaryDirectory() as folder:
        (told,) = _told("--read", folder, paths=[run.path])
        if told.get("error"):
            raise DeliveryError(
                f"run {run.id}: expected it in MLflow, got {told['error']}. "
                f"Run 'harness sync {run.id}'."
            )
        with pa.OSFile(str(Path(folder) / f"{told.pop('run')}.arrow")) as file:
            history = pa.ipc.open_file(file).read_all()
    return MlflowContents(history=history, **told)


def wait_for_delivery(run_path: Path, timeout_s: float) -> bool:
    """Wait until no process delivers a run any more; whether that came about."""
    deadline = time.monotonic() + timeout_s
    while is_being_delivered(run_path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def is_being_delivered(run_path: Path) -> bool:
    """Whether a process delivers a run at this moment."""
    try:
        with hold_lock(run_path / "delivery" / "lock", timeout_s=0) as is_held:
            return not is_held
    except OSError:  # nothing was ever delivered
        return False


def _begun_again(run_path: Path) -> SyncResult | None:
    """What can be told of a run that is being written, and so is delivered by itself."""
    if not is_being_written(get_rank_dir(run_path, 0)):
        return None
    phase = "busy" if is_being_delivered(run_path) else "started"
    if phase == "started":
        DeliveryProcess(run_path).start()
    state = DeliveryState.read(run_path) or DeliveryState()
    return SyncResult(
        run=run_path.name,
        phase=phase,
        behind=rows_behind(run_path, state),
        error=state.error,
        flags=state.flags,
        mlflow_run_id=state.mlflow_run_id,
        experiment_id=state.experiment_id,
        tracking_uri=state.tracking_uri,
        page=state.page,
    )


def _told(*options: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """What a delivery process tells of some runs."""
    if not paths:
        return []
    command = delivery_command(*options, *map(str, paths))
    process = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    lines = [json.loads(line) for line in process.stdout.splitlines()]
    if len(lines) != len(paths):
        raise DeliveryError(
            f"delivery of {paths[len(lines)].name}: expected a report, got exit code "
            f"{process.returncode}: {process.stderr[-2000:].strip()}"
        )
    return lines
