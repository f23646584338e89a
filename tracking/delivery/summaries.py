"""Summaries of an ended run: its curves as a picture, its records as Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import parquet as pq

from tracking.durable import replace_file, write_atomically
from tracking.journal.fits import get_fits
from tracking.plot import MAX_LINES, MAX_PANELS, MAX_POINTS, plot_curves, thin
from tracking.read import PastRun
from tracking.store import read_environment

CURVES, RECORDS = "curves.png", "records.parquet"
DIFF: Final = "code.diff"
"""Written here for a run that was killed before it could."""


def write_summaries(run_path: Path) -> list[Path]:
    """Write ``curves.png`` and ``records.parquet`` into the run's artifacts.

    The delivery process does this, so that training never waits for a picture.

    Parameters
    ----------
    run_path
        Folder of the run.

    Returns
    -------
    files that were written; no picture if there is nothing to draw

    Notes
    -----
    A file that the user logged under one of these names is kept.
    """
    folder = run_path / "artifacts"
    folder.mkdir(exist_ok=True)
    if folder.is_symlink():  # it may lead anywhere
        return []
    run = PastRun(run_path)
    table = run.records()
    logged = set(run.records(what="artifacts")["name"].to_pylist())
    written = []
    if RECORDS not in logged:
        with replace_file(folder / RECORDS) as temporary:
            pq.write_table(table, temporary, compression="zstd")
        written.append(folder / RECORDS)
    if CURVES not in logged and (rows := _collect_points(table)):
        with replace_file(folder / CURVES) as temporary:
            plot_curves(rows, temporary, unit=find_unit(table))
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


def _collect_points(table: pa.Table) -> list[tuple[str, str, int, float]]:
    """Set, name, index and value of the points to draw, of as many names as fit."""
    is_metric = pc.equal(table["what"].cast(pa.string()), "metrics")
    has_place = pc.and_(pc.is_valid(table["index"]), pc.is_valid(table["value"]))
    table = table.filter(pc.and_(is_metric, has_place))
    words = {column: table[column].cast(pa.string()) for column in ("set", "name")}
    fits = pa.array(get_fits(table))
    later = pc.binary_join_element_wise(words["set"], fits.cast(pa.string()), ", fit ")
    words["set"] = pc.if_else(pc.greater(fits, 1), later, words["set"])
    table = pa.table({**words, "index": table["index"], "value": table["value"]})
    # One more than fits, so that the picture says that there are more.
    names = pc.unique(table["name"])[: MAX_PANELS + 1]
    table = table.filter(pc.is_in(table["name"], names))
    rows: list[tuple[str, str, int, float]] = []
    for name in names.to_pylist():
        series = table.filter(pc.equal(table["name"], name))
        for split in pc.unique(series["set"])[:MAX_LINES].to_pylist():
            line = series.filter(pc.equal(series["set"], split))
            line = line.take(pa.array(thin(range(line.num_rows), MAX_POINTS)))
            points = zip(
                *(line[c].to_pylist() for c in ("index", "value")), strict=True
            )
            rows += [(split, name, index, value) for index, value in points]
    return rows
