"""Writes the metrics of each epoch to a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path

from harness.callback import MetricsListener
from harness.checks.values import as_path, check_folder
from harness.context import Context
from harness.records import metrics_frame


def format_value(value: object) -> str:
    """Return a number as a float with all its digits, anything else as Python prints it."""
    return repr(float(value)) if isinstance(value, int | float) else str(value)


class CSVLogger(MetricsListener):
    """Appends one line for each metric and epoch: ``epoch,set,metric,value``.

    In a fit that validates by steps, the first column is ``step``, with lines for each
    validation.

    Parameters
    ----------
    path
        File to write, ``~`` for the home folder; an existing file is replaced when the fit begins.

    References
    ----------
    luz 0.5.0, ``luz_callback_csv_logger``. Differs from luz: one metric a line, so that
    a metric that is first logged later needs no new column.
    """

    weight = 60

    def __init__(self, path: str | Path) -> None:
        self.path = as_path("CSVLogger(path)", path).expanduser()

    def check(self, ctx: Context) -> None:
        """Refuse a path where no file can be written."""
        check_folder("CSVLogger(path)", self.path.parent)
        if self.path.is_dir():
            msg = f"CSVLogger(path): expected a file, got {str(self.path)!r}"
            raise IsADirectoryError(f"{msg}, a folder. Add a name, such as 'log.csv'.")

    def on_fit_begin(self) -> None:
        """Create the file; a resumed fit keeps the old one until it has an epoch to add."""
        self._is_begun, self._written = False, 0
        self._last: list[tuple[object, ...]] = []
        if self.ctx.resume is None and self.ctx.accelerator.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write([self._columns], "w")

    @property
    def _columns(self) -> tuple[str, ...]:
        return (self.ctx.pace.unit, "set", "metric", "value")

    def on_epoch_end(self) -> None:
        """Add the metrics of the epoch, or of the rest that no validation followed."""
        self.react()

    def react(self) -> None:
        """Add the new metrics; write all where there is no file yet, or a value was replaced.

        By steps, values are replaced if no optimizer stepped between two epochs.
        """
        if not self.ctx.accelerator.is_main:
            return
        now = self.ctx.index or 0
        lines, num_last = self._format(self._written, now), len(self._last)
        if self._is_begun and lines[:num_last] == self._last:
            self._write(lines[num_last:], "a")
        else:
            self._write([self._columns, *self._format()], "w")
        self._last = [line for line in lines if line[0] == now]
        self._is_begun, self._written = True, now

    def _format(
        self, first: int = 1, last: int | None = None
    ) -> list[tuple[object, ...]]:
        frame = metrics_frame(self.ctx.records, self.ctx.pace.unit, first, last)
        frame = frame.sort_values(self.ctx.pace.unit, kind="stable")
        rows = zip(*(frame[name] for name in self._columns), strict=True)
        return [(at, split, metric, format_value(v)) for at, split, metric, v in rows]

    def _write(self, rows: Iterable[tuple[object, ...]], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
