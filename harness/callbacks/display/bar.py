"""One line of a terminal that shows how far a split is."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.control import Control
from rich.progress_bar import ProgressBar as RichBar
from rich.segment import ControlType, Segment, Segments

from harness.callbacks.display.epoch_lines import format_duration
from harness.callbacks.display.stream_redirect import StreamRedirect

MIN_BAR_WIDTH = 8
"""Columns that the bar keeps; less important text is left out instead."""

ERASE_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
"""Moves to the start of the line and erases it."""


class ProgressBar:
    """A line with a title, share done, bar, batches, rate, time left, loss and metrics.

    Parameters
    ----------
    total
        Batches of the split; None if it is not known.
    now : seconds
        Time of the clock that ``draw`` gets too.

    Attributes
    ----------
    drawn_at : seconds
        Time of the last ``draw``, or of the start.
    done_before : int or None
        Batches done before the start, which do not count for the rate; None: none.
    """

    def __init__(self, title: str, total: int | None, now: float) -> None:
        self.drawn_at = now
        self.done_before: int | None = None
        self._title, self._total, self._began_at = title, total, now
        self._is_drawn = self._is_lost = False
        self._console = Console(file=sys.stderr, highlight=False)
        self._redirect: StreamRedirect | None = None

    @property
    def is_supported(self) -> bool:
        """Whether the terminal can erase a line."""
        return not self._console.is_dumb_terminal

    def get_rate(self, done: int, now: float) -> float:
        """Return batches per second since the start; 0 if it is not known yet."""
        took_s = now - self._began_at
        return (done - (self.done_before or 0)) / took_s if took_s > 0 else 0.0

    def draw(
        self,
        done: int,
        values: Sequence[str],
        now: float,
        width: int,
        fit_left_s: float | None = None,
    ) -> None:
        """Draw the line over the one before.

        Parameters
        ----------
        values
            Texts with the loss and the metrics so far, the most important first.
        now : seconds
            Present time.
        fit_left_s : seconds
            Time until the fit ends; None: not known.
        """
        self.drawn_at = now
        if self._redirect is None:
            self._redirect = StreamRedirect(self._erase)
        if self._is_lost or self._redirect.is_within_line:
            return
        self._is_drawn = True
        title, text = self._format_ends(done, values, now, width, fit_left_s)
        try:
            self._show(title, done, text, width - len(title) - len(text) - 2, now)
        except OSError:  # the terminal was closed; training continues without it
            self._is_drawn, self._is_lost = False, True

    def _show(self, title: str, done: int, text: str, room: int, now: float) -> None:
        """Write the line, with a bar of `room` columns in it."""
        bar = RichBar(total=self._total, completed=done, width=room, animation_time=now)
        console = self._console
        console.width = room + len(title) + len(text) + 2
        with console:  # collects one write
            console.control(ERASE_LINE)
            line = [Segment(f"{title} "), *console.render(bar), Segment(f" {text}")]
            console.print(Segments(line), end="")

    def _format_ends(
        self,
        done: int,
        values: Sequence[str],
        now: float,
        width: int,
        fit_left_s: float | None,
    ) -> tuple[str, str]:
        """Return the texts before and after the bar."""
        title = self._title
        if self._total:
            title += f" {done / self._total:4.0%}"
        room = width - len(title) - 2
        return title, self._format_details(done, values, now, room, fit_left_s)

    def end(self) -> None:
        """Erase the line, if it was drawn, and draw no other."""
        self._erase()
        if self._redirect is not None:
            self._redirect.stop()

    def _erase(self) -> None:
        if self._is_drawn:
            self._is_drawn = False
            with contextlib.suppress(OSError):
                self._console.control(ERASE_LINE)

    def _format_details(
        self,
        done: int,
        values: Sequence[str],
        now: float,
        room: int,
        fit_left_s: float | None = None,
    ) -> str:
        """Return batches, rate, time left and values, or the first of them that fit."""
        count = f"{done}/{self._total}" if self._total else f"{done} batches"
        rate = self.get_rate(done, now)
        left = (self._total - done) / rate if self._total and rate else None
        details = {"count": count}
        details |= {f"value {place}": text for place, text in enumerate(values[:1])}
        details["left"] = f"eta {format_duration(left)}" if left is not None else ""
        details["fit"] = f"fit {format_duration(fit_left_s)}" if fit_left_s else ""
        details["rate"] = format_rate(rate) if rate else ""
        details |= {f"value {place + 1}": text for place, text in enumerate(values[1:])}
        used = MIN_BAR_WIDTH
        for name, text in list(details.items()):  # the most important first
            if text and used + len(text) + 1 <= room:
                used += len(text) + 1
            else:
                del details[name]
        order = ("count", "rate", "left", "fit")
        last = [name for name in details if name not in order]
        return " ".join(details[name] for name in (*order, *last) if name in details)


def format_rate(rate: float) -> str:
    """Return batches per second as text, or seconds per batch if a batch takes longer."""
    return f"{rate:.1f} batches/s" if rate >= 1 else f"{1 / rate:.1f} s/batch"
