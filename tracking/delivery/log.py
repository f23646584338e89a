"""Log of a run's delivery: ``delivery/log.txt`` in the run's folder."""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Final

LOG: Final = "delivery/log.txt"
MAX_BYTES: Final = 1 << 20
"""The file is then renamed to ``log.txt.1``, which replaces the one before."""


class RedactingFormatter(logging.Formatter):
    """Formats log records, tracebacks included, with their secrets masked."""

    def __init__(self, redact: Callable[[str], str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S")
        self.converter = time.gmtime
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one text."""
        return self._redact(super().format(record))


def configure_logging() -> None:
    """Keep all log records and warnings away from the terminal.

    For a process that only delivers. Records are written where `log_to_file` says.
    """
    logging.raiseExceptions = False  # a full disk must not stop the delivery
    logging.captureWarnings(True)
    logging.getLogger().addHandler(logging.NullHandler())
    logging.getLogger("tracking").setLevel(logging.INFO)


_current: Final[ContextVar[Path | None]] = ContextVar("run", default=None)
"""Run that this thread delivers; None in threads that MLflow starts."""


@contextlib.contextmanager
def log_to_file(run_path: Path, redact: Callable[[str], str]) -> Iterator[None]:
    """Write log records into a run's log inside the block, except those of other runs."""
    if (run_path / LOG).is_symlink():  # it may lead to any file of this user
        (run_path / LOG).unlink()
    handler = logging.handlers.RotatingFileHandler(
        run_path / LOG,
        maxBytes=MAX_BYTES,
        backupCount=1,
        encoding="utf-8",
        errors="replace",
        delay=True,
    )
    handler.setFormatter(RedactingFormatter(redact))
    handler.addFilter(lambda record: _current.get() in (None, run_path))
    root = logging.getLogger()
    root.addHandler(handler)
    before = _current.set(run_path)
    try:
        yield
    finally:
        _current.reset(before)
        root.removeHandler(handler)
        handler.close()
