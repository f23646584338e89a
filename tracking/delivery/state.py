"""State of a run's delivery: ``delivery/state.json`` in the run's folder.

It informs readers. Delivery itself does not depend on it: MLflow knows how far a run has
been delivered, so a run whose file is lost is delivered as well.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tracking.delivery.thinning import THINNED
from tracking.durable import replace_file
from tracking.errors import InvalidFileError
from tracking.journal.reader import JournalReader
from tracking.store import get_rank_dir, read_json

STATE: Final = "delivery/state.json"
SAVE_EVERY_S: Final = 1.0

_log = logging.getLogger(__name__)


@dataclass
class DeliveryState:
    """How far a run's delivery is."""

    #: ``connecting``, ``delivering``, ``waiting`` (for a server that does not answer),
    #: ``done``, or ``gave up``
    phase: str = "connecting"
    tracking_uri: str = ""  #: store that the run goes to, without credentials
    experiment_id: str | None = None
    mlflow_run_id: str | None = None  #: none before the MLflow run exists
    #: address of the run's page for a browser; None for a database without server
    page: str | None = None
    delivered: int = -1  #: MLflow has every row up to this ``seq`` that is meant for it
    behind: int = 0  #: rows still to send when this was written
    error: str | None = None  #: why delivery is waiting, or gave up
    pid: int = 0  #: not used
    updated: str = ""  #: when this was written; UTC, ISO 8601
    #: what MLflow does not store exactly: by reason, number of rows for each key
    flags: dict[str, Any] = field(default_factory=dict)
    #: what, set and name by key in MLflow, where the key does not tell them; of a later
    #: fit also its number
    names: dict[str, list[str]] = field(default_factory=dict)
    #: MLflow runs that this one replaces, oldest first
    superseded: list[str] = field(default_factory=list)
    #: folder of the run then; another one tells that it was moved or copied
    run_path: str = ""

    @classmethod
    def read(cls, run_path: Path) -> DeliveryState | None:
        """Read the state of a run's delivery; None if the file does not exist."""
        try:
            return read_json(
                run_path / STATE,
                cls,
                advice=f"Delete the file and run 'harness sync {run_path.name}'.",
            )
        except OSError:
            return None

    @classmethod
    def read_or_none(cls, run_path: Path) -> DeliveryState | None:
        """Read the state as `read` does; log an invalid file and return None."""
        try:
            return cls.read(run_path)
        except InvalidFileError as error:
            _log.warning("%s", error)
            return None

    @classmethod
    def read_or_new(cls, run_path: Path, uri: str | None = None) -> DeliveryState:
        """Read the state; a new one if there is none, or it is of another store."""
        state = cls.read_or_none(run_path)
        is_same_store = state is not None and uri in (None, state.tracking_uri)
        return state if state and is_same_store else cls(tracking_uri=uri or "")

    def list_thinned(self) -> dict[str, int]:
        """Metrics of which MLflow has fewer points than the run, and how many at most."""
        thinned = self.flags.get(THINNED)
        return thinned if isinstance(thinned, dict) else {}

    def write(self, run_path: Path) -> None:
        """Write the file atomically. If the disk is full, the old file stays."""
        text = json.dumps(vars(self), indent=1, ensure_ascii=False)
        path = run_path / STATE
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)  # not the run, which may be deleted
            with replace_file(path) as temporary:  # whose loss would cost nothing
                temporary.write_bytes(text.encode(errors="replace"))


@dataclass
class StateFile:
    """Keeps a run's ``state.json`` up to date.

    Parameters
    ----------
    state
        What to write; the caller changes it.
    count_behind
        Counts the rows that are still to be sent.
    """

    run_path: Path
    state: DeliveryState
    count_behind: Callable[[], int]
    _saved_at: float = 0.0

    def set_phase(self, phase: str, error: str | None = None) -> None:
        """Change the phase, and write the file at once."""
        self.state.phase, self.state.error = phase, error
        self.save(at_once=True)

    def save(self, *, at_once: bool = False) -> None:
        """Write the file, at most once in `SAVE_EVERY_S`."""
        now = time.monotonic()
        if not at_once and now - self._saved_at < SAVE_EVERY_S:
            return
        self._saved_at = now
        self.state.behind = self.count_behind()
        self.state.updated = datetime.now(UTC).isoformat()
        self.state.write(self.run_path)


def rows_behind(run_path: Path, state: DeliveryState) -> int:
    """Count the rows that MLflow does not have yet."""
    reader = JournalReader(get_rank_dir(run_path, 0), state.delivered)
    return max(state.behind, reader.count_unread())
