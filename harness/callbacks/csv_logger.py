"""Writes the metrics of each epoch to a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

from harness.callback import Callback


class CSVLogger(Callback):
    """Appends one line for each metric and epoch: ``epoch,set,metric,value``.

    Parameters
    ----------
    path
        File to write; an earlier one is replaced when the fit begins.

    References
    ----------
    luz 0.5.0, ``luz_callback_csv_logger``. Differs from luz: one metric a line, so that
    metrics that begin later need no new column.
    """

    weight = 60

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_fit_begin(self) -> None:
        """Begin the file."""
        if self.ctx.accelerator is not None and self.ctx.accelerator.is_main:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write([("epoch", "set", "metric", "value")], "w")

    def on_epoch_end(self) -> None:
        """Add the epoch's metrics."""
        if self.ctx.accelerator is not None and self.ctx.accelerator.is_main:
            frame = self.ctx.get_metrics_df()
            now = frame[frame["epoch"] == self.ctx.epoch]
            rows = zip(
                now["epoch"], now["set"], now["metric"], now["value"], strict=True
            )
            self._write([(e, s, m, repr(float(v))) for e, s, m, v in rows], "a")

    def _write(self, rows: list[tuple[object, ...]], mode: str) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(rows)
