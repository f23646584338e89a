"""What a program writes while a bar is on the screen comes out whole, above the bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

STREAMS = ("stdout", "stderr")


class Over:
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


class WritingAbove:
    """Puts ``Over`` before the standard streams and the log handlers that write to a terminal."""

    def __init__(self, erase: Callable[[], object]) -> None:
        self._streams: dict[str, Over] = {}
        for name in STREAMS:
            stream = getattr(sys, name)
            if _is_terminal(stream):
                self._streams[name] = Over(stream, erase)
                setattr(sys, name, self._streams[name])
        overs = {id(over.stream): over for over in self._streams.values()}
        for handler in _list_handlers():
            over = overs.get(id(handler.stream))
            if over is not None:
                handler.stream = over

    @property
    def is_within_line(self) -> bool:
        """Whether a line was begun that a bar would erase."""
        return any(over.is_within_line for over in self._streams.values())

    def stop(self) -> None:
        """Put the streams back, where nobody else has put another one."""
        for name, over in self._streams.items():
            if getattr(sys, name) is over:
                setattr(sys, name, over.stream)
        overs = {id(over): over for over in self._streams.values()}
        for handler in _list_handlers():  # also those that were made meanwhile
            mine = overs.get(id(handler.stream))
            if mine is not None:
                handler.stream = mine.stream


def _is_terminal(stream: Any) -> bool:
    try:
        return bool(stream.isatty())
    except Exception:  # noqa: BLE001  None, closed, or an object that has no isatty
        return False


def _list_handlers() -> Iterator[Any]:
    """Log handlers that write to a stream."""
    for logger in [logging.root, *list(logging.root.manager.loggerDict.values())]:
        for handler in getattr(logger, "handlers", ()):
            if hasattr(handler, "stream"):
                yield handler
