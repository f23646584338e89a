"""A run's journal against its exported files and MLflow, row by row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tracking.delivery.sync import read_mlflow, wait_for_delivery
from tracking.read import PastRun
from tracking.verify.finding import Finding
from tracking.verify.mlflow import against_mlflow
from tracking.verify.parquet import against_file, exports_of

DELIVERY_S: Final = 30.0
"""A run that has just ended is waited for so long, until all of it is delivered."""

__all__ = ["Finding", "Verification", "verify"]


@dataclass
class Verification:
    """What comparing a run's records gave.

    Attributes
    ----------
    run
        Id of the run.
    findings
        Rows that are not the same everywhere.
    notes
        What MLflow cannot hold as it is, and so holds otherwise.
    num_rows
        By place: rows in the journal that should be there, and rows that are there.
    """

    run: str
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_rows: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        """Whether every row is the same everywhere."""
        return not self.findings

    def message(self) -> str:
        """What is amiss, in a line; empty if nothing is."""
        if not self.findings:
            return ""
        first = self.findings[0]
        if first.place == "journal":
            return (
                f"verify: run {self.run} expected a whole journal, got damage: "
                f"{first.row} {first.kind} ({first.detail}). What is before it is whole."
            )
        rows = "metric rows" if first.place == "MLflow" else "rows"
        here, there = self.num_rows[first.place]
        mend = f"Run 'harness sync {self.run}'."
        if first.place != "MLflow":
            mend = f"Run 'harness export {self.run} --to {first.place}'."
        return (
            f"verify: run {self.run} expected equal records, got {here} {rows} in the "
            f"journal and {there} in {first.place}; first {first.kind} {first.row}. "
            f"{mend}"
        )


def verify(
    run: PastRun, files: Iterable[Path] | None = None, *, mlflow: bool = True
) -> Verification:
    """Compare a run's journal with exported Parquet files and with MLflow.

    Parameters
    ----------
    run
        A run, ended or not.
    files
        Parquet files that it was exported to, alone or with others; None: those among
        its artifacts that hold records, once it has ended.
    mlflow
        Whether to compare with MLflow, which has the rows of rank 0.

    Returns
    -------
    rows that are missing, doubled, changed, superseded, or unknown to the journal

    Raises
    ------
    DeliveryError
        If MLflow has no such run, or cannot be reached.
    ValueError
        If a file holds no records.
    """
    is_live = run.status == "running"
    if not is_live:
        wait_for_delivery(run.path, DELIVERY_S)
    found = Verification(run.id)
    for damage in run.damage:
        lost = f"{damage.rows_lost} rows of {damage.file.name}"
        found.findings.append(Finding("journal", "missing", lost, damage.reason))
    if files is None:
        files = [] if is_live else exports_of(run)
    for file in files:
        differing, here, there = against_file(run, file)
        found.findings += differing
        found.num_rows[file.name] = here, there
    if mlflow:
        compared = against_mlflow(run, read_mlflow(run))
        found.findings += compared.findings
        found.notes += compared.notes
        found.num_rows["MLflow"] = compared.num_here, compared.num_there
    return found
