"""What delivery last wrote about itself: ``delivery/state.json`` of a run.

It is a courtesy to readers. What has been delivered is known by MLflow itself, and a
run whose file is lost is delivered as well.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from tracking.durable import write_atomically
from tracking.journal.reader import JournalReader
from tracking.store import get_rank_dir

STATE: Final = "delivery/state.json"


@dataclass
class DeliveryState:
    """How far a run's delivery has got.

    Attributes
    ----------
    phase
        ``connecting``, ``delivering``, ``waiting`` (for a server that does not
        answer), ``done``, or ``gave up``.
    tracking_uri
        Store that the run goes to; without credentials.
    mlflow_run_id
        None until there is one.
    page
        Address of the run's page for a browser; None for a database without server.
    delivered
        Every row up to this ``seq`` is in MLflow, or is not meant for it.
    behind
        Rows to go when this was written.
    error
        Why it is waiting, or gave up.
    flags
        What MLflow could not hold as it was: number of rows, or names, by reason.
    names
        Series by key in MLflow, where the two differ.
    superseded
        MLflow runs that this one replaces, oldest first.
    """

    phase: str = "connecting"
    tracking_uri: str = ""
    experiment_id: str | None = None
    mlflow_run_id: str | None = None
    page: str | None = None
    delivered: int = -1
    behind: int = 0
    error: str | None = None
    pid: int = 0
    updated: str = ""
    flags: dict[str, Any] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)
    superseded: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, run_path: Path) -> DeliveryState | None:
        """State of a run's delivery; None if it has written none that can be read."""
        with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
            found = json.loads((run_path / STATE).read_bytes())
            names = {f.name for f in dataclasses.fields(cls)}
            return cls(**{k: v for k, v in found.items() if k in names})
        return None

    def write(self, run_path: Path) -> None:
        """Write the file, whole or, on a full disk, not at all."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False)
        path = run_path / STATE
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)  # not the run, which may be deleted
            write_atomically(path, text.encode(errors="replace"))


def rows_behind(run_path: Path, state: DeliveryState) -> int:
    """Rows that MLflow lacks at this moment.

    Parameters
    ----------
    run_path
        Folder of the run.
    state
        As delivery last wrote it.
    """
    return max(
        state.behind,
        JournalReader(get_rank_dir(run_path, 0), state.delivered).count_unread(),
    )
