"""Progress in a notebook: one output that is updated in place."""

from __future__ import annotations

import html
import importlib
import sys
from typing import Any

from harness.callbacks.display.bar import ProgressBar


class NotebookOutput:
    """Lines, and a bar below them, in one output of a cell."""

    def __init__(self, display: Any, as_html: Any) -> None:
        self._display, self._as_html = display, as_html
        self._handle: Any = None
        self._lines: list[str] = []
        self._bar = ""

    def write(self, *lines: str) -> None:
        """Add lines above the bar."""
        self._lines += lines
        self._update()

    def draw(self, bar: str) -> None:
        """Replace the bar; an empty text erases it."""
        if bar != self._bar:
            self._bar = bar
            self._update()

    def _update(self) -> None:
        text = "\n".join([*self._lines, self._bar] if self._bar else self._lines)
        shown = self._as_html(
            f'<pre style="font-family: monospace; line-height: 1.25">{html.escape(text)}</pre>'
        )
        if self._handle is None:  # a call that shows nothing has no output
            self._handle = self._display(shown, display_id=True)
        else:
            self._handle.update(shown)


class NotebookBar(ProgressBar):
    """A bar of text in the output of a notebook."""

    def __init__(
        self, title: str, total: int | None, now: float, output: NotebookOutput
    ) -> None:
        super().__init__(title, total, now)
        self._output = output

    @property
    def is_supported(self) -> bool:
        """True: a notebook shows it."""
        return True

    def _show(self, title: str, done: int, text: str, room: int, now: float) -> None:
        filled = round(room * done / self._total) if self._total else 0
        bar = "\u2501" * filled + "\u2500" * (room - filled)
        self._output.draw(f"{title} {bar} {text}")

    def end(self) -> None:
        """Erase the bar."""
        self._output.draw("")


def open_output() -> NotebookOutput | None:
    """Open an output if this program runs in the kernel of a notebook; None otherwise."""
    shell = sys.modules.get("IPython")
    if shell is None or getattr(shell.get_ipython(), "kernel", None) is None:
        return None
    shown = importlib.import_module("IPython.display")
    return NotebookOutput(shown.display, shown.HTML)
