"""Shows progress: a bar while a split runs, and a line for each epoch or validation."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import TYPE_CHECKING

from harness.callback import MetricsListener
from harness.callbacks.display.best import BestSoFar
from harness.callbacks.display.epoch_lines import (
    BEST,
    EpochTable,
    Values,
    format_line,
    format_time,
    wrap,
)
from harness.callbacks.display.fit_lines import describe_start, estimate_left_s
from harness.data.pace import NO_LIMIT, count_batches, count_epochs
from harness.records import format_metrics
from harness.run_binding import describe_next
from tracking.errors import get_terminal_width, is_terminal, write_stderr

if TYPE_CHECKING:
    from harness.callbacks.display.bar import ProgressBar
    from harness.callbacks.display.notebook import NotebookOutput

REDRAW_S = 0.1
"""Seconds that pass at least before a bar is drawn again."""

NOTEBOOK_WIDTH = 100
"""Columns of the output of a notebook's cell."""


class Progress(MetricsListener):
    """Shows what is trained, a bar with the metrics so far, and a table of the epochs.

    The bar is redrawn at most ten times a second. The table marks the best epoch so far with
    ``*``: by the metric that a callback of the fit monitors, otherwise by the validation
    loss. If a row does not fit the terminal, each set
    gets a line. Matrices, such as confusion matrices, are left out. The last lines repeat the
    metrics of the last and the best epoch, and say where the run is and what to type next.

    In a fit that validates by steps, the table has a row for each validation. Evaluations
    and predictions have a bar, and a line at their end. Without a terminal there is no bar,
    and each epoch is one line that can be read alone. Nothing is shown unless
    ``ctx.verbose`` is set, and nothing on ranks other than 0.

    Parameters
    ----------
    min_s : >= 0
        An evaluation or prediction ends with a line only if it took at least so many
        seconds.

    References
    ----------
    luz 0.5.0, ``luz_callback_progress``. Differs from luz: redrawn by time.
    """

    weight = 1000
    clock = staticmethod(perf_counter)

    def __init__(self, min_s: float = 0.0) -> None:
        self._bar: ProgressBar | None = None
        self._began, self._call_began = -REDRAW_S, self.clock()
        self._min_s = min_s
        self._output: NotebookOutput | None = None
        self._restart()

    def _restart(self) -> None:
        self._table = EpochTable()
        self._best: BestSoFar | None = None
        self._fit_began = self._epoch_began = self.clock()
        self._shown: list[int | None] = []
        self._peek_at = 0.0
        self._peeked: dict[str, float] = {}

    @property
    def _is_shown(self) -> bool:
        return self.ctx.verbose and self.ctx.accelerator.is_main

    @property
    def _places(self) -> dict[str, str]:
        """Where in the fit this is: the epoch, and the step if that matters."""
        ctx, epochs = self.ctx, self._num_epochs
        found = {"epoch": f"{ctx.epoch}"}
        if epochs is not None:
            found["epoch"] = f"{ctx.epoch:>{len(str(epochs))}}/{epochs}"
        if ctx.pace.max_steps is not None or ctx.pace.unit == "step":
            total = "" if ctx.total_steps is None else f"/{ctx.total_steps}"
            found["step"] = f"{ctx.step:>{max(len(total) - 1, 0)}}{total}"
        return found

    @property
    def _place(self) -> str:
        return ", ".join(f"{title} {text}" for title, text in self._places.items())

    @property
    def _num_epochs(self) -> int | None:
        """Epochs of the fit; None if they are not known."""
        epochs, most = count_epochs(self.ctx), self.ctx.max_epochs
        return most if epochs is None and most < NO_LIMIT else epochs

    def _start(self, title: str) -> None:
        self._stop()  # a skipped epoch does not end its split
        if not self._is_shown or not self._is_live:
            return
        from harness.callbacks.display.bar import ProgressBar  # noqa: PLC0415  imports rich
        from harness.callbacks.display.notebook import NotebookBar  # noqa: PLC0415  next to it

        now = self.clock()
        # If splits are shorter than a redraw, their bars are only drawn when one is due. The
        # report of a resume is still to be written, and it is not known how far the pass is.
        is_due = now - self._began >= REDRAW_S and self.ctx.resume is None
        self._began = now
        ctx = self.ctx
        bar = ProgressBar(title, count_batches(ctx), now)
        if self._output is not None:
            bar = NotebookBar(title, count_batches(ctx), now, self._output)
        if not bar.is_supported:
            return
        self._bar = bar
        if is_due:
            bar.draw(0, (), now, self._columns)

    def on_train_batch_end(self) -> None:
        """Redraw the bar if it is time."""
        bar, done = self._bar, self.ctx.iter
        if bar is None or done is None:
            return
        if bar.done_before is None:
            bar.done_before = done - 1  # a resumed pass does not start at batch 1
        now = self.clock()
        if now - bar.drawn_at >= REDRAW_S:
            left_s = self._estimate_left_s(done, bar.get_rate(done, now))
            bar.draw(done, self._list_values(now), now, self._columns, left_s)

    on_valid_batch_end = on_predict_batch_end = on_train_batch_end

    def _estimate_left_s(self, done: int, rate: float) -> float | None:
        """Estimate the time left of a fit, while it trains and has more than an epoch."""
        ctx, epochs = self.ctx, self._num_epochs
        if not ctx.training or ctx.train_pass is None or epochs in (None, 1):
            return None
        finished = len(self._shown) if ctx.pace.unit == "epoch" else 0
        took_s = self._epoch_began - self._fit_began
        epoch_s = took_s / finished if finished else None
        return estimate_left_s(ctx, done, rate, epochs, epoch_s)

    def _list_values(self, now: float) -> list[str]:
        """Texts of the loss and the metrics so far; of the last loss if there are no metrics.

        What it takes to compute them is kept below 2 % of the time.
        """
        found = (self.ctx.metrics or {}).get(self.ctx.split)
        if found is None or (self.ctx.pred is None and not self.ctx.loss):
            return self._list_losses()
        if now >= self._peek_at:
            before = self.clock()
            self._peeked = found.peek() or self._peeked
            self._peek_at = now + 50 * (self.clock() - before)
        texts = format_metrics(self._peeked)
        return [f"{name} {text}" for name, text in texts.items()] or self._list_losses()

    def _list_losses(self) -> list[str]:
        loss = self.ctx.loss
        losses = loss if isinstance(loss, dict) else {"": loss}
        shown = [
            f"{float(value):.4g}" for value in losses.values() if value is not None
        ]
        return [f"loss {' '.join(shown)}"] if shown else []

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.end()
            self._bar = None

    def on_fit_begin(self) -> None:
        self._restart()
        self._open_output()
        if self._is_shown:
            width = self._width
            for pieces in describe_start(self.ctx):
                self._write(*wrap(pieces, width, "      "))

    def on_epoch_begin(self) -> None:
        self._epoch_began = self.clock()

    def on_train_begin(self) -> None:
        self._start(f"{self._place} train")

    def on_train_end(self) -> None:
        self._stop()

    def on_valid_begin(self) -> None:
        """Draw the bar."""
        if self.ctx.train_pass is not None:
            self._start(f"{self._place} {self.ctx.split}")
            return
        if self.ctx.valid_name == next(iter(self.ctx.valid_sets)):
            self._call_began = self.clock()
            self._open_output()
        self._start(f"evaluate {self.ctx.split}")

    def on_valid_end(self) -> None:
        """Erase the bar; write the metrics if this is an evaluation."""
        self._stop()
        super().on_valid_end()
        if self.ctx.train_pass is None and self._is_last_set:
            self._write_end("evaluate")

    def on_predict_begin(self) -> None:
        self._call_began = self.clock()
        self._open_output()
        self._start("predict")

    def on_predict_end(self) -> None:
        """Erase the bar; write how long it took."""
        self._stop()
        self._write_end(f"predict {self.ctx.iter or 0} batches")

    def _write_end(self, what: str) -> None:
        """Write a line at the end of an evaluation or prediction that took long enough."""
        took_s = self.clock() - self._call_began
        if self._is_shown and took_s >= self._min_s:
            self._write_metrics(f"{what}  {took_s:5.2f} s")

    def react(self) -> None:
        """Write the metrics of the epoch, or of the steps since the last validation."""
        now = self.clock()
        took_s, self._epoch_began = now - self._epoch_began, now
        if not self._is_shown:
            return
        if self._best is None:
            self._best = BestSoFar(self.ctx)
        is_best = self._best.update(self.ctx)
        self._shown.append(self.ctx.index)
        if not self._is_live:
            self._write_metrics(f"{self._place}  {took_s:5.2f} s", is_best=is_best)
            return
        heads = {**self._places, "time": format_time(took_s)}
        values, width = (self._format_metrics(self.ctx.index), self._columns)
        self._write(*self._table.format(heads, values, width, is_best=is_best))

    def _format_metrics(self, index: int | None) -> Values:
        """Return the metrics of each set at an epoch, or step, but no matrices."""
        found = {
            split: {
                name: text
                for name, text in self.ctx.get_formatted_metrics(split, index).items()
                if not text.startswith("[[")
            }
            for split in ("train", *self.ctx.valid_sets)
        }
        return {split: metrics for split, metrics in found.items() if metrics}

    def _write_metrics(
        self, head: str, index: int | None = None, *, is_best: bool = False
    ) -> None:
        """Write a line with the metrics of an index (None: the present), in each set."""
        values = self._format_metrics(self.ctx.index if index is None else index)
        lines = format_line(head, values, self._width)
        lines[-1] = f"{lines[-1].rstrip()}  {BEST}" if is_best else lines[-1]
        self._write(*lines)

    def on_fit_end(self) -> None:
        """Write the metrics of the last and the best epoch, and what to type next."""
        self._stop()
        if not self._is_shown:
            return
        took_s = self.clock() - self._fit_began
        if not self._shown and self.ctx.step and not self.ctx.stop_signal:
            done = "all steps" if self.ctx.pace.max_steps else "all epochs"
            self._write(f"ended  nothing is left to train: {done} are done")
            self._write("       to train further, pass more epochs or steps")
        else:
            num = len(self._shown)
            what = f"{num} epoch{'' if num == 1 else 's'}"
            if self.ctx.pace.unit == "step":
                what = f"{self.ctx.step} steps"
            self._write(f"ended  {what} in {format_time(took_s)}{self._tell_monitor()}")
        self._write_last_and_best()
        self._write(*describe_next(self.ctx.run))

    def _tell_monitor(self) -> str:
        """Say which metric tells the best from the last, if it is not the usual one."""
        best = self._best
        if best is None or best.index is None or self._shown[-1:] == [best.index]:
            return ""
        is_usual = str(best.monitor).endswith("/loss")
        return "" if is_usual else f", the best by {best.monitor}"

    def _write_last_and_best(self) -> None:
        """Write the metrics of the best epoch, and those of the last if it is another."""
        best, unit = self._best, self.ctx.pace.unit
        if best is None or best.index is None or len(self._shown) < 2:
            return
        last = self._shown[-1]
        if last == best.index:
            self._write(f"best  {unit} {last}, the last one, by {best.monitor}")
            return
        rows = {"last": last, "best": best.index}
        if not self._is_live:
            for title, index in rows.items():
                self._write_metrics(f"{title}  {unit} {index} ", index)
            return
        table, width = EpochTable(), self._columns
        cells = {title: {"": title, unit: str(index)} for title, index in rows.items()}
        table.fit_heads(cells.values())
        for title, index in rows.items():
            values, is_best = self._format_metrics(index), title == "best"
            self._write(*table.format(cells[title], values, width, is_best=is_best))

    def on_early_stopping(self) -> None:
        self._stop()
        if self._is_shown:
            by_steps = self.ctx.pace.unit == "step"
            place = f"step {self.ctx.step}" if by_steps else f"epoch {self.ctx.epoch}"
            self._write(f"stopped early after {place}")

    def on_interrupt(self) -> None:
        self._stop()
        if self._is_shown:
            where = f"epoch {self.ctx.epoch}, batch {self.ctx.iter}"
            self._write(f"interrupted in {where}; everything logged so far is kept")

    def on_exception(self) -> None:
        self._stop()

    @property
    def _is_live(self) -> bool:
        """Whether what is shown can change in place."""
        return self._output is not None or is_terminal()

    @property
    def _width(self) -> int | None:
        """Columns of what shows it; None: no limit."""
        return self._columns if self._is_live else None

    @property
    def _columns(self) -> int:
        """Columns of the notebook or the terminal."""
        return get_terminal_width() if self._output is None else NOTEBOOK_WIDTH

    def _open_output(self) -> None:
        """Open an output of the notebook's cell, if this is one."""
        is_notebook = self._is_shown and "IPython" in sys.modules
        if is_notebook:
            from harness.callbacks.display.notebook import open_output  # noqa: PLC0415  imports rich

            self._output = open_output()

    def _write(self, *lines: str) -> None:
        if self._output is not None:
            self._output.write(*lines)
            return
        write_stderr("".join(f"{line.rstrip()}\n" for line in lines))
