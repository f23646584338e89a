"""Verify that exported files and MLflow hold the records of a run's journal."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tracking.delivery.process import wait_for_delivery
from tracking.delivery.sync import MlflowReader, read_mlflow
from tracking.read import PastRun
from tracking.verify import Comparison, Mismatch
from tracking.verify.mlflow import compare_with_mlflow
from tracking.verify.parquet import compare_with_file, find_exports

DELIVERY_S: Final = 30.0
"""Seconds to wait for the delivery of a run that has just ended."""


@dataclass
class Verification:
    """Result of verifying one run.

    Attributes
    ----------
    mismatches
        Rows that are not the same everywhere.
    notes
        What MLflow cannot store exactly, or has not received yet.
    num_rows
        By place: rows that the journal says should be there, and rows that are there.
    """

    run: str
    mismatches: list[Mismatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_rows: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def is_equal(self) -> bool:
        """Whether every row is the same everywhere."""
        return not self.mismatches

    def message(self) -> str:
        """One line that describes the first mismatch; empty if there is none."""
        if not self.mismatches:
            return ""
        first = self.mismatches[0]
        if first.place == "journal":
            return (
                f"verify: run {self.run} expected an undamaged journal, got damage: "
                f"{first.row} {first.kind} ({first.detail}). The rows before it are "
                "intact."
            )
        expected, found = self.num_rows[first.place]
        if first.place == "MLflow":
            rows, advice = "metric rows", f"Run 'harness sync {self.run}'."
        elif first.kind == "unknown":  # an export would take away what only it has
            rows, advice = "rows", "Keep the file: the journal has lost these rows."
        else:
            command = f"harness export {self.run} --to {first.place}"
            rows, advice = "rows", f"Run '{command}'."
        return (
            f"verify: run {self.run} expected equal records, got {expected} {rows} in "
            f"the journal and {found} in {first.place}; first {first.kind} {first.row}. "
            f"{advice}"
        )

    def add(self, place: str, comparison: Comparison) -> None:
        """Add the result of comparing with one place."""
        self.mismatches += comparison.mismatches
        self.notes += comparison.notes
        self.num_rows[place] = comparison.num_expected, comparison.num_found


def verify(
    run: PastRun,
    files: Iterable[Path] | None = None,
    *,
    mlflow: bool | MlflowReader = True,
) -> Verification:
    """Compare a run's journal with exported Parquet files and with MLflow.

    Parameters
    ----------
    run
        Any run, also one that is still being written.
    files
        Parquet files that hold records of the run. None: the exports among its
        artifacts, if the run has ended.
    mlflow
        Whether to compare with MLflow, which has the rows of rank 0. A reader serves for
        several runs; without one, MLflow is imported for each of them.

    Returns
    -------
    every row that is missing, duplicate, changed, superseded or unknown

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
    result = Verification(run.id)
    for damage in run.damage:
        lost = f"{damage.rows_lost} rows of {damage.file.name}"
        result.mismatches.append(Mismatch("journal", "missing", lost, damage.reason))
    if files is None:
        files = [] if is_live else find_exports(run)
    for file in files:
        result.add(file.name, compare_with_file(run, file))
    if mlflow:
        there = read_mlflow(run) if mlflow is True else mlflow(run)
        result.add("MLflow", compare_with_mlflow(run, there))
    return result
