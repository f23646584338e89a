"""One run for the ranks of a launch: rank 0 starts it, and tells the others which it is.

The ranks have nothing in common but the folder of runs. Rank 0 writes the id of the run
into a file whose name is made from what the launcher told all of them.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import time
from pathlib import Path
from typing import Any, Final

from tracking.durable import read_start, write_atomically
from tracking.settings import LaunchedRank

WAIT_S: Final = 300.0
"""Seconds that a rank waits for rank 0 to start the run."""

_POLL_S: Final = 0.05
_KEPT_S: Final = 24 * 3600.0
"""Seconds after which the file of an old launch is removed."""

_numbers = itertools.count(1)
"""How many runs the ranks of this launch have started, as each of them counts."""


def next_announcement(runs: Path, launched: LaunchedRank) -> Path:
    """The file in which rank 0 announces the next run of this launch."""
    return runs / ".launches" / f"{launched.key}-{next(_numbers)}.json"


def announce_run(path: Path, run_id: str) -> None:
    """Tell the other ranks which run this process started as rank 0."""
    path.parent.mkdir(exist_ok=True)
    for old in path.parent.glob("*.json"):
        with contextlib.suppress(OSError):  # another launch may remove it as well
            if time.time() - old.stat().st_mtime > _KEPT_S:
                old.unlink()
    pid = os.getpid()
    text = {"run": run_id, "host": platform.node(), "pid": pid, "time": time.time()}
    write_atomically(path, json.dumps(text | {"began": read_start(pid)}).encode())


def wait_for_run(path: Path, rank: int, timeout_s: float = WAIT_S) -> str:
    """Wait until rank 0 announces its run; return the id of the run.

    Raises
    ------
    TimeoutError
        If it does not in time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError, ValueError):  # not there yet
            told = json.loads(path.read_bytes())
            if _is_of_this_launch(told):
                return str(told["run"])
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"start: expected rank 0 to start a run in {str(path.parents[1])!r} within "
                f"{timeout_s:g} s, got none on rank {rank}. Call tracking.start on every "
                "rank with one folder of runs, or pass rank=0 for a run of this rank alone."
            )
        time.sleep(_POLL_S)


def _is_of_this_launch(told: dict[str, Any]) -> bool:
    """False if a process of an earlier launch under the same names told it."""
    own = read_start(os.getpid())
    if told["host"] != platform.node() or own is None or told["began"] is None:
        # Clocks and starts may differ by that much.
        return bool(time.time() - told["time"] < WAIT_S)
    is_running = read_start(told["pid"]) == told["began"]
    # A rank 0 that has ended already was started no earlier than this rank.
    return bool(is_running or told["began"] >= own - _TOGETHER_TICKS)


_TOGETHER_TICKS: Final = 50
"""Clock ticks, of 10 ms, within which a launcher starts its ranks."""
