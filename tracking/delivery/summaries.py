"""Summaries of an ended run: its curves as a picture, its records as Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import parquet as pq

from tracking.plot import plot_curves
from tracking.read import PastRun

CURVES, RECORDS = "curves.png", "records.parquet"


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
    run = PastRun(run_path)
    table = run.records()
    logged = set(run.records(what="artifacts")["name"].to_pylist())
    written = []
    if RECORDS not in logged:
        pq.write_table(table, folder / RECORDS, compression="zstd")
        written.append(folder / RECORDS)
    metrics = table.filter(pc.equal(table["what"].cast(pa.string()), "metrics"))
    rows = [
        (row["set"], row["name"], row["index"], row["value"])
        for row in metrics.to_pylist()
        if row["value"] is not None and row["index"] is not None
    ]
    if rows and CURVES not in logged:
        plot_curves(rows, folder / CURVES)
        written.append(folder / CURVES)
    return written
