"""Tell the fits of one run apart: which of them logged a row.

A second fit in one run counts its epochs and steps from the beginning again. A row of the
kind ``fit`` says to which fit the rows behind it belong. Rows before the first such row
belong to fit 1, and so does what is logged when a later fit has ended. A rewind goes back
to the fit at its position.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tracking.journal.arrays import make_array, read_array

FitNumbers = np.ndarray[Any, np.dtype[np.int64]]

COLUMN: Final = pa.field("fit", pa.int32(), nullable=False)
"""Column that a table of records gets if a run has several fits."""

MAX_FIT: Final = np.iinfo(np.int32).max


@dataclass
class Fits:
    """Which fit logged the rows of one rank."""

    #: ``seq`` of the rows behind which another fit may go on, in order
    starts: list[int] = field(default_factory=lambda: [-1])
    #: the fit behind each of them
    numbers: list[int] = field(default_factory=lambda: [1])

    def begin(self, seq: int, number: int) -> None:
        """Add a row behind which a fit begins; one with no number of a fit is passed over."""
        if 1 <= number <= MAX_FIT:
            self.starts.append(seq)
            self.numbers.append(number)

    def rewind(self, seq: int, position: int) -> None:
        """Add a rewind."""
        self.begin(seq, self.find_one(position))

    def find_one(self, seq: int) -> int:
        """Return the fit of one row."""
        return self.numbers[bisect_right(self.starts, seq) - 1]

    def find(self, seq: np.ndarray[Any, Any]) -> FitNumbers:
        """Return the fit of each row, superseded ones included."""
        at = np.searchsorted(np.array(self.starts), seq, side="right") - 1
        fits: FitNumbers = np.array(self.numbers, np.int64)[at]
        return fits

    def label(self, table: pa.Table) -> pa.Table:
        """Add the column ``fit`` to a table with rows of a later fit; else return it."""
        if len(self.starts) == 1:
            return table
        fits = self.find(read_array(table["seq"]))
        if not (fits > 1).any():
            return table
        return table.append_column(COLUMN, make_array(fits.astype(np.int32)))


def get_fits(table: pa.Table) -> FitNumbers:
    """Return the fit of each row of a table that ``Fits.label`` returned."""
    if COLUMN.name not in table.column_names:
        return np.ones(table.num_rows, np.int64)
    fits: FitNumbers = read_array(table[COLUMN.name]).astype(np.int64)
    return fits


def align_fits(tables: list[pa.Table], at: int) -> list[pa.Table]:
    """Give all tables the column ``fit`` at a place, if any of them has it."""
    if not any(COLUMN.name in table.column_names for table in tables):
        return tables
    return [place_fits(table, at) for table in tables]


def place_fits(table: pa.Table, at: int) -> pa.Table:
    """Give a table the column ``fit`` at a place, whether it has one already or not."""
    fits = make_array(get_fits(table).astype(np.int32))
    others = [name for name in table.column_names if name != COLUMN.name]
    return table.select(others).add_column(at, COLUMN, fits)


def name_in_fit(name: str, fit: int) -> str:
    """Name of a value of one fit, where names have to differ between fits.

    Examples
    --------
    >>> name_in_fit("valid/loss", 1), name_in_fit("valid/loss", 2)
    ('valid/loss', 'valid/loss_fit2')
    """
    return name if fit == 1 else f"{name}_fit{fit}"
