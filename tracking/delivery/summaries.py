"""What an ended run shows of itself: its curves as a picture, its records as Parquet."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
from pyarrow import compute as pc
from pyarrow import parquet as pq

from tracking.plot import curves
from tracking.read import PastRun

CURVES, RECORDS = "curves.png", "records.parquet"


def write_summaries(run_path: Path) -> list[Path]:
    """Write ``curves.png`` and ``records.parquet`` below the run's artifacts.

    Made by the delivery process, so that training never waits for a picture.

    Parameters
    ----------
    run_path
        Folder of the run.

    Returns
    -------
    Files written; without a picture where there is nothing to draw. A file of the
    user's that has one of the names stays.
    """
    folder = run_path / "artifacts"
    folder.mkdir(exist_ok=True)
    run = PastRun(run_path)
    table = run.records()
    logged = set(run.records(what="artifacts")["name"].to_pylist())
    made = []
    if RECORDS not in logged:
        pq.write_table(table, folder / RECORDS, compression="zstd")
        made.append(folder / RECORDS)
    metrics = table.filter(pc.equal(table["what"].cast(pa.string()), "metrics"))
    rows = [
        (row["set"], row["name"], row["index"], row["value"])
        for row in metrics.to_pylist()
        if row["value"] is not None and row["index"] is not None
    ]
    if rows and CURVES not in logged:
        curves(rows, folder / CURVES)
        made.append(folder / CURVES)
    return made
