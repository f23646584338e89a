"""One line of a terminal that shows how far a split is."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.control import Control
from rich.progress_bar import ProgressBar as RichBar
from rich.segment import ControlType, Segment, Segments

MIN_BAR_WIDTH = 8
"""Columns that the bar keeps; less important text is left out instead."""

ERASE_LINE = Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2))
"""Moves to the start of the line and erases it."""


class ProgressBar:
    """A line with a title, share done, bar, batches, rate, time left and losses.

    Parameters
    ----------
    title
        Text at the start of the line.
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
        self._is_drawn = False
        self._console = Console(file=sys.stderr, highlight=False)

    @property
    def is_supported(self) -> bool:
        """Whether the terminal can erase a line."""
        return not self._console.is_dumb_terminal

    def draw(self, done: int, losses: str, now: float, width: int) -> None:
        """Draw the line over the one before.

        Parameters
        ----------
        done
            Batches done.
        losses
            Text with the last losses.
        now : seconds
            Present time.
        width
            Columns of the terminal.
        """
        self.drawn_at, self._is_drawn = now, True
        title = self._title
        if self._total:
            title += f" {done / self._total:4.0%}"
        text = self._format_details(done, losses, now, width - len(title) - 2)
        bar = RichBar(
            total=self._total,
            completed=done,
            width=width - len(title) - len(text) - 2,
            animation_time=now,
        )
        console = self._console
        console.width = width
        with console:  # collects one write
            console.control(ERASE_LINE)
            line = [Segment(f"{title} "), *console.render(bar), Segment(f" {text}")]
            console.print(Segments(line), end="")

    def erase(self) -> None:
        """Erase the line, if it was drawn."""
        if self._is_drawn:
            self._console.control(ERASE_LINE)

    def _format_details(self, done: int, losses: str, now: float, room: int) -> str:
        """Return batches, rate, time left and losses, or the first of them that fit."""
        count = f"{done}/{self._total}" if self._total else f"{done} batches"
        took_s = now - self._began_at
        rate = (done - (self.done_before or 0)) / took_s if took_s > 0 else 0.0
        left = (self._total - done) / rate if self._total and rate else None
        details = {"count": count, "losses": losses}
        details["left"] = f"eta {format_duration(left)}" if left is not None else ""
        details["rate"] = format_rate(rate) if rate else ""
        used = MIN_BAR_WIDTH
        for name, text in list(details.items()):  # the most important first
            if text and used + len(text) + 1 <= room:
                used += len(text) + 1
            else:
                del details[name]
        order = ("count", "rate", "left", "losses")
        return " ".join(details[name] for name in order if name in details)


def format_rate(rate: float) -> str:
    """Return batches per second as text, or seconds per batch if a batch takes longer."""
    return f"{rate:.1f} batches/s" if rate >= 1 else f"{1 / rate:.1f} s/batch"


def format_duration(duration_s: float) -> str:
    """Return seconds as ``MM:SS`` or ``H:MM:SS``."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
    )
