"""Summaries of an ended run: its curves as a picture, its records as Parquet, its results."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import parquet as pq

from tracking.curves.charts import Array, Charts, Line, choose_charts
from tracking.curves.plot import LIMITS, plot_charts
from tracking.curves.points import collect_points
from tracking.durable import replace_file, write_atomically
from tracking.read import PastRun
from tracking.store import read_environment, results_path

CURVES, RECORDS = "curves.png", "records.parquet"
MAX_RESULTS: Final = 20
"""Rows of the table of results in a run's description."""

DIFF: Final = "code.diff"
"""Written here for a run that was killed before it could."""


def write_summaries(run_path: Path) -> list[Path]:
    """Write ``curves.png`` and ``records.parquet`` into the run's artifacts.

    The results, for the run's description in MLflow, go beside the state of the delivery.
    The delivery process does this, so that training never waits for a picture.

    Notes
    -----
    A file that the user logged under one of these names is kept.
    """
    folder = run_path / "artifacts"
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():  # it may lead anywhere
        return []
    run = PastRun(run_path)
    read = run.snapshot()
    table = read.records
    logged = set(read.select("artifacts")["name"].to_pylist())
    with contextlib.suppress(FileNotFoundError):  # of a run that is not delivered
        text = describe_results(table, find_unit(table))
        write_atomically(results_path(run_path), text.encode(errors="replace"))
    written = []
    if RECORDS not in logged:
        with replace_file(folder / RECORDS) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        written.append(folder / RECORDS)
    charts = collect_charts(table)
    if CURVES not in logged and charts.lines:
        with replace_file(folder / CURVES) as temporary:
            plot_charts(charts, temporary, unit=find_unit(table))
        written.append(folder / CURVES)
    found = read_environment(run_path)
    if DIFF not in logged and found is not None and found.diff:
        write_atomically(folder / DIFF, found.diff.encode(errors="replace"))
        written.append(folder / DIFF)
    return written


def find_unit(table: pa.Table) -> str:
    """What the indices of metrics count, ``epoch`` or ``step``, by the rows' own columns."""
    metrics = table.filter(pc.equal(table["what"].cast(pa.string()), "metrics"))
    has_epochs, has_steps = (
        pc.all(pc.equal(metrics["index"], metrics[column])).as_py()
        for column in ("epoch", "step")
    )
    return "step" if has_steps and not has_epochs else "epoch"


def collect_charts(table: pa.Table) -> Charts:
    """Lines of the metrics of a run, by name and set; each fit has lines of its own."""
    return choose_charts(_collect_lines(table), LIMITS)


def _collect_lines(table: pa.Table) -> dict[str, dict[str, Line]]:
    """All points of the metrics of a run, by name and set."""
    points = collect_points(table)
    lines: dict[str, dict[str, Line]] = {}
    for number, name in enumerate(points.names):
        if name.is_step:
            continue
        for fit in np.unique(points.fit[points.find(number)]).tolist():
            split = name.set if fit == 1 else f"{name.set}, fit {fit}"
            lines.setdefault(name.metric, {})[split] = points.get_line(number, fit)
    return lines


def describe_results(table: pa.Table, unit: str) -> str:
    """Describe in Markdown the last, lowest and highest value of each metric, the loss first.

    Parameters
    ----------
    unit
        What the indices of metrics count.
    """
    sets = _collect_lines(table)
    names = sorted(sets, key=lambda name: name != "loss")
    lines = [
        (name, split, line) for name in names for split, line in sets[name].items()
    ]
    if not lines:
        return ""
    last = max(places.max() for *_, (places, _) in lines)
    found = [f"**Results** after {unit} {last}", ""]
    found += ["| | last | lowest | highest |", "| --- | --- | --- | --- |"]
    for name, split, line in lines[:MAX_RESULTS]:
        label = "/".join(filter(None, (split, name))).replace("|", "\\|")
        cells = _describe_line(*line)
        found.append(f"| {' | '.join([' '.join(label.split()), *cells])} |")
    if len(lines) > MAX_RESULTS:
        found += ["", f"and {len(lines) - MAX_RESULTS} more"]
    return "\n".join(found) + "\n"


def _describe_line(places: Array, values: Array) -> list[str]:
    """The last value of a metric, and its lowest and highest with their places."""
    texts = [f"{values[-1]:.4g}"]
    for choose in (np.nanargmin, np.nanargmax):
        if np.isnan(values).all():
            texts.append("")
        else:
            at = choose(values)
            texts.append(f"{values[at]:.4g} ({places[at]})")
    return texts
