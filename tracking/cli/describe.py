"""Describe a run as plain values, for tables and JSON."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tracking.curves.charts import ChartLimits, Charts, Line, choose_charts
from tracking.delivery.state import DeliveryState
from tracking.journal.fits import get_fits, name_in_fit
from tracking.read import PastRun, Snapshot
from tracking.store import (
    Manifest,
    find_writers,
    get_first_error,
    get_status,
    list_rank_dirs,
)

MAX_CHARTS: Final = 4
"""Charts of one run; ``harness ui`` shows all."""

LIMITS: Final = ChartLimits(charts=MAX_CHARTS, lines=8, columns=200)
"""A terminal has a mark for each of eight lines."""


def summarize_run(run: PastRun, read: Snapshot | None = None) -> dict[str, Any]:
    """Values that ``harness runs list`` shows of a run, and can choose and sort runs by.

    Parameters
    ----------
    read
        Its records; None: read here.
    """
    manifest = run.manifest
    status = get_status(run.path, manifest)
    read = read or run.snapshot()
    state = DeliveryState.read_or_none(run.path)
    if state is None and manifest.deliver:
        state = DeliveryState()
    return {
        "id": run.id,
        "name": manifest.name,
        "status": status,
        "experiment": manifest.experiment,
        "created": manifest.created,
        "duration_s": _measure_duration_s(manifest, status),
        # None for a run that is not delivered at all.
        "behind": state and max(state.behind, read.count_rows_after(state.delivered)),
        "params": read.params,
        "tags": read.tags,
        "metrics": read.summary(),
        "path": str(run.path),
    }


def collect_charts(read: Snapshot, most: int = MAX_CHARTS) -> Charts:
    """Lines of the main metrics of a run, in its last fit, for a terminal."""
    points = read.points
    fit = points.find_last_fit()
    lines: dict[str, dict[str, Line]] = {}
    for number, name in enumerate(points.names):
        line = points.get_line(number, fit)
        if len(line[0]):
            label = name.set or name.metric
            if fit > 1:
                label += f", fit {fit}"
            lines.setdefault(name.metric, {})[label] = line
    return choose_charts(lines, replace(LIMITS, charts=most))


def compare_curves(reads: Mapping[str, Snapshot], key: str) -> Charts:
    """Lines of one metric of several runs, in the first fit of each.

    Parameters
    ----------
    reads
        Records by the name of a run's line.
    key
        The metric, as ``<set>/<name>``; later fits have other names.
    """
    lines = {}
    for name, read in reads.items():
        points = read.points
        if key in points.keys:
            number = points.keys.index(key)
            lines[name] = points.get_line(number, 1)
    return choose_charts({key: lines}, LIMITS)


def describe_origin(run: PastRun, read: Snapshot) -> dict[str, str]:
    """Texts on the code, the packages and the data of a run, by what they are about."""
    manifest = run.manifest
    git = manifest.git or {}
    found = {
        "commit": str(git.get("commit") or ""),
        "branch": str(git.get("branch") or ""),
        "code.diff": _describe_file(run.path / "artifacts" / "code.diff"),
        "command": format_command(manifest.command),
        "python": manifest.python,
        "host": manifest.host,
        "devices": ", ".join(manifest.devices),
    }
    found |= {f"package {name}": text for name, text in manifest.packages.items()}
    for context, sets in read.inputs.items():
        for about in sets if isinstance(sets, list) else [sets]:
            facts = dict(about) if isinstance(about, dict) else {"": about}
            place = f"data {facts.pop('name', context)}"
            found |= {f"{place} {key}".rstrip(): str(facts[key]) for key in facts}
    return {name: text for name, text in found.items() if text}


def format_command(words: Sequence[str]) -> str:
    """Return a command line as it was typed: programs without their folders.

    Examples
    --------
    >>> format_command(["/venv/bin/python3", "/venv/bin/harness", "fit", "a.py:run"])
    'harness fit a.py:run'
    >>> format_command(["/venv/bin/python3", "train.py"])
    'python3 train.py'
    """
    program, *rest = words or [""]
    is_script = program.rpartition("/")[2].startswith("python") and rest
    if is_script and rest[0].startswith("/") and not rest[0].endswith(".py"):
        program, *rest = rest
    return " ".join([program.rpartition("/")[2], *rest])


def _describe_file(path: Path) -> str:
    """Return the lines of a text file, and a digest; empty if there is none."""
    try:
        content = path.read_bytes()
    except OSError:
        return ""
    lines = content.count(b"\n")
    return f"{lines} lines, {hashlib.sha256(content).hexdigest()[:8]}"


def describe_run(run: PastRun, read: Snapshot | None = None) -> dict[str, Any]:
    """Values that ``harness runs show`` shows of a run.

    Parameters
    ----------
    read
        Its records; None: read here.

    Returns
    -------
    the values of ``summarize_run``, and ``note, error, command, cwd, host, git, resumed,
    origin, items, rows, ranks, damage, mlflow``, and ``writer``: who may still write a run
    of which it is not known whether it runs
    """
    manifest = run.manifest
    read = read or run.snapshot()
    writers = find_writers(run.path).values()
    return {
        **summarize_run(run, read),
        "note": manifest.note,
        "error": get_first_error(run.path, manifest),
        "command": manifest.command,
        "cwd": manifest.cwd,
        "host": manifest.host,
        "git": manifest.git,
        "resumed": manifest.resumed,
        "origin": describe_origin(run, read),
        "items": list_items(read),
        "rows": read.records.num_rows,
        "ranks": len(list_rank_dirs(run.path)),
        "damage": [vars(damage) for damage in read.damage],
        "mlflow": _describe_delivery(DeliveryState.read_or_none(run.path)),
        "writer": next((str(one) for one in writers if one.state == "unknown"), None),
    }


def list_items(read: Snapshot) -> list[dict[str, Any]]:
    """Describe each series of images, tables and histograms.

    Returns
    -------
    one dictionary for each: ``kind``, ``name``, ``count``, ``last`` (step, else number)
    and ``file`` of the last one; None for a histogram, which has none
    """
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for kind in ("images", "tables", "histograms"):
        rows = read.select(kind)
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


def _measure_duration_s(manifest: Manifest, status: str) -> float | None:
    """Seconds from start to end, or to now while it runs; None if the end is unknown."""
    if not manifest.created:
        return None
    start = datetime.fromisoformat(manifest.created)
    if manifest.ended:
        return (datetime.fromisoformat(manifest.ended) - start).total_seconds()
    if status == "running":
        return (datetime.now(UTC) - start).total_seconds()
    return None


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
