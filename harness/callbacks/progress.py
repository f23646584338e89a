"""Shows progress: a bar while a split runs, and a line for each epoch or validation."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from harness.callback import MetricsListener
from harness.data.pace import NO_LIMIT, count_batches, count_epochs
from tracking.errors import is_terminal, write_stderr

if TYPE_CHECKING:
    from harness.callbacks.progress_bar import ProgressBar

REDRAW_S = 0.1
"""Seconds that pass at least before a bar is drawn again."""

DEFAULT_WIDTH = 80
"""Columns of a terminal that does not know its size."""


class Progress(MetricsListener):
    """Shows a bar, redrawn at most ten times a second, and the metrics of each epoch.

    In a fit that validates by steps, the metrics of each validation are shown. Evaluations
    and predictions have a bar, and a line at their end. Without a terminal, only the lines
    are written. Nothing is shown unless ``ctx.verbose`` is set, and nothing on ranks other
    than 0.

    Parameters
    ----------
    min_s : >= 0
        Seconds that an evaluation or prediction takes at least if it gets a line.

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

    @property
    def _is_shown(self) -> bool:
        accelerator = self.ctx.accelerator
        return self.ctx.verbose and (accelerator is None or accelerator.is_main)

    @property
    def _place(self) -> str:
        """Where in the fit this is."""
        ctx = self.ctx
        epochs = count_epochs(ctx)
        if epochs is None and ctx.max_epochs < NO_LIMIT:
            epochs = ctx.max_epochs
        text = f"epoch {ctx.epoch}"
        if epochs is not None:
            text = f"epoch {ctx.epoch:>{len(str(epochs))}}/{epochs}"
        if ctx.pace.max_steps is not None or ctx.pace.unit == "step":
            total = "" if ctx.total_steps is None else f"/{ctx.total_steps}"
            text += f", step {ctx.step:>{max(len(total) - 1, 0)}}{total}"
        return text

    def _start(self, title: str) -> None:
        self._stop()  # a skipped epoch does not end its split
        if not self._is_shown or not is_terminal():
            return
        from harness.callbacks.progress_bar import ProgressBar  # noqa: PLC0415  imports rich

        now = self.clock()
        # If splits are shorter than a redraw, their bars are only drawn when one is due.
        is_due = now - self._began >= REDRAW_S
        self._began = now
        ctx = self.ctx
        bar = ProgressBar(title, count_batches(ctx), now)
        if not bar.is_supported:
            return
        self._bar = bar
        if is_due:
            bar.draw(0, "", now, get_terminal_width())

    def _advance(self) -> None:
        bar, done = self._bar, self.ctx.iter
        if bar is None or done is None:
            return
        if bar.done_before is None:
            bar.done_before = done - 1  # a resumed pass does not start at batch 1
        now = self.clock()
        if now - bar.drawn_at >= REDRAW_S:
            bar.draw(done, self._format_losses(), now, get_terminal_width())

    def _format_losses(self) -> str:
        losses = (
            self.ctx.loss if isinstance(self.ctx.loss, dict) else {"": self.ctx.loss}
        )
        shown = [
            f"{float(value):.4g}" for value in losses.values() if value is not None
        ]
        return f"loss {' '.join(shown)}" if shown else ""

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.erase()
            self._bar = None

    def on_epoch_begin(self) -> None:
        """Start the epoch's clock."""
        self._epoch_began = self.clock()

    def on_train_begin(self) -> None:
        """Draw the bar."""
        self._start(f"{self._place} train")

    def on_train_batch_end(self) -> None:
        """Redraw the bar if it is time."""
        self._advance()

    def on_train_end(self) -> None:
        """Erase the bar."""
        self._stop()

    def on_valid_begin(self) -> None:
        """Draw the bar."""
        if self.ctx.train_pass is not None:
            self._start(f"{self._place} {self.ctx.split}")
            return
        if self.ctx.valid_name == next(iter(self.ctx.valid_sets)):
            self._call_began = self.clock()
        self._start(f"evaluate {self.ctx.split}")

    def on_valid_batch_end(self) -> None:
        """Redraw the bar if it is time."""
        self._advance()

    def on_valid_end(self) -> None:
        """Erase the bar; write the metrics if this is an evaluation."""
        self._stop()
        super().on_valid_end()
        if self.ctx.train_pass is None and self._is_last_set:
            self._write_end("evaluate")

    def on_predict_begin(self) -> None:
        """Draw the bar."""
        self._call_began = self.clock()
        self._start("predict")

    def on_predict_batch_end(self) -> None:
        """Redraw the bar if it is time."""
        self._advance()

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
        if self._is_shown:
            self._write_metrics(f"{self._place}  {took_s:5.2f} s")

    def _write_metrics(self, head: str) -> None:
        """Write a line with the metrics of this index, in each set."""
        ctx, pieces = self.ctx, [("", head)]
        for split in ("train", *ctx.valid_sets):
            metrics = ctx.get_formatted_metrics(split, ctx.index)
            for place, (name, value) in enumerate(metrics.items()):
                text = f"{name} {value:<7}"
                is_next_split = place == 0 and len(pieces) > 1
                gap = "| " if is_next_split else "  "
                pieces.append((gap, text if place else f"{split}: {text}"))
        for line in wrap(pieces, get_terminal_width() if is_terminal() else None):
            self._write(line)

    def on_early_stopping(self) -> None:
        """Say why the fit ended."""
        self._stop()
        if self._is_shown:
            by_steps = self.ctx.pace.unit == "step"
            place = f"step {self.ctx.step}" if by_steps else f"epoch {self.ctx.epoch}"
            self._write(f"stopped early after {place}")

    def on_interrupt(self) -> None:
        """Say where the fit ended."""
        self._stop()
        if self._is_shown:
            where = f"epoch {self.ctx.epoch}, batch {self.ctx.iter}"
            self._write(f"interrupted in {where}; everything logged so far is kept")

    def on_exception(self) -> None:
        """Leave the terminal usable."""
        self._stop()

    def _write(self, line: str) -> None:
        write_stderr(line.rstrip() + "\n")


def get_terminal_width() -> int:
    """Return the columns of the terminal that shows progress."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or DEFAULT_WIDTH
    except (AttributeError, OSError, ValueError):
        return DEFAULT_WIDTH


def wrap(pieces: Sequence[tuple[str, str]], width: int | None) -> list[str]:
    """Join pieces of text into lines that break only between pieces.

    Parameters
    ----------
    pieces
        Pairs of the gap before a piece and its text.
    width
        Columns of a line; None: no limit.
    """
    lines = [""]
    for gap, text in pieces:
        longer = lines[-1] + gap + text
        if width is not None and lines[-1] and len(longer.rstrip()) > width:
            lines.append(f"  {text}")
        else:
            lines[-1] = longer
    return lines
