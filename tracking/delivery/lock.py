"""The lock of a run's delivery: one process delivers a run at a time."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from tracking.durable import hold_lock

_POLL_S: Final = 0.1


def lock_path(run_path: Path) -> Path:
    """Lock file that a process holds while it delivers a run."""
    return run_path / "delivery" / "lock"


def handover_path(run_path: Path) -> Path:
    """File that asks a delivery that waits for MLflow to end: another one takes over."""
    return run_path / "delivery" / "handover"


@contextlib.contextmanager
def ask_for_handover(run_path: Path) -> Iterator[None]:
    """Ask a delivery that waits for MLflow to end, while the block runs."""
    handover_path(run_path).touch()
    try:
        yield
    finally:
        handover_path(run_path).unlink(missing_ok=True)


def is_being_delivered(run_path: Path) -> bool:
    """Whether a process delivers a run now."""
    try:
        with hold_lock(lock_path(run_path), timeout_s=0.0) as is_held:
            return not is_held
    except OSError:
        return False


def wait_for_delivery(run_path: Path, timeout_s: float) -> bool:
    """Wait until no process delivers a run; False if one still does at the timeout."""
    deadline = time.monotonic() + timeout_s
    while is_being_delivered(run_path):
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
