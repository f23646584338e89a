"""What a program writes while a bar is on the screen comes out whole, above the bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

STREAMS = ("stdout", "stderr")


class ErasingStream:
    """A terminal's stream that erases the bar before each write, and else does what it did."""

    def __init__(self, stream: Any, erase: Callable[[], object]) -> None:
        self.stream, self._erase = stream, erase
        self.is_within_line = False

    def write(self, text: str) -> int:
        """Write text where the bar was."""
        self._erase()
        count: int = self.stream.write(text)
        if text:
            self.is_within_line = not text.endswith("\n")
        return count

    def writelines(self, lines: list[str]) -> None:
        """Write each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class StreamRedirect:
    """Puts ``ErasingStream`` before standard streams, and log handlers, of a terminal."""

    def __init__(self, erase: Callable[[], object]) -> None:
        self._streams = {
            name: ErasingStream(stream, erase)
            for name in STREAMS
            if _is_terminal(stream := getattr(sys, name))
        }
        for name, own in self._streams.items():
            setattr(sys, name, own)
            _redirect_handlers(own.stream, own)

    @property
    def is_within_line(self) -> bool:
        """Whether a line was begun that a bar would erase."""
        return any(own.is_within_line for own in self._streams.values())

    def stop(self) -> None:
        """Put the streams back, where nobody else has put another one."""
        for name, own in self._streams.items():
            if getattr(sys, name) is own:
                setattr(sys, name, own.stream)
            _redirect_handlers(own, own.stream)  # also those that were made meanwhile


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except Exception:  # noqa: BLE001  None, closed, or an object that has no isatty
        return False


def _redirect_handlers(old: object, new: object) -> None:
    """Let the log handlers that write to a stream write to another one."""
    for logger in [logging.root, *list(logging.root.manager.loggerDict.values())]:
        for handler in getattr(logger, "handlers", ()):
            if getattr(handler, "stream", None) is old:
                handler.stream = new
