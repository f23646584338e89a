"""Writing a journal: durable at once, without a lock, recovered after a crash.

The callers of ``write`` only ever put rows into the open block. Two threads do the
rest: the *keeper* makes the next block ahead of need and writes down what a full disk
kept in memory; the *sealer* turns full blocks into Arrow files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Final, Literal

from tracking.errors import RunClosedError, warn
from tracking.journal import row_format as rows
from tracking.journal import segment as sealed
from tracking.journal.block import Block, DiskBlock, Group, Series
from tracking.journal.reader import (
    BlockContent,
    JournalReader,
    Lock,
    forget_locks,
    is_being_written,
    list_blocks,
    read_block,
    read_records,
)
from tracking.journal.row_format import HAS_TEXT, MARK, NO_COUNT, NO_EPOCH, SIZE
from tracking.journal.segment import CAPACITY, Damage
from tracking.schema import Leaf

__all__ = [
    "CAPACITY",
    "BlockContent",
    "Damage",
    "Journal",
    "JournalReader",
    "is_being_written",
    "list_blocks",
    "read_block",
    "read_records",
]

MAX_TEXT_BYTES: Final = 32 << 20
"""A block whose texts grow larger than this takes no more rows."""

TICK_S: Final = 0.25
RETRY_S: Final = 1.0

_WRITERS: Final[weakref.WeakSet[Journal]] = weakref.WeakSet()


class Journal:
    """The writer of one rank's part of a run's journal.

    Parameters
    ----------
    rank_dir
        Folder of the part, made if absent; what an earlier process left open in it is
        recovered and sealed first.
    durability
        ``"process"``: a row survives the death of the process. ``"fsync"``: also that
        of the machine.
    on_tick
        Called by the keeper a few times a second; it may write.

    Raises
    ------
    OSError
        If the folder cannot be written.
    RunBusyError
        If another journal is writing this part.

    Attributes
    ----------
    block
        The block that takes rows now. Replaced by any thread when full; a caller that
        holds on to an earlier one comes to it by ``roll``.
    """

    def __init__(
        self,
        rank_dir: Path,
        *,
        durability: Literal["process", "fsync"] = "process",
        on_tick: Callable[[], None] | None = None,
    ) -> None:
        if durability not in ("process", "fsync"):
            raise ValueError(
                f"Journal(durability=): expected 'process' or 'fsync', got "
                f"{durability!r}. Choose one of the two."
            )
        self.rank_dir = rank_dir
        self.rank = int(rank_dir.name) if rank_dir.name.isdecimal() else 0
        self._is_synced = durability == "fsync"
        self._on_tick = on_tick
        self._why_closed = ""
        self._is_in_trouble = False
        self._has_unsealed = False
        self._mend_at = 0.0
        self._series: dict[tuple[str, str], Series] = {}
        rank_dir.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(rank_dir)
        try:
            recover(rank_dir)
            present = list_blocks(rank_dir)
            first = present[-1] + 1 if present else 0
            self.block: Block = DiskBlock(rank_dir, first, is_synced=self._is_synced)
        except BaseException:
            self._lock.release()
            raise
        self._open: list[Block] = [self.block]  # in order; touched by the keeper alone
        self._tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._to_seal: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        self._keeper = threading.Thread(
            target=self._keep, name="tracking-keeper", daemon=True
        )
        self._sealer = threading.Thread(
            target=self._seal_all, name="tracking-sealer", daemon=True
        )
        self._keeper.start()
        self._sealer.start()
        _WRITERS.add(self)

    # ------------------------------------------------------------------- callers

    def series(self, what: str, set: str) -> Series:
        """The automatic index of one (what, set)."""
        return self._series.setdefault((what, set), Series())

    def reset_indices(self, highest: Mapping[tuple[str, str], int]) -> None:
        """Let automatic indices go on from these; others start again from 1."""
        for pair in {*self._series, *highest}:
            self.series(*pair).reset(highest.get(pair, 0))

    def group(self, block: Block, what: str, set: str) -> Group:
        """One (what, set) in a block."""
        found = block.groups.get((what, set))
        if found is None:
            found = block.groups.setdefault((what, set), Group(self.series(what, set)))
        return found

    def write(
        self,
        what: str,
        set: str,
        leaves: Iterable[Leaf],
        *,
        index: int | None = None,
        epoch: int | None = None,
        step: int | None = None,
        time_us: int | None = None,
    ) -> None:
        """Write one row for each leaf; they are durable when this returns.

        Parameters
        ----------
        what, set
            Of the rows; valid Unicode.
        leaves
            Name, kind, number and payload of each row, as ``schema.flatten_value`` gives.
        index, epoch, step
            None is null.
        time_us : us since 1970
            None: now.

        Raises
        ------
        RunClosedError
            If the journal is closed.
        """
        fields = (
            time.time_ns() // 1000 if time_us is None else time_us,
            NO_COUNT if index is None else index,
            NO_COUNT if step is None else step,
            NO_EPOCH if epoch is None else epoch,
        )
        for leaf in leaves:
            self.write_row(what, set, leaf, *fields)

    def write_row(
        self,
        what: str,
        set: str,
        leaf: Leaf,
        time_us: int,
        index: int,
        step: int,
        epoch: int,
    ) -> None:
        """Write one row; nulls as ``rows`` has them, all else as ``write``."""
        name, kind, number, payload = leaf
        block, slot = self.block, CAPACITY
        try:
            for slot in block.slots:
                if slot < CAPACITY:
                    break
                self.roll(block)
                return self.write_row(what, set, leaf, time_us, index, step, epoch)
            group = self.group(block, what, set)
            key = group.ids.get(name)
            if key is None:
                key = block.key(group, what, set, name)
            flags = 0
            if payload is not None:
                flags = HAS_TEXT
                block.add_payload(slot, payload)
            # fmt: off
            block.put(
                slot * SIZE, time_us, index, step, number, epoch, key, kind, flags,
                MARK ^ slot,
            )
            # fmt: on
        except BaseException:
            block.void(slot)
            raise
        if block.text_bytes > MAX_TEXT_BYTES:
            self._tasks.put("too much text")

    def roll(self, block: Block) -> None:
        """Go on to the block after a full one.

        Raises
        ------
        RunClosedError
            If the journal is closed.

        Notes
        -----
        No lock: every thread and handler sets the same successor. One that comes late
        sets an earlier block back, which is full and so is left again at once.
        """
        while block.next is None:
            self.check_open()
            if (
                threading.current_thread() is self._keeper
                or not self._keeper.is_alive()
            ):
                self._make_next()
            else:
                self._tasks.put("make")
                time.sleep(0.0005)
        self.block = block.next
        if self._why_closed:  # meanwhile, so the door has just been overwritten
            self._close_door(self._why_closed)
        self._tasks.put("rolled")

    def check_open(self) -> None:
        """Raise if the journal takes no more rows."""
        if self._why_closed:
            raise RunClosedError(self._why_closed)

    def last_seq(self) -> int:
        """Highest ``seq`` written; if the open block is empty, one below its first."""
        block = self.block
        while True:
            first = block.number * CAPACITY
            if block.limit is None:
                # While it is read, it may be left, sealed and its files closed.
                try:
                    last = rows.last_marked(block.snapshot()[0])
                except OSError:
                    if block.limit is None:
                        raise
                if block.limit is None:
                    return first + last
            if block.next is None:
                return first + block.limit - 1
            block = block.next

    def close(self) -> None:
        """Seal what is open and let go of the part; safe to call twice."""
        if self._why_closed:
            return
        last = self._close_door(
            f"Run.log: expected a run that is open, got {self.rank_dir.parent.parent.name!r}"
            ", which has finished. Log before finish(), or start another run."
        )
        self._tasks.put("stop")
        self._keeper.join()
        for block in self._open:
            block.retire()
            if block.number <= last.number:
                self._to_seal.put(block)
            else:
                block.close(unlink=True)
        self.block.limit = last.limit  # for last_seq
        self._to_seal.put(None)
        self._sealer.join()
        self._lock.release()
        _WRITERS.discard(self)

    def disown(self) -> None:
        """Close a forked child's copy, which must leave the files alone."""
        self._close_door(
            f"Run.log: expected the process that started the run, got its fork "
            f"(process {os.getpid()}). Log from the parent, or start a run here."
        )

    def _close_door(self, why: str) -> Block:
        """Refuse further rows; the block that took the last ones."""
        self._why_closed = why
        last = self.block
        door = Block(last.number)
        door.slots = itertools.count(CAPACITY)
        self.block = door
        return last

    # -------------------------------------------------------------------- keeper

    def _keep(self) -> None:
        """Thread: make blocks ahead, write down what is in memory, pass on what is full."""
        next_tick = 0.0
        while True:
            try:
                task = self._tasks.get(timeout=TICK_S)
            except queue.Empty:
                task = "tick"
            if task == "stop":
                return
            if self.block.number >= self._open[-1].number:
                self._make_next()
            if self.block.text_bytes > MAX_TEXT_BYTES:
                self._turn_over()
            self._pass_on()
            self._mend()
            if self._on_tick and time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_S
                with contextlib.suppress(RunClosedError):  # just now
                    self._on_tick()

    def _make_next(self) -> None:
        """Make the block after the last one, in memory if the disk refuses."""
        last = self._open[-1]
        number = last.number + 1
        fresh: Block
        try:
            fresh = DiskBlock(self.rank_dir, number, is_synced=self._is_synced)
        except OSError as error:
            self._warn_of(error)
            fresh = Block(number)
        last.next = fresh
        self._open.append(fresh)

    def _turn_over(self) -> None:
        """Leave the present block before it is full."""
        block = self.block
        block.retire()
        if block.next is not None:
            self.roll(block)

    def _pass_on(self) -> None:
        """Hand blocks that callers have left to the sealer."""
        while self._open[0].number < self.block.number:
            block = self._open.pop(0)
            block.retire()
            if not self._has_holes(block):
                block.settle()
            self._to_seal.put(block)

    def _mend(self) -> None:
        """Write down what is in memory only, if the disk takes it again."""
        if all(block.is_durable for block in self._open):
            self._is_in_trouble &= self._has_unsealed
            return
        if time.monotonic() < self._mend_at:
            return
        self._mend_at = time.monotonic() + RETRY_S
        try:
            for block in self._open:
                block.save_late()
            if not all(block.is_durable for block in self._open):
                self._leave_memory()
        except OSError as error:
            self._warn_of(error)

    def _leave_memory(self) -> None:
        """Go on in a block on the disk; those before it are sealed there."""
        number = self._open[-1].number + 1
        fresh = DiskBlock(self.rank_dir, number, is_synced=self._is_synced)
        self._open[-1].next = fresh
        for block in self._open:
            block.retire()
        self._open.append(fresh)
        if not self._why_closed:
            self.block = fresh
        self._pass_on()

    def _warn_of(self, error: OSError) -> None:
        """Warn, once until all is well again."""
        if not self._is_in_trouble:
            self._is_in_trouble = True
            warn(
                f"Journal({str(self.rank_dir)!r}): expected to write to the disk, got "
                f"{error}. Training goes on, and what is logged is kept in memory and "
                "written later: make space before the process ends."
            )

    # -------------------------------------------------------------------- sealer

    def _seal_all(self) -> None:
        """Thread: turn blocks that are passed on into Arrow files."""
        waiting: list[Block] = []
        deadline: float | None = None
        while deadline is None or waiting:
            try:
                block = self._to_seal.get(timeout=RETRY_S if deadline is None else 0.01)
                if block is None:
                    deadline = time.monotonic() + RETRY_S
                else:
                    waiting.append(block)
            except queue.Empty:
                pass
            must = deadline is not None and time.monotonic() > deadline
            waiting = [block for block in waiting if not self._seal(block, must=must)]
            self._has_unsealed = bool(waiting)
            if must:
                break
        self._warn_of_loss(waiting)

    def _seal(self, block: Block, *, must: bool) -> bool:
        """Seal a block; False if it has to wait for a row or for the disk."""
        if self._has_holes(block) and not must:
            return False
        marks, text = block.snapshot()
        number = block.number
        found = rows.decode(
            self.rank_dir, number, self.rank, marks, marks, text, self._pause
        )
        # What nothing was lost by, as a text that was written again, is not told.
        damage = tuple(d for d in found.damage if d.rows_lost)
        path = self.rank_dir / f"{number:06d}.arrow"
        try:
            sealed.write(
                found.table, path, rank=self.rank, damage=damage, pause=self._pause
            )
            block.close(unlink=True)
        except OSError as error:
            self._warn_of(error)
            return False
        return True

    @staticmethod
    def _has_holes(block: Block) -> bool:
        """Whether a row of a retired block is still to come."""
        assert block.limit is not None
        return rows.has_holes(block.snapshot()[0], block.limit)

    def _pause(self) -> None:
        """Let a thread that logs have the interpreter for a while.

        Sealing takes milliseconds. The interpreter's own switch between threads comes
        after 5 ms, and a lock that is let go without a sleep is taken back at once. Each
        pause may cost the sealer as long: with many more of them it falls behind.
        """
        if not self._why_closed:
            time.sleep(0.0003)

    def _warn_of_loss(self, blocks: list[Block]) -> None:
        """Tell of rows that never reached the disk, at the end."""
        num_lost = sum(block.limit or 0 for block in blocks if not block.is_durable)
        if num_lost:
            warn(
                f"Journal({str(self.rank_dir)!r}): expected to write to the disk, got none "
                f"of it until the end: up to {num_lost} rows are lost. Make space before "
                "the next run."
            )


def recover(rank_dir: Path) -> None:
    """Seal what an earlier writer left open; the part must be locked.

    Parameters
    ----------
    rank_dir
        Folder of the part. What cannot be read is noted in the sealed block.
    """
    for stray in (*rank_dir.glob("*.new"), *rank_dir.glob("*.sealing")):
        stray.unlink()
    for number in list_blocks(rank_dir):
        path = rank_dir / f"{number:06d}.arrow"
        if not path.exists():
            view = read_block(rank_dir, number)
            assert view is not None
            rank = int(rank_dir.name) if rank_dir.name.isdecimal() else 0
            sealed.write(view.table, path, rank=rank, damage=tuple(view.damage))
        for open_file in rows.paths(rank_dir, number):
            open_file.unlink(missing_ok=True)


def _after_fork() -> None:
    """Leave the parent's journals alone."""
    forget_locks()
    for journal in tuple(_WRITERS):
        journal.disown()


os.register_at_fork(after_in_child=_after_fork)
