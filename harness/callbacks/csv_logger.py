"""Writes the metrics of each epoch to a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

from harness.callback import Callback
from harness.context import Context
from harness.setup_checks import as_path, check_folder


def format_value(value: object) -> str:
    """Return a number as a float with all its digits, anything else as Python prints it."""
    return repr(float(value)) if isinstance(value, int | float) else str(value)


class CSVLogger(Callback):
    """Appends one line for each metric and epoch: ``epoch,set,metric,value``.

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
        self._is_begun = False
        if self.ctx.resume is None and self._is_writer:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write([("epoch", "set", "metric", "value")], "w")

    @property
    def _is_writer(self) -> bool:
        return self.ctx.accelerator is not None and self.ctx.accelerator.is_main

    def on_epoch_end(self) -> None:
        """Add the epoch's metrics; the first time, those of earlier epochs too."""
        if not self._is_writer:
            return
        frame = self.ctx.get_metrics_df()
        if self._is_begun:
            frame = frame[frame["epoch"] == self.ctx.epoch]
        frame = frame.sort_values("epoch", kind="stable")
        columns = (frame[name] for name in ("epoch", "set", "metric", "value"))
        rows = zip(*columns, strict=True)
        lines: list[tuple[object, ...]]
        lines = [(e, s, m, format_value(v)) for e, s, m, v in rows]
        if not self._is_begun:
            lines.insert(0, ("epoch", "set", "metric", "value"))
        self._write(lines, "a" if self._is_begun else "w")
        self._is_begun = True

    def _write(self, rows: list[tuple[object, ...]], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
