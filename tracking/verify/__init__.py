"""Compare a run's journal with its exported files and with MLflow, row by row."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Mismatch:
    """One row that differs between the journal and another place.

    Attributes
    ----------
    place
        Where the row is wrong: ``MLflow``, ``journal``, or the name of a file.
    kind
        ``missing``, ``duplicate``, ``changed``, ``superseded`` (the row was rewound or
        overwritten since), or ``unknown`` (the journal has no such row).
    row
        What the row is and where it belongs, e.g. ``train/loss at step 7``.
    detail
        The values of the row, if any.
    """

    place: str
    kind: str
    row: str
    detail: str = ""

    def describe_row(self) -> str:
        """The row and its values in words."""
        return f"{self.row}: {self.detail}" if self.detail else self.row

    def __str__(self) -> str:
        return f"{self.kind} in {self.place}: {self.describe_row()}"


@dataclass
class Comparison:
    """Result of comparing a journal with one other place.

    Attributes
    ----------
    mismatches
        Rows that differ.
    notes
        What the other place cannot store exactly, or has not received yet.
    num_expected, num_found
        Rows that the journal says should be there, and rows that are there.
    """

    mismatches: list[Mismatch] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    num_expected: int = 0
    num_found: int = 0
