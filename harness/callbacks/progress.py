"""Shows progress: a bar for each split while it runs, and a line for each epoch."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from time import perf_counter
from typing import TYPE_CHECKING

from harness.callback import Callback
from harness.data.loaders import num_batches
from tracking.errors import is_terminal, write_stderr

if TYPE_CHECKING:
    from harness.callbacks.progress_bar import ProgressBar

REDRAW_S = 0.1
"""Seconds that pass at least before a bar is drawn again."""

DEFAULT_WIDTH = 80
"""Columns of a terminal that does not know its size."""


class Progress(Callback):
    """Shows a bar, redrawn at most ten times a second, and the metrics of each epoch.

    Without a terminal, only the epoch lines are written. Nothing is shown unless
    ``ctx.verbose`` is set, and nothing on ranks other than 0.

    References
    ----------
    luz 0.5.0, ``luz_callback_progress``. Differs from luz: redrawn by time.
    """

    weight = 1000
    clock = staticmethod(perf_counter)

    def __init__(self) -> None:
        self._bar: ProgressBar | None = None
        self._began = -REDRAW_S

    @property
    def _is_shown(self) -> bool:
        accelerator = self.ctx.accelerator
        return self.ctx.verbose and (accelerator is None or accelerator.is_main)

    def _start(self, split: str) -> None:
        self._stop()  # a skipped epoch does not end its split
        if not self._is_shown or not is_terminal():
            return
        from harness.callbacks.progress_bar import ProgressBar  # noqa: PLC0415  imports rich

        now = self.clock()
        # If splits are shorter than a redraw, their bars are only drawn when one is due.
        is_due = now - self._began >= REDRAW_S
        self._began = now
        ctx = self.ctx
        width = len(str(ctx.max_epochs))
        title = f"epoch {ctx.epoch:>{width}}/{ctx.max_epochs} {split}"
        bar = ProgressBar(title, num_batches(ctx.data), now)
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
        return f"loss {' '.join(shown)}"

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.erase()
            self._bar = None

    def on_epoch_begin(self) -> None:
        """Start the epoch's clock."""
        self._epoch_began = self.clock()

    def on_train_begin(self) -> None:
        """Draw the bar."""
        self._start("train")

    def on_train_batch_end(self) -> None:
        """Redraw the bar if it is time."""
        self._advance()

    def on_train_end(self) -> None:
        """Erase the bar."""
        self._stop()

    def on_valid_begin(self) -> None:
        """Draw the bar."""
        self._start("valid")

    def on_valid_batch_end(self) -> None:
        """Redraw the bar if it is time."""
        self._advance()

    def on_valid_end(self) -> None:
        """Erase the bar."""
        self._stop()

    def on_epoch_end(self) -> None:
        """Write the epoch's metrics."""
        if not self._is_shown:
            return
        ctx = self.ctx
        width = len(str(ctx.max_epochs))
        took_s = self.clock() - self._epoch_began
        pieces = [("", f"epoch {ctx.epoch:>{width}}/{ctx.max_epochs}  {took_s:5.2f} s")]
        for split in ("train", "valid"):
            metrics = ctx.get_formatted_metrics(split, ctx.epoch)
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
            self._write(f"stopped early after epoch {self.ctx.epoch}")

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
