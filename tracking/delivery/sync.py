"""Deliver runs that have ended, and read back what MLflow has of them.

A separate process imports MLflow here too, so that MLflow's variables and threads stay
out of the caller's process.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from tracking.delivery.process import (
    ask_for_handover,
    delivery_command,
    is_being_delivered,
    start_detached,
    wait_for_delivery,
)
from tracking.delivery.state import DeliveryState, rows_behind
from tracking.errors import DeliveryError
from tracking.read import PastRun
from tracking.store import get_rank_dir, is_being_written

DEFAULT_PATIENCE_S: Final = 10.0
HANDOVER_WAIT_S: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class SyncResult:
    """What `sync` did with a run.

    Attributes
    ----------
    run
        Id of the run.
    phase
        ``done``; ``gave up``, see ``error``; ``busy`` if another process is delivering
        the run; ``started`` if the run is being written and its delivery was started
        again.
    sent
        Points that were sent now.
    present
        Points that MLflow has as it should.
    behind
        Rows that MLflow does not have yet.
    flags
        What MLflow does not store exactly.
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

    @property
    def is_complete(self) -> bool:
        """Whether MLflow has all rows that were written so far."""
        is_elsewhere = self.phase in ("busy", "started")
        return self.phase == "done" or (is_elsewhere and not self.behind)

    @classmethod
    def from_state(cls, run: str, state: DeliveryState, **changes: Any) -> SyncResult:
        """Result from the state of a run's delivery."""
        values = {
            "phase": state.phase,
            "behind": state.behind,
            "error": state.error,
            "flags": state.flags,
            "mlflow_run_id": state.mlflow_run_id,
            "experiment_id": state.experiment_id,
            "tracking_uri": state.tracking_uri,
            "page": state.page,
        }
        return cls(run=run, **{**values, **changes})


@dataclass(frozen=True, kw_only=True)
class MlflowContents:
    """What MLflow has of a run.

    Attributes
    ----------
    history
        All points: key, time_ms, step, value.
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
    """Send what MLflow is missing of runs, compared row by row.

    Parameters
    ----------
    runs
        Runs in any state.
    patience_s : seconds
        How long to wait for a server that does not answer, for each run.

    Returns
    -------
    one for each run, in order

    Notes
    -----
    Runs go to the store of ``MLFLOW_TRACKING_URI``. Without it they go where they went
    before, or to MLflow's default store of the folder that they were started in.
    """
    runs = list(runs)
    live = {
        run.path: _restart_delivery(run.path)
        for run in runs
        if is_being_written(get_rank_dir(run.path, 0))
    }
    # By folder: copies of a run in two places have the same name.
    ended = [run.path for run in runs if run.path not in live]
    waits = ["--patience", str(patience_s), "--lock-wait", str(patience_s)]
    reports = _run_delivery("--sync", *waits, paths=ended)
    done = dict(zip(ended, (SyncResult(**one) for one in reports), strict=True))
    return [live.get(run.path) or done[run.path] for run in runs]


def read_mlflow(run: PastRun) -> MlflowContents:
    """Read what MLflow has of a run.

    Raises
    ------
    DeliveryError
        If MLflow does not have the run, or does not answer.
    """
    with tempfile.TemporaryDirectory() as folder:
        (report,) = _run_delivery("--read", folder, paths=[run.path])
        if report.get("error"):
            raise DeliveryError(
                f"run {run.id}: expected it in MLflow, got {report['error']}. "
                f"Run 'harness sync {run.id}'."
            )
        with pa.OSFile(str(Path(folder) / f"{report.pop('run')}.arrow")) as file:
            history = pa.ipc.open_file(file).read_all()
    return MlflowContents(history=history, **report)


def _restart_delivery(run_path: Path) -> SyncResult:
    """Deliver a run that is being written, if no process does so."""
    phase = "busy"
    state = DeliveryState.read_or_none(run_path)
    if state is not None and state.phase == "waiting":
        with ask_for_handover(run_path):
            wait_for_delivery(run_path, HANDOVER_WAIT_S)
    if not is_being_delivered(run_path):
        phase = "started"
        start_detached(run_path)
    state = DeliveryState.read_or_none(run_path) or DeliveryState()
    behind = rows_behind(run_path, state)
    return SyncResult.from_state(run_path.name, state, phase=phase, behind=behind)


def _run_delivery(*options: str, paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Run a delivery process for some runs; return its reports, one for each run."""
    if not paths:
        return []
    command = delivery_command(*options, *map(str, paths))
    process = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    reports = [json.loads(line) for line in process.stdout.splitlines()]
    if len(reports) != len(paths):
        raise DeliveryError(
            f"delivery of {paths[len(reports)].name}: expected a report, got exit code "
            f"{process.returncode}: {process.stderr[-2000:].strip()}"
        )
    return reports
