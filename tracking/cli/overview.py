"""A run in a few words and numbers, as commands show it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from tracking.delivery.state import DeliveryState, rows_behind
from tracking.read import PastRun
from tracking.store import get_first_error, list_rank_dirs


def brief(run: PastRun) -> dict[str, Any]:
    """What a list of runs tells of one."""
    manifest = run.manifest
    state = DeliveryState.read(run.path)
    return {
        "id": run.id,
        "name": manifest.name,
        "status": run.status,
        "experiment": manifest.experiment,
        "created": manifest.created,
        "duration_s": duration_s(run),
        "behind": behind(run, state),
        "path": str(run.path),
    }


def overview(run: PastRun) -> dict[str, Any]:
    """All that `harness runs show` tells.

    Returns
    -------
    what `brief` has, and ``note, error, command, cwd, host, git, resumed, params, tags,
    metrics, rows, ranks, damage, mlflow``
    """
    manifest = run.manifest
    state = DeliveryState.read(run.path)
    table = run.records()
    return {
        **brief(run),
        "note": manifest.note,
        "error": get_first_error(run.path, manifest),
        "command": manifest.command,
        "cwd": manifest.cwd,
        "host": manifest.host,
        "git": manifest.git,
        "resumed": manifest.resumed,
        "params": run.params,
        "tags": run.tags,
        "metrics": run.summary(),
        "rows": table.num_rows,
        "ranks": len(list_rank_dirs(run.path)),
        "damage": [
            {
                "file": str(damage.file),
                "offset": damage.offset,
                "rows_lost": damage.rows_lost,
                "reason": damage.reason,
            }
            for damage in run.damage
        ],
        "mlflow": _mlflow(state),
    }


def duration_s(run: PastRun) -> float | None:
    """Seconds from the start to the end, or to now; None if nobody knows the end."""
    manifest = run.manifest
    if not manifest.created:
        return None
    start = datetime.fromisoformat(manifest.created)
    if manifest.ended:
        return (datetime.fromisoformat(manifest.ended) - start).total_seconds()
    if run.status == "running":
        return (datetime.now(UTC) - start).total_seconds()
    return None


def behind(run: PastRun, state: DeliveryState | None) -> int | None:
    """Rows that MLflow lacks; None if the run is not delivered at all."""
    if state is None and not run.manifest.deliver:
        return None
    return rows_behind(run.path, state or DeliveryState())


def _mlflow(state: DeliveryState | None) -> dict[str, Any] | None:
    """Where a run is in MLflow."""
    if state is None:
        return None
    return {
        "tracking_uri": state.tracking_uri,
        "experiment_id": state.experiment_id,
        "run_id": state.mlflow_run_id,
        "page": state.page,
        "phase": state.phase,
        "error": state.error,
        "flags": state.flags,
        "superseded": state.superseded,
    }
