"""One run for the ranks of a launch: rank 0 starts it, and the others join it.

The ranks have nothing in common but the folder of runs. Rank 0 writes the id of the run
into a file whose name is made from what the launcher told all of them. The others record
what is their own.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

from tracking.durable import read_start, write_atomically
from tracking.journal.block import Block
from tracking.journal.reader import list_blocks
from tracking.journal.segment import CAPACITY
from tracking.journal.writer import Journal
from tracking.row_logger import (
    MISSING,
    RowLogger,
    check_arguments,
    describe_call,
    refuse_missing,
)
from tracking.run import Run
from tracking.schema import flatten_params, flatten_value
from tracking.settings import LaunchedRank

WAIT_S: Final = 300.0
"""Seconds that a rank waits for rank 0 to start the run."""

_POLL_S: Final = 0.05
_KEPT_S: Final = 24 * 3600.0
"""Seconds after which the file of an old launch is removed."""

_TOGETHER_TICKS: Final = 50
"""Clock ticks, of 10 ms, within which a launcher starts its ranks."""

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
        # It may not be there yet, or be somebody else's.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            announced = json.loads(path.read_bytes())
            if _is_of_this_launch(announced):
                return str(announced["run"])
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"start: expected rank 0 to start a run in {str(path.parents[1])!r} within "
                f"{timeout_s:g} s, got none on rank {rank}. Call tracking.start on every "
                "rank with one folder of runs, or pass rank=0 for a run of this rank alone."
            )
        time.sleep(_POLL_S)


def _is_of_this_launch(announced: dict[str, Any]) -> bool:
    """Whether no process of an earlier launch under the same names announced it."""
    own = read_start(os.getpid())
    if (
        announced["host"] != platform.node()
        or own is None
        or announced["began"] is None
    ):
        # Clocks and starts may differ by that much.
        return bool(time.time() - announced["time"] < WAIT_S)
    is_running = read_start(announced["pid"]) == announced["began"]
    # A rank 0 that has ended already was started no earlier than this rank.
    return bool(is_running or announced["began"] >= own - _TOGETHER_TICKS)


# ------------------------------------------------- the run of another rank


class RankRun(Run):
    """A run on a rank other than 0, which leaves it to rank 0 to record what all log.

    Values are checked and dropped. With ``all_ranks=True`` a value is recorded here too; the
    first one makes the journal of this rank. So does an exception that ends the run.
    """

    def __init__(
        self, path: Path, *, rank: int, durability: Literal["process", "fsync"]
    ) -> None:
        self._durability = durability
        self._opening = threading.Lock()
        super().__init__(path, None, rank=rank, durability=durability)

    def _make_journal(self, durability: Literal["process", "fsync"]) -> Journal:
        return LazyJournal(self._rank_dir)

    @property
    def _has_journal(self) -> bool:
        return not isinstance(self._journal, LazyJournal)

    def _open_journal(self) -> None:
        """Make the journal of this rank, unless it is made, or the run has finished."""
        with self._opening:
            if self._has_journal or not self._journal.takes_rows():
                return
            late, fit = self._journal, self.fit
            self._journal = super()._make_journal(self._durability)
            late.close()
            super().restore_indices()
            super()._continue_fit(fit)

    def log(
        self,
        what: str,
        set: str = MISSING,
        value: object = MISSING,
        index: int | None = None,
        append: bool = True,
        *,
        epoch: int | None = None,
        step: int | None = None,
        all_ranks: bool = False,
    ) -> None:
        """As ``Run.log``; the value is dropped unless ``all_ranks`` is True."""
        if all_ranks:
            self._open_journal()
            super().log(what, set, value, index, append, epoch=epoch, step=step)
            return
        self._journal.check_open()
        if value is MISSING:
            refuse_missing("log", "what, set and value", what, set)
        place = describe_call(what, set)
        check_arguments(what, set, place, index=index, epoch=epoch, step=step)
        if type(value) is not float:
            flatten_value(value, place)

    def log_metric(
        self,
        name: str,
        value: object = MISSING,
        step: int | None = None,
        *,
        set: str = "train",
        **options: Any,
    ) -> None:
        """As ``Run.log_metric``; the value is dropped unless ``all_ranks`` is True."""
        if value is MISSING:
            refuse_missing("log_metric", "name and value", name)
        self.log("metrics", set, {name: value}, step=step, **options)

    def rewind(self, seq: int, rank: int | None = None, **options: Any) -> None:
        """Go back to a position, if this rank has recorded anything behind it."""
        if rank in (None, self.rank):
            if seq >= self._journal.last_seq():
                return
            self._open_journal()
        super().rewind(seq, rank, **options)

    def restore_indices(self) -> None:
        """Continue where the journal of this rank ends, if it has one."""
        if self._has_journal:
            super().restore_indices()

    def get_indices(self) -> dict[str, Any] | None:
        """As ``Run.get_indices``; None if this rank has no journal."""
        return super().get_indices() if self._has_journal else None

    def _continue_fit(self, number: int) -> None:
        if self._has_journal:
            super()._continue_fit(number)
        else:
            self.fit = number

    def _log_dict(self, what: str, values: Mapping[str, Any], place: str) -> None:
        if isinstance(values, Mapping):
            self._journal.check_open()
            flatten_params(values, place)
            return
        RowLogger._log_dict(self, what, values, place)  # raises

    def _add_artifact(self, name: str, write: Callable[[Path], object]) -> None:
        self._journal.check_open()

    def _add_record(self, what: str, name: str, *_: object) -> None:
        self._journal.check_open()


class LazyJournal(Journal):
    """Stands for a journal until there is a row: it has no file, lock or thread."""

    def __init__(self, rank_dir: Path) -> None:
        self.rank_dir = rank_dir
        self.block = Block(0)
        self._init_state()
        self._last_seq: int | None = None

    def last_seq(self) -> int:
        """Return the highest ``seq`` that an earlier process may have written."""
        if self._last_seq is None:
            present = list_blocks(self.rank_dir)
            self._last_seq = (present[-1] + 1) * CAPACITY - 1 if present else -1
        return self._last_seq

    def begin_close(self) -> None:
        """Take no more rows."""
        if not self._why_closed:
            self._refuse_rows(self._describe_end())

    def close(self) -> None:
        """Take no more rows; safe to call twice."""
        self.begin_close()
