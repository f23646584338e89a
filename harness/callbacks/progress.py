"""What a person sees: a bar for each split and a line for each epoch."""

from __future__ import annotations

import sys
from time import perf_counter
from typing import Any

from tqdm import tqdm

from harness.callback import Callback
from harness.data.loaders import num_batches

REDRAW_S = 0.1
"""Seconds between two redraws of a bar at least."""


class Progress(Callback):
    """Shows a bar that is redrawn ten times a second, and the metrics of each epoch.

    Where nobody watches (no terminal) only the epoch lines are written. Silent unless
    ``ctx.verbose``, and on every rank but the first.

    References
    ----------
    luz 0.5.0, ``luz_callback_progress``. Differs from luz: redrawn by time.
    """

    weight = 1000

    def __init__(self) -> None:
        self._bar: tqdm[Any] | None = None

    @property
    def _shows(self) -> bool:
        accelerator = self.ctx.accelerator
        return self.ctx.verbose and (accelerator is None or accelerator.is_main)

    def _start(self, split: str) -> None:
        self._stop()  # one that a skipped epoch left
        self._began = self._drawn = perf_counter()
        if not self._shows or not sys.stderr.isatty():
            return
        width = len(str(self.ctx.max_epochs))
        self._bar = tqdm(
            total=num_batches(self.ctx.data),
            desc=f"epoch {self.ctx.epoch:>{width}}/{self.ctx.max_epochs} {split}",
            leave=False,
            dynamic_ncols=True,
            unit=" batches",
            mininterval=REDRAW_S,
            bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt} "
            "{rate_fmt} eta {remaining}{postfix}",
        )

    def _advance(self) -> None:
        if self._bar is None:
            return
        now = perf_counter()
        if now - self._drawn >= REDRAW_S:
            self._drawn = now
            self._bar.set_postfix_str(self._losses(), refresh=False)
            self._bar.update(self.ctx.iter - self._bar.n)  # type: ignore[operator]

    def _losses(self) -> str:
        losses = (
            self.ctx.loss if isinstance(self.ctx.loss, dict) else {"": self.ctx.loss}
        )
        shown = [
            f"{float(value):.4g}" for value in losses.values() if value is not None
        ]
        return f"loss {' '.join(shown)}"

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_fit_begin(self) -> None:
        """Start the clock."""
        self._fit_began = perf_counter()

    def on_epoch_begin(self) -> None:
        """Start the epoch's clock."""
        self._epoch_began = perf_counter()

    def on_train_begin(self) -> None:
        """Draw the bar."""
        self._start("train")

    def on_train_batch_end(self) -> None:
        """Move the bar, if it is time."""
        self._advance()

    def on_train_end(self) -> None:
        """Wipe the bar."""
        self._stop()

    def on_valid_begin(self) -> None:
        """Draw the bar."""
        self._start("valid")

    def on_valid_batch_end(self) -> None:
        """Move the bar, if it is time."""
        self._advance()

    def on_valid_end(self) -> None:
        """Wipe the bar."""
        self._stop()

    def on_epoch_end(self) -> None:
        """Write the epoch's metrics in one line."""
        if not self._shows:
            return
        ctx, parts = self.ctx, []
        for split in ("train", "valid"):
            metrics = ctx.get_formatted_metrics(split, ctx.epoch)
            if metrics:
                text = "  ".join(
                    f"{name} {value:<7}" for name, value in metrics.items()
                )
                parts.append(f"{split}: {text}")
        width = len(str(ctx.max_epochs))
        took_s = perf_counter() - self._epoch_began
        self._write(
            f"epoch {ctx.epoch:>{width}}/{ctx.max_epochs}  {took_s:5.2f} s  "
            + "| ".join(parts)
        )

    def on_early_stopping(self) -> None:
        """Say why the fit ended."""
        self._stop()
        if self._shows:
            self._write(f"stopped early after epoch {self.ctx.epoch}")

    def on_interrupt(self) -> None:
        """Say where the fit ended."""
        self._stop()
        if self._shows:
            where = f"epoch {self.ctx.epoch}, batch {self.ctx.iter}"
            self._write(f"interrupted in {where}; everything logged so far is kept")

    def on_exception(self) -> None:
        """Leave the terminal usable."""
        self._stop()

    def _write(self, line: str) -> None:
        sys.stderr.write(line.rstrip() + "\n")
        sys.stderr.flush()
