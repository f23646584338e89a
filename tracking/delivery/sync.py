"""Deliver runs that have ended, and read back what MLflow has of them.

A separate process imports MLflow here too, so that MLflow's variables and threads stay
out of the caller's process.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pyarrow as pa

from tracking.delivery.process import (
    RunByRunProcess,
    ask_for_handover,
    is_being_delivered,
    start_detached,
    wait_for_delivery,
)
from tracking.delivery.state import DeliveryState, rows_behind
from tracking.errors import DeliveryError
from tracking.journal.reader import JournalReader
from tracking.read import PastRun
from tracking.store import get_rank_dir, has_live_writer, list_rank_dirs

DEFAULT_PATIENCE_S: Final = 10.0
HANDOVER_WAIT_S: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class SyncResult:
    """What `sync` did with a run.

    Attributes
    ----------
    phase
        ``done``; ``gave up``, see ``error``; ``busy`` if another process is delivering
        the run; ``started`` if the run is being written and its delivery was started
        again; ``lost`` if the journal is gone, or its last rows, which MLflow has.
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
    """What MLflow has of a run."""

    history: pa.Table  #: all points: key, time_ms, step, value
    mlflow_run_id: str
    experiment_id: str
    tracking_uri: str
    status: str
    params: dict[str, str]
    tags: dict[str, str]
    artifacts: dict[str, int]  #: size in bytes by path


def sync(
    runs: Iterable[PastRun], patience_s: float = DEFAULT_PATIENCE_S
) -> list[SyncResult]:
    """Send what MLflow is missing of runs, compared row by row.

    Parameters
    ----------
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
    return list(sync_each(runs, patience_s))


def sync_each(
    runs: Iterable[PastRun], patience_s: float = DEFAULT_PATIENCE_S
) -> Iterator[SyncResult]:
    """Send what MLflow is missing, as `sync` does; yield each result when it is known."""
    runs = list(runs)
    live = {
        run.path: _restart_delivery(run.path)
        for run in runs
        if has_live_writer(get_rank_dir(run.path, 0))
    }
    waits = ["--patience", str(patience_s), "--lock-wait", str(patience_s)]
    num_failures = 0
    with RunByRunProcess("--sync", *waits) as process:
        for run in runs:
            # By folder: copies of a run in two places have the same name.
            if run.path in live:
                yield live[run.path]
                continue
            lost = _find_loss(run.path)
            try:
                report = process.ask(run.path)
                num_failures = 0
                if lost is not None:
                    report |= {"phase": "lost", "error": lost}
            except DeliveryError as error:
                num_failures += 1
                if num_failures > 1 or len(runs) == 1:  # it is not about one run
                    raise
                report = {"run": run.id, "phase": "gave up", "error": str(error)}
            yield SyncResult(**report)


def _find_loss(run_path: Path) -> str | None:
    """Say that a journal is lost, or rows at its end that MLflow has; None: it is not."""
    folder = get_rank_dir(run_path, 0)
    if not list_rank_dirs(run_path):
        return f"expected its records in {folder.parent}, found none"
    state = DeliveryState.read_or_none(run_path)
    if state is None or state.delivered < 0:
        return None
    with contextlib.suppress(OSError):  # which the delivery reports, of this run alone
        if not JournalReader(folder, state.delivered - 1).count_unread():
            return f"expected the rows that MLflow has in {folder}, found fewer"
    return None


MlflowReader = Callable[[PastRun], MlflowContents]
"""Reads what MLflow has of a run."""


@contextlib.contextmanager
def open_mlflow(patience_s: float = DEFAULT_PATIENCE_S) -> Iterator[MlflowReader]:
    """Yield what reads runs from MLflow, in one process for all of them.

    Parameters
    ----------
    patience_s : seconds
        How long to wait for a server that does not answer, once for all runs.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        RunByRunProcess("--read", folder, "--patience", str(patience_s)) as process,
    ):

        def read(run: PastRun) -> MlflowContents:
            report = process.ask(run.path)
            if report.get("error"):
                got = report["error"].rstrip(".")
                raise DeliveryError(
                    f"run {run.id}: expected it in MLflow, got {got}. "
                    f"Run 'harness sync {run.id}'."
                )
            path = Path(folder, f"{report.pop('run')}.arrow")
            with pa.OSFile(str(path)) as file:
                history = pa.ipc.open_file(file).read_all()
            path.unlink()
            return MlflowContents(history=history, **report)

        yield read


def read_mlflow(run: PastRun) -> MlflowContents:
    """Read what MLflow has of one run."""
    with open_mlflow() as read:
        return read(run)


def _restart_delivery(run_path: Path) -> SyncResult:
    """Deliver a run that is being written, if no process does so."""
    phase, error = "busy", None
    state = DeliveryState.read_or_new(run_path)
    try:
        if state.phase == "waiting":
            with ask_for_handover(run_path):
                wait_for_delivery(run_path, HANDOVER_WAIT_S)
        if not is_being_delivered(run_path):
            phase = "started"
            start_detached(run_path)
    except OSError as problem:  # of a run of somebody else, for example
        phase, error = "gave up", str(problem)
    state = DeliveryState.read_or_none(run_path) or state
    behind = rows_behind(run_path, state)
    found = {"phase": phase, "error": error or state.error, "behind": behind}
    return SyncResult.from_state(run_path.name, state, **found)
