"""Describe a run as plain values, for tables and JSON."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tracking.delivery.state import DeliveryState, rows_behind
from tracking.journal.fits import get_fits, name_in_fit
from tracking.read import FIT, PastRun
from tracking.store import get_first_error, list_rank_dirs


def summarize_run(run: PastRun) -> dict[str, Any]:
    """Values that ``harness runs list`` shows of a run, and can choose and sort runs by."""
    manifest = run.manifest
    state = DeliveryState.read_or_none(run.path)
    return {
        "id": run.id,
        "name": manifest.name,
        "status": run.status,
        "experiment": manifest.experiment,
        "created": manifest.created,
        "duration_s": _measure_duration_s(run),
        "behind": _count_rows_behind(run, state),
        "path": str(run.path),
        "params": run.params,
        "tags": run.tags,
        "metrics": run.summary(),
    }


def list_curves(run: PastRun) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Points of each metric of a run by name and set, the loss first.

    Of several fits, the last one's.
    """
    wide = run.wide()
    if wide.column_names[0] == FIT and len(wide):
        last = max(wide[FIT].to_pylist())
        wide = wide.filter([fit == last for fit in wide[FIT].to_pylist()])
    index = wide["index"].to_pylist()
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for key in wide.column_names:
        if key in {FIT, "index"}:
            continue
        split, _, name = key.rpartition("/")
        points = [
            (at, value)
            for at, value in zip(index, wide[key].to_pylist(), strict=True)
            if value is not None
        ]
        found.setdefault(name, {})[split or key] = points
    return dict(sorted(found.items(), key=lambda item: item[0] != "loss"))


def describe_origin(run: PastRun) -> dict[str, str]:
    """Texts on the code, the packages and the data of a run, by what they are about."""
    manifest, git = run.manifest, run.manifest.git or {}
    found = {
        "commit": str(git.get("commit") or ""),
        "branch": str(git.get("branch") or ""),
        "code.diff": _describe_file(run.path / "artifacts" / "code.diff"),
        "command": " ".join(manifest.command),
        "python": manifest.python,
        "host": manifest.host,
        "devices": ", ".join(manifest.devices),
    }
    found |= {f"package {name}": text for name, text in manifest.packages.items()}
    for context, sets in run.inputs.items():
        for about in sets if isinstance(sets, list) else [sets]:
            facts = dict(about) if isinstance(about, dict) else {"": about}
            place = f"data {facts.pop('name', context)}"
            found |= {f"{place} {key}".rstrip(): str(facts[key]) for key in facts}
    return {name: text for name, text in found.items() if text}


def _describe_file(path: Path) -> str:
    """Return the lines of a text file, and a digest; empty if there is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    lines = content.count(b"\n")
    return f"{lines} lines, {hashlib.sha256(content).hexdigest()[:8]}"


def describe_run(run: PastRun) -> dict[str, Any]:
    """Values that ``harness runs show`` shows of a run.

    Returns
    -------
    the values of ``summarize_run``, and ``note, error, command, cwd, host, git, resumed,
    origin, items, rows, ranks, damage, mlflow``
    """
    manifest = run.manifest
    state = DeliveryState.read_or_none(run.path)
    return {
        **summarize_run(run),
        "note": manifest.note,
        "error": get_first_error(run.path, manifest),
        "command": manifest.command,
        "cwd": manifest.cwd,
        "host": manifest.host,
        "git": manifest.git,
        "resumed": manifest.resumed,
        "origin": describe_origin(run),
        "items": list_items(run),
        "rows": run.records().num_rows,
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
        "mlflow": _describe_delivery(state),
    }


def list_items(run: PastRun) -> list[dict[str, Any]]:
    """Describe each series of images, tables and histograms.

    Returns
    -------
    one dictionary for each: ``kind``, ``name``, ``count``, ``last`` (step, else number)
    and ``file`` of the last one; None for a histogram, which has none
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in ("images", "tables", "histograms"):
        rows = run.records(what=kind)
        for fit, row in zip(get_fits(rows).tolist(), rows.to_pylist(), strict=True):
            if row["kind"] != "json":  # a number that the user logged under such a word
                continue
            name = name_in_fit(row["set"], fit)
            item = found.setdefault(
                (kind, name), {"kind": kind, "name": name, "count": 0}
            )
            item["count"] += 1
            item["last"] = row["index"] if row["step"] is None else row["step"]
            item["file"] = f"artifacts/{row['name']}" if row["name"] else None
    return list(found.values())


def _measure_duration_s(run: PastRun) -> float | None:
    """Seconds from start to end, or to now while it runs; None if the end is unknown."""
    manifest = run.manifest
    if not manifest.created:
        return None
    start = datetime.fromisoformat(manifest.created)
    if manifest.ended:
        return (datetime.fromisoformat(manifest.ended) - start).total_seconds()
    if run.status == "running":
        return (datetime.now(UTC) - start).total_seconds()
    return None


def _count_rows_behind(run: PastRun, state: DeliveryState | None) -> int | None:
    """Rows that MLflow has not received; None if the run is not delivered at all."""
    if state is None and not run.manifest.deliver:
        return None
    return rows_behind(run.path, state or DeliveryState())


def _describe_delivery(state: DeliveryState | None) -> dict[str, Any] | None:
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
