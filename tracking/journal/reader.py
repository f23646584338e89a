"""One rank's part of a journal, read: whole, torn, or while it is being written.

A part is a folder of blocks numbered from 0: ``000012.arrow`` when sealed, a pair
``000012.rows`` and ``000012.text`` before. ``seq`` is block * CAPACITY + slot. Reading
changes nothing on the disk.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pyarrow as pa
from pyarrow import compute as pc

from tracking.errors import RunBusyError
from tracking.journal import row_format as rows
from tracking.journal import segment as sealed
from tracking.journal.segment import CAPACITY, Damage
from tracking.schema import SCHEMA

_BLOCK: Final = re.compile(r"(\d{6,})\.(arrow|rows)")
# Paths of the parts that this process writes. Their locks must not be touched here:
# a process loses a POSIX lock when it closes any descriptor of the file.
_HELD: Final[set[Path]] = set()


class Lock:
    """A part held for writing, until released or until the process ends.

    Parameters
    ----------
    rank_dir
        Folder of the part.

    Raises
    ------
    RunBusyError
        If a process, this one included, holds it already.
    """

    def __init__(self, rank_dir: Path) -> None:
        self._rank_dir = rank_dir.resolve()
        if self._rank_dir in _HELD:
            raise _busy(rank_dir, f"process {os.getpid()} (this one)")
        self._fd = os.open(_lock_file(rank_dir), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            _acquire(self._fd, rank_dir)
        except RunBusyError:
            os.close(self._fd)
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        _HELD.add(self._rank_dir)

    def release(self) -> None:
        """Let others write."""
        if self._rank_dir in _HELD:
            _HELD.discard(self._rank_dir)
            os.close(self._fd)


def forget_locks() -> None:
    """Tell a forked child that it holds nothing."""
    _HELD.clear()


def is_being_written(rank_dir: Path) -> bool:
    """Whether a live process holds a part for writing."""
    if rank_dir.resolve() in _HELD:
        return True
    try:
        fd = os.open(_lock_file(rank_dir), os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(fd)
    return False


def list_blocks(rank_dir: Path) -> list[int]:
    """Numbers of the blocks that are there, in order."""
    if not rank_dir.is_dir():
        return []
    found = (_BLOCK.fullmatch(path.name) for path in rank_dir.iterdir())
    return sorted({int(match[1]) for match in found if match})


@dataclass(frozen=True)
class BlockContent:
    """A block as a reader finds it.

    Attributes
    ----------
    table
        Rows that can be read, in the public schema.
    damage
        What is amiss with a sealed block, or would be with one nobody writes.
    frontier
        Slots below it will not change.
    is_sealed
        Whether no row can come any more.
    """

    table: pa.Table
    damage: list[Damage]
    frontier: int
    is_sealed: bool


def read_block(rank_dir: Path, number: int) -> BlockContent | None:
    """A block, sealed or open; None if it is not there.

    Notes
    -----
    The writer may seal a block, and remove the open pair, between two looks here. So
    each is tried twice.
    """
    for _ in range(3):
        try:
            table, damage = sealed.read(rank_dir / f"{number:06d}.arrow")
            return BlockContent(table, damage, CAPACITY, is_sealed=True)
        except FileNotFoundError:
            pass
        try:
            found = rows.read_files(rank_dir, number)
        except FileNotFoundError:
            continue
        if (rank_dir / f"{number:06d}.arrow").exists():
            continue
        decoded = rows.decode(rank_dir, number, _rank(rank_dir), *found)
        return BlockContent(
            decoded.table, decoded.damage, decoded.frontier, is_sealed=False
        )
    return None


def read_records(rank_dir: Path) -> tuple[pa.Table, list[Damage]]:
    """All rows of a part, superseded and control rows included, and its damages.

    Parameters
    ----------
    rank_dir
        Folder of the part, being written or not.

    Returns
    -------
    rows in the public schema in order of ``seq``, and what could not be read

    Notes
    -----
    While the part is being written, rows that are not whole yet are left out without
    a word; nothing is known to be lost then.
    """
    is_live = is_being_written(rank_dir)
    tables, damage = [SCHEMA.empty_table()], []
    present = list_blocks(rank_dir)
    for number in range(present[-1] + 1 if present else 0):
        view = read_block(rank_dir, number)
        if view is None:
            if not is_live:
                path = rank_dir / f"{number:06d}.arrow"
                damage.append(Damage(path, 0, CAPACITY, "the block is not there"))
            continue
        tables.append(view.table)
        if view.is_sealed or not is_live:
            damage += view.damage
    return pa.concat_tables(tables).unify_dictionaries(), damage


class JournalReader:
    """Rows of a part as they come, in order, each once.

    Parameters
    ----------
    rank_dir
        Folder of the part; it may not be there yet.
    after
        ``seq`` of the last row that is not wanted any more; -1 for all.

    Notes
    -----
    While the part is being written, nothing after a row that is not whole yet is
    given, for that row may still come. Once its writer is gone, it is passed over.
    """

    def __init__(self, rank_dir: Path, after: int = -1) -> None:
        self.rank_dir = rank_dir
        self.after = after
        self._sealed: tuple[int, BlockContent] | None = None
        self._counts: dict[int, int] = {}

    def read(self, max_rows: int = 10_000) -> pa.Table:
        """Next rows, at most ``max_rows``; an empty table if there are none yet.

        Parameters
        ----------
        max_rows : >= 1
            Fewer may come although there are more: ask again until none do.

        Returns
        -------
        rows in the public schema, control rows included
        """
        while True:
            # In this order: a writer that ends in between has written all by then.
            is_live = is_being_written(self.rank_dir)
            present = list_blocks(self.rank_dir)
            number = (self.after + 1) // CAPACITY
            if number not in present:
                later = [n for n in present if n > number]
                if is_live or not later:
                    return SCHEMA.empty_table()
                self.after = later[0] * CAPACITY - 1
                continue
            view = self._view(number)
            table = _after(view, self.after, number, is_live=is_live)
            if table.num_rows:
                table = table.slice(0, max_rows)
                self.after = table["seq"][-1].as_py()
                return table
            is_done = view.is_sealed or view.frontier == CAPACITY or not is_live
            if not is_done or number == present[-1]:
                return SCHEMA.empty_table()
            self.after = (number + 1) * CAPACITY - 1

    def count_unread(self) -> int:
        """Rows that are there and have not been read."""
        first = (self.after + 1) // CAPACITY
        count = 0
        for number in list_blocks(self.rank_dir):
            if number == first:
                table = self._view(number).table
                count += pc.sum(pc.greater(table["seq"], self.after)).as_py() or 0
            elif number > first:
                count += self._count(number)
        return count

    def _view(self, number: int) -> BlockContent:
        """A block; a sealed one is kept, for it is read in several goes."""
        if self._sealed and self._sealed[0] == number:
            return self._sealed[1]
        view = read_block(self.rank_dir, number)
        if view is None:  # removed by hand between two looks
            return BlockContent(SCHEMA.empty_table(), [], CAPACITY, is_sealed=True)
        self._sealed = (number, view) if view.is_sealed else None
        return view

    def _count(self, number: int) -> int:
        """Rows of a block that none has been read of."""
        if number in self._counts:
            return self._counts[number]
        try:
            self._counts[number] = sealed.num_rows(
                self.rank_dir / f"{number:06d}.arrow"
            )
            return self._counts[number]
        except FileNotFoundError:
            pass
        try:
            return rows.num_marked(self.rank_dir, number)
        except FileNotFoundError:  # sealed just now
            return self._count(number) if number in list_blocks(self.rank_dir) else 0


def _after(view: BlockContent, after: int, number: int, *, is_live: bool) -> pa.Table:
    """Rows of a block past ``after`` that are certain."""
    wanted = pc.greater(view.table["seq"], after)
    if is_live and not view.is_sealed:
        end = number * CAPACITY + view.frontier
        wanted = pc.and_(wanted, pc.less(view.table["seq"], end))
    return view.table.filter(wanted)


def _rank(rank_dir: Path) -> int:
    """Rank that a part is of: the name of its folder."""
    return int(rank_dir.name) if rank_dir.name.isdecimal() else 0


def _lock_file(rank_dir: Path) -> Path:
    return rank_dir / "lock"


def _acquire(fd: int, rank_dir: Path) -> None:
    """Take the lock; a reader that looks at it holds it for an instant only."""
    for attempt in range(50):
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # no locks on this filesystem: the caller must take care
            if attempt < 49:
                time.sleep(0.01)
    raise _busy(rank_dir, f"process {os.pread(fd, 300, 0).decode(errors='replace')}")


def _busy(rank_dir: Path, holder: str) -> RunBusyError:
    return RunBusyError(
        f"Journal({str(rank_dir)!r}): expected a run that nobody is writing, got one held "
        f"by {holder}. End that process, or start a run of its own here."
    )
