"""Write a journal: each row durable at once, without a lock, recovered after a crash.

Callers of ``write`` only put rows into the open block. Two threads do the rest: the
*keeper* makes the next block in advance and writes to the disk what had to stay in
memory while it was full; the *sealer* turns full blocks into Arrow files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final, Literal

from tracking.durable import LockHeldError, ProcessLock
from tracking.errors import RunBusyError, RunClosedError, warn
from tracking.journal import row_format
from tracking.journal.block import AutoIndex, Block, DiskBlock, KeyGroup
from tracking.journal.reader import get_segment_path, list_blocks, read_block
from tracking.journal.row_format import HAS_TEXT, NO_COUNT, NO_EPOCH, encode_row
from tracking.journal.segment import CAPACITY, write_segment
from tracking.schema import Leaf
from tracking.store import describe_unknown, get_lock_path

MAX_TEXT_BYTES: Final = 32 << 20
"""A block whose texts grow larger than this takes no more rows."""

NAMES_AT_ONCE: Final = 1024
"""Names that are announced before their rows; a block that fills meanwhile has some more."""

TICK_S: Final = 0.25
RETRY_S: Final = 1.0

Indices = Mapping[tuple[str, str], int]
"""Highest index of each (what, set)."""

RowFields = tuple[int, int, int, int]
"""Time (us since 1970), index, step and epoch of a row; nulls are those of ``row_format``."""

_JOURNALS: Final[weakref.WeakSet[Journal]] = weakref.WeakSet()


class Journal:
    """Writer of one rank's records.

    Parameters
    ----------
    rank_dir
        Folder of the rank's records, made if absent. What an earlier process left open
        in it is recovered and sealed first.
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
        If another journal is writing there.

    Attributes
    ----------
    block
        The block that takes rows now. Any thread replaces it when it is full; a caller
        that still has an earlier one calls ``roll``.
    is_in_child
        Whether this is the copy in a forked child, which must not write.
    """

    def __init__(
        self,
        rank_dir: Path,
        *,
        durability: Literal["process", "fsync"] = "process",
        on_tick: Callable[[], None] | None = None,
    ) -> None:
        self.rank_dir = rank_dir
        self._is_synced = durability == "fsync"
        self._on_tick = on_tick
        self._has_warned = False
        self._has_lost_lease = False
        self._retry_at = 0.0
        rank_dir.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(rank_dir)
        try:
            recover(rank_dir)
            present = list_blocks(rank_dir)
            first = present[-1] + 1 if present else 0
            self.block: Block = DiskBlock(rank_dir, first, is_synced=self._is_synced)
            self._init_state()  # not earlier: a fork closes what is in ``_JOURNALS``
            self._start_threads()
        except BaseException:
            self._lock.release()
            raise

    def _init_state(self) -> None:
        self._why_closed = ""
        self._last: Block | None = None
        self._is_released = False
        self.is_in_child = False
        self._has_warned_child = False
        self._auto_indices: dict[tuple[str, str], AutoIndex] = {}
        self._find_highest: Callable[[], Indices] | None = None
        self._finding = threading.RLock()
        _JOURNALS.add(self)

    def _start_threads(self) -> None:
        self._open: list[Block] = [self.block]  # in order; only the keeper changes it
        self._tasks: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._sealer = _Sealer(self.rank_dir, self._warn_of)
        self._keeper = _Thread(self._keep, "tracking-keeper")
        try:
            self._keeper.start()
        except RuntimeError:  # the system has no more threads
            self._sealer.close()
            raise

    # ------------------------------------------------------------------- callers

    def get_auto_index(self, what: str, set: str) -> AutoIndex:
        """Return the automatic index of one (what, set)."""
        found = self._auto_indices.get((what, set))
        if found is None:
            find = None if self._find_highest is None else self._find_indices
            made = AutoIndex(find=find)
            found = self._auto_indices.setdefault((what, set), made)
        return found

    def reset_indices(self, highest: Indices) -> None:
        """Continue automatic indices after these; others restart from 1."""
        self._find_highest = None
        for pair in {*self._auto_indices, *highest}:
            self.get_auto_index(*pair).reset(highest.get(pair, 0))

    def reset_indices_later(self, find_highest: Callable[[], Indices]) -> None:
        """Continue automatic indices after those that are found once one is needed."""
        self._find_highest = find_highest
        for index in [*self._auto_indices.values()]:  # others may add some
            index.reset_later(self._find_indices)

    def get_indices(self) -> Indices | None:
        """Return the highest index of each (what, set); None if it was not needed yet."""
        if self._find_highest is not None:
            return None
        indices = [*self._auto_indices.items()]  # other threads may add some
        found = {pair: index.highest for pair, index in indices}
        return {pair: highest for pair, highest in found.items() if highest}

    def _find_indices(self) -> None:
        """Find the highest indices: those on record, or given meanwhile."""
        with self._finding:
            if self._find_highest is not None:
                highest = dict(self._find_highest())
                for pair, index in [*self._auto_indices.items()]:
                    highest[pair] = max(highest.get(pair, 0), index.given)
                self.reset_indices(highest)

    def get_group(self, block: Block, what: str, set: str) -> KeyGroup:
        """Return the names of one (what, set) in a block."""
        found = block.groups.get((what, set))
        if found is None:
            group = KeyGroup(self.get_auto_index(what, set))
            found = block.groups.setdefault((what, set), group)
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
            Valid Unicode.
        leaves
            Name, kind, number and payload of each row, as ``schema.flatten_value``
            returns them.
        index, epoch, step
            None is null.
        time_us : us since 1970
            None: now.

        Raises
        ------
        RunClosedError
            If the journal is closed.
        """
        counts = (
            time.time_ns() // 1000 if time_us is None else time_us,
            NO_COUNT if index is None else index,
            NO_COUNT if step is None else step,
            NO_EPOCH if epoch is None else epoch,
        )
        self.write_rows(what, set, list(leaves), counts)

    def write_rows(
        self, what: str, set: str, leaves: Sequence[Leaf], counts: RowFields
    ) -> None:
        """Write one row for each leaf, as ``write``."""
        for first in range(0, len(leaves), NAMES_AT_ONCE):
            some = leaves[first : first + NAMES_AT_ONCE]
            for leaf in some:
                self.write_row(what, set, leaf, counts, some)

    def write_row(
        self,
        what: str,
        set: str,
        leaf: Leaf,
        counts: RowFields,
        beside: Sequence[Leaf] = (),
    ) -> None:
        """Write one row, as ``write_rows``.

        Its name, if new, is written with those of the rows ``beside`` it, which follow. A
        slot is taken first: the files of a block stay open as long as a slot has no row.
        """
        name, kind, number, payload = leaf
        block, slot = self.block, CAPACITY
        try:
            for slot in block.slots:
                if slot < CAPACITY:
                    break
                self.roll(block)
                return self.write_row(what, set, leaf, counts, beside)
            group = self.get_group(block, what, set)
            key = group.ids.get(name)
            if key is None:
                new = [leaf[0] for leaf in beside if leaf[0] not in group.ids]
                block.add_keys(group, what, set, new or [name])
                key = group.ids[name]
            flags = 0
            if payload is not None:
                flags = HAS_TEXT
                block.add_payload(slot, payload)
            *first, epoch = counts
            block.put(*encode_row(slot, *first, number, epoch, key, kind, flags))
        except BaseException:
            block.void(slot)
            raise
        if block.text_bytes > MAX_TEXT_BYTES:
            self._tasks.put("too much text")

    def roll(self, block: Block) -> None:
        """Replace a full block by the next one.

        Raises
        ------
        RunClosedError
            If the journal is closed.

        Notes
        -----
        No lock: every thread and handler sets the same successor. A late one may set an
        earlier block again; it is full, so the next caller rolls at once.
        """
        while block.next is None:
            self.check_open()
            keeper = self._keeper
            if threading.current_thread() is keeper or not keeper.is_alive():
                self._make_next_block()
            else:
                self._tasks.put("make")
                time.sleep(0.0005)
        self.block = block.next
        if self._why_closed:  # closed meanwhile: the line above undid it
            self._refuse_rows(self._why_closed)
        self._tasks.put("rolled")

    def check_open(self) -> None:
        """Raise if the journal takes no more rows."""
        if self._why_closed:
            raise RunClosedError(self._why_closed)

    def takes_rows(self) -> bool:
        """Whether this process may write; a forked child may not, and is warned once.

        Raises
        ------
        RunClosedError
            If the journal is closed.
        """
        if not self.is_in_child:
            self.check_open()
            return True
        if not self._has_warned_child:
            self._has_warned_child = True
            warn(f"{self._why_closed} What is logged here is dropped.")
        return False

    def last_seq(self) -> int:
        """Return the highest ``seq`` written, or one below the empty open block."""
        block = self.block
        while True:
            first = block.number * CAPACITY
            if block.limit is None:
                # While it is read, it may be retired, sealed, and its files closed.
                try:
                    last = block.find_last_slot()
                except (OSError, ValueError):  # of a file, or of one that was mapped
                    if block.limit is None:
                        raise
                if block.limit is None:
                    return first + last
            if block.next is None:
                return first + block.limit - 1
            block = block.next

    def begin_close(self) -> None:
        """Refuse further rows, and seal the open blocks beside what the caller does next."""
        if self._why_closed:
            return
        self._last = self._refuse_rows(self._describe_end())
        self._sealer.is_hurried = True
        self._tasks.put("stop")

    def close(self) -> None:
        """Seal the open blocks and release the folder; safe to call twice."""
        self.begin_close()
        if self._last is None or self._is_released:  # None in a forked child
            return
        self._is_released = True
        with contextlib.ExitStack() as ends:
            ends.callback(_JOURNALS.discard, self)
            ends.callback(self._lock.release)
            ends.callback(self._sealer.close)
            ends.callback(self._retire_last)
            self._keeper.wait()

    def _describe_end(self) -> str:
        return (
            "Run.log: expected a run that is open, got "
            f"{self.rank_dir.parent.parent.name!r}, which has finished. "
            "Log before finish(), or start another run."
        )

    def _retire_last(self) -> None:
        """Seal the open blocks, and remove those behind the last one."""
        last = self._last
        assert last is not None
        while self._open:
            block = self._open.pop(0)
            block.retire()
            if block.number <= last.number:
                self._sealer.add(block)
            else:
                block.close(unlink=True)
        self.block.limit = last.limit  # for last_seq

    def close_in_child(self) -> None:
        """Close the copy in a forked child, which must not touch the files."""
        self.is_in_child = True
        self._refuse_rows(
            f"Run.log: expected the process that started the run, got its fork "
            f"(process {os.getpid()}). Log from the parent, or start a run here."
        )

    def _refuse_rows(self, why: str) -> Block:
        """Refuse further rows; returns the block that took the last ones."""
        self._why_closed = why
        last = self.block
        full = Block(last.number)
        full.slots = itertools.count(CAPACITY)
        self.block = full
        return last

    # -------------------------------------------------------------------- keeper

    def _keep(self) -> None:
        """Thread: make blocks, retry what failed, pass full blocks to the sealer."""
        next_tick = 0.0
        while True:
            try:
                task = self._tasks.get(timeout=TICK_S)
            except queue.Empty:
                task = "tick"
            if task == "stop":
                self._retire_last()
                return
            self._renew_lease()
            if self.block.number >= self._open[-1].number:
                self._make_next_block()
            if self.block.text_bytes > MAX_TEXT_BYTES:
                self._retire_open_block()
            self._seal_full_blocks()
            self._retry_pending()
            if self._on_tick and time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_S
                try:
                    self._on_tick()
                except RunClosedError:  # closed meanwhile
                    pass
                except Exception as error:  # noqa: BLE001  this thread must live on
                    warn(f"Journal: expected to read out tensors, got {error!r:.500}.")

    def _renew_lease(self) -> None:
        """Show other machines that this process lives."""
        if not self._lock.beat() and not self._has_lost_lease:
            self._has_lost_lease = True
            warn(
                f"Journal({str(self.rank_dir)!r}): expected to be its only writer, got "
                "another process, which assumed that this one had ended. End one of them: "
                "both now write to the same folder."
            )

    def _make_next_block(self) -> None:
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

    def _retire_open_block(self) -> None:
        """Roll to the next block before the open one is full."""
        block = self.block
        block.retire()
        if block.next is not None:
            self.roll(block)

    def _seal_full_blocks(self) -> None:
        """Pass the blocks before the open one to the sealer."""
        while self._open[0].number < self.block.number:
            block = self._open.pop(0)
            block.retire()
            if not _has_holes(block):
                block.release_files()
            self._sealer.add(block)

    def _retry_pending(self) -> None:
        """Write to the disk what is only in memory, if the disk takes it again."""
        if all(block.is_durable for block in self._open):
            self._has_warned &= self._sealer.has_waiting
            return
        if time.monotonic() < self._retry_at:
            return
        self._retry_at = time.monotonic() + RETRY_S
        try:
            for block in self._open:
                block.write_pending()
            if not all(block.is_durable for block in self._open):
                self._return_to_disk()
        except OSError as error:
            self._warn_of(error)

    def _return_to_disk(self) -> None:
        """Continue in a block on the disk; earlier ones in memory are sealed there."""
        number = self._open[-1].number + 1
        fresh = DiskBlock(self.rank_dir, number, is_synced=self._is_synced)
        self._open[-1].next = fresh
        for block in self._open:
            block.retire()
        self._open.append(fresh)
        if not self._why_closed:
            self.block = fresh
        self._seal_full_blocks()

    def _warn_of(self, error: OSError) -> None:
        """Warn once, until the disk can be written again."""
        if not self._has_warned:
            self._has_warned = True
            advice = "free some space before the process ends"
            if not self.rank_dir.exists():
                advice = "the folder was removed, so it is lost unless it comes back"
            warn(
                f"Journal({str(self.rank_dir)!r}): expected to write to the disk, got "
                f"{error}. Training continues, and what is logged is kept in memory and "
                f"written later: {advice}."
            )


class _Thread(threading.Thread):
    """A thread that the end of the interpreter does not wait for."""

    def __init__(self, target: Callable[[], None], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self._has_stopped = threading.Event()

    def run(self) -> None:
        try:
            super().run()
        finally:
            self._has_stopped.set()

    def wait(self) -> None:
        """Wait for its end; what a signal such as Ctrl-C raises meanwhile is raised afterwards.

        ``join`` alone takes a thread for ended once a signal has interrupted it (Python 3.11).
        """
        try:
            self._has_stopped.wait()
        finally:
            self._has_stopped.wait()
            self.join()


class _Sealer:
    """Thread that turns full blocks into Arrow files.

    Attributes
    ----------
    has_waiting
        Whether blocks wait for a missing row or for the disk.
    is_hurried
        Set when nothing is logged any more: the thread makes no pauses then.
    """

    def __init__(self, rank_dir: Path, warn_of: Callable[[OSError], None]) -> None:
        self.has_waiting = False
        self.is_hurried = False
        self._rank_dir = rank_dir
        self._warn_of = warn_of
        self._queue: queue.SimpleQueue[Block | None] = queue.SimpleQueue()
        self._thread = _Thread(self._seal_all, "tracking-sealer")
        self._thread.start()

    def add(self, block: Block) -> None:
        """Seal a retired block soon."""
        self._queue.put(block)

    def close(self) -> None:
        """Seal what was added and end the thread; it gives up after ``RETRY_S``."""
        self._queue.put(None)
        self._thread.wait()

    def _seal_all(self) -> None:
        waiting: list[Block] = []
        deadline: float | None = None
        while deadline is None or waiting:
            try:
                block = self._queue.get(timeout=RETRY_S if deadline is None else 0.01)
                if block is None:
                    deadline = time.monotonic() + RETRY_S
                else:
                    waiting.append(block)
            except queue.Empty:
                pass
            must = deadline is not None and time.monotonic() > deadline
            waiting = [block for block in waiting if not self._seal(block, must=must)]
            self.has_waiting = bool(waiting)
            if must:
                break
        self._warn_of_loss(waiting)

    def _seal(self, block: Block, *, must: bool) -> bool:
        """Seal a block; False if it has to wait for a row or for the disk."""
        try:
            if _has_holes(block) and not must:
                return False
            rows, text = block.snapshot()
            found = row_format.decode_block(
                self._rank_dir, block.number, rows, rows, text, self._pause
            )
            # Damage without a lost row, such as a text written twice, is not worth a note.
            damage = [one for one in found.damage if one.rows_lost]
            path = get_segment_path(self._rank_dir, block.number)
            write_segment(found.table, path, damage=damage, pause=self._pause)
            block.close(unlink=True)
        except OSError as error:  # also of a folder that is gone, and may come back
            self._warn_of(error)
            return False
        return True

    def _pause(self) -> None:
        """Let other threads run.

        Sealing takes milliseconds. The interpreter switches threads only every 5 ms, and
        a thread that releases its lock without a sleep takes it back at once. Each pause
        may cost the sealer as much: with many more of them it would fall behind.
        """
        if not self.is_hurried:
            time.sleep(0.0003)

    def _warn_of_loss(self, blocks: list[Block]) -> None:
        num_lost = sum(block.limit or 0 for block in blocks if not block.is_durable)
        if num_lost:
            warn(
                f"Journal({str(self._rank_dir)!r}): expected to write to the disk, which "
                f"failed until the end: up to {num_lost} rows are lost. Free some space "
                "before the next run."
            )


def recover(rank_dir: Path) -> None:
    """Seal what an earlier writer left open; the folder must be locked.

    Parameters
    ----------
    rank_dir
        Folder of the rank's records. What cannot be read is noted in the sealed block.
    """
    for stray in (*rank_dir.glob("*.new"), *rank_dir.glob("*.sealing")):
        with contextlib.suppress(IsADirectoryError, PermissionError):  # none of ours
            stray.unlink()
    for number in list_blocks(rank_dir):
        path = get_segment_path(rank_dir, number)
        if not path.is_file():
            content = read_block(rank_dir, number)
            assert content is not None
            write_segment(content.table, path, damage=content.damage)
        for open_file in row_format.get_block_paths(rank_dir, number):
            open_file.unlink(missing_ok=True)


def _lock(rank_dir: Path) -> ProcessLock:
    try:
        return ProcessLock(get_lock_path(rank_dir))
    except LockHeldError as error:
        msg = f"Journal({str(rank_dir)!r}): expected a run that no process is writing,"
        holder = error.holder
        if holder is not None and holder.state == "unknown":
            unknown = describe_unknown(holder, rank_dir.parent.parent.name)
            raise RunBusyError(f"{msg} {unknown}") from error
        raise RunBusyError(
            f"{msg} got one held by {error}. End that process, or start another run here."
        ) from error


def _has_holes(block: Block) -> bool:
    """Whether a row of a retired block is still to come."""
    assert block.limit is not None
    return row_format.has_holes(block.snapshot()[0], block.limit)


def _close_in_child() -> None:
    for journal in tuple(_JOURNALS):
        journal.close_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
