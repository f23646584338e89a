"""An open block as its writer sees it: rows the kernel owns as soon as they are put.

The file of rows is mapped into memory. Its bytes are written as zeros beforehand, so
that a full disk shows then, as an error, and never later as a SIGBUS. Where mapping is
refused or not safe, each row is a ``pwrite``. A text is appended by one ``write``,
before the row that refers to it is put.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import json
import mmap
import os
import threading
from collections import deque
from functools import partial
from pathlib import Path
from typing import Any, Final

from tracking.journal.row_format import (
    KEY,
    MARK,
    MARK_AT,
    NO_COUNT,
    NO_EPOCH,
    PAYLOAD,
    ROW,
    SIZE,
    entry,
    paths,
)
from tracking.journal.segment import CAPACITY
from tracking.schema import VOID

# A mapped page of these may need new space when it is written, although the file has
# its bytes already (copy on write), or is seen by other machines only when closed.
_UNMAPPED: Final = frozenset(
    ["bcachefs", "btrfs", "ceph", "cifs", "fuse", "nfs", "nfs4", "smb3", "zfs"]
)
_NO_ROW: Final = (NO_COUNT, NO_COUNT, 0.0, NO_EPOCH, 0, VOID, 0)


class Series:
    """The automatic index of one (what, set), counted from 1."""

    __slots__ = ("_counter", "_lock", "_start", "given")

    def __init__(self, highest: int = 0) -> None:
        self._lock = threading.RLock()
        self.reset(highest)

    def reset(self, highest: int) -> None:
        """Let the next index be the one after ``highest``."""
        self.given = highest  # highest index that a caller has given
        self._start = highest + 1
        self._counter = itertools.count(self._start)

    def index_for(self, index: int | None, step: int | None) -> int:
        """Index of a row: as given, none beside a step, else the next one."""
        if index is None:
            return self.next() if step is None else NO_COUNT
        if index > self.given:
            self.given = int(index)
        return index

    def next(self) -> int:
        """Next index; no two threads or signal handlers get the same one."""
        index = next(self._counter)
        if index > self.given:
            return index
        with self._lock:
            if self._start <= self.given:
                self._start = self.given + 1
                self._counter = itertools.count(self._start)
        return self.next()


class Group:
    """One (what, set) in one block: the numbers of its names there."""

    __slots__ = ("ids", "series")

    def __init__(self, series: Series) -> None:
        self.ids: dict[str, int] = {}
        self.series = series


class Block:
    """An open block in memory: what is written to when the disk cannot be.

    Any thread or signal handler writes without a lock, in this order: ``slots`` gives
    a slot (``for slot in block.slots``), ``key`` and ``add_payload`` write what
    the row refers to, ``put`` writes the row.

    Parameters
    ----------
    number
        Of the block, from 0.

    Attributes
    ----------
    slots
        Counter; a slot of CAPACITY or more means that the block takes no more rows.
    groups
        What has been written in it, by (what, set).
    put
        ``put(slot * SIZE, *fields)`` writes one row.
    next
        The block after this one, once made.
    limit
        How many slots were taken, once retired.
    text_bytes
        Size of its texts.

    Notes
    -----
    CPython looks for signals and for other threads after calls and backward jumps, not
    between the steps of ``for``: so no slot is taken without its taker knowing, and a
    handler that raises cannot leave a hole. With ``next(slots)`` it could. In
    ``zip(values, slots)`` the values come first: no slot is taken after the last one.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.slots = itertools.count()
        self.groups: dict[tuple[str, str], Group] = {}
        self.next: Block | None = None
        self.limit: int | None = None
        self.text_bytes = 0
        self._keys = itertools.count()
        # Text (at None) or row (at its offset) that could not be written.
        self._late: deque[tuple[int | None, bytes]] = deque()
        self._rows: bytearray | mmap.mmap = bytearray(CAPACITY * SIZE)
        self.put: Any = partial(ROW.pack_into, self._rows)

    @property
    def is_durable(self) -> bool:
        """Whether all of it is in the kernel's hands."""
        return False

    def key(self, group: Group, what: str, set: str, name: str) -> int:
        """Number of a new name in this block, on record before any row has it."""
        number = next(self._keys)
        self._add_text(entry(KEY, number, json.dumps([what, set, name])))
        group.ids[name] = number
        return number

    def add_payload(self, slot: int, payload: str) -> None:
        """Write a payload, ahead of its row."""
        self._add_text(entry(PAYLOAD, slot, payload))

    def void(self, slot: int) -> None:
        """Mark a slot whose row will not come, unless it has come already."""
        if slot < CAPACITY and not self._is_marked(slot):
            self.put(slot * SIZE, 1, *_NO_ROW, MARK ^ slot)

    def retire(self) -> None:
        """Let no more slots be taken."""
        if self.limit is None:
            # All that are left, in one step that no other thread comes between.
            left = list(itertools.islice(self.slots, CAPACITY))
            self.limit = min(left[0], CAPACITY)

    def snapshot(self) -> tuple[bytes, bytes]:
        """Rows and texts as they are now."""
        return bytes(self._rows), b"".join(data for _, data in self._late)

    def settle(self) -> None:
        """Hold no file any more, now that all rows are there."""

    def save_late(self) -> None:
        """Write what an earlier failure kept in memory; OSError if it fails again."""

    def close(self, *, unlink: bool) -> None:
        """Give up the block, with its files if they are not needed."""

    def _add_text(self, data: bytes) -> None:
        self.text_bytes += len(data)
        self._late.append((None, data))

    def _is_marked(self, slot: int) -> bool:
        at = slot * SIZE + MARK_AT
        return int.from_bytes(self._rows[at : at + 4], "little") == MARK ^ slot


class DiskBlock(Block):
    """An open block in its two files.

    Parameters
    ----------
    rank_dir
        Folder of the part.
    number
        Of the block, which must be new.
    is_synced
        Whether a row is on the disk, not only in the kernel's hands, when put.

    Raises
    ------
    OSError
        If the files cannot be made whole; nothing is left of them then.
    """

    def __init__(self, rank_dir: Path, number: int, *, is_synced: bool) -> None:
        super().__init__(number)
        self._paths = paths(rank_dir, number)
        self._is_synced = is_synced
        self._text, self._file = -1, -1
        try:
            self._make()
        except OSError:
            self.close(unlink=True)
            raise

    def _make(self) -> None:
        """Make both files; that of the rows gets its name when it is whole."""
        rows, text = self._paths
        fresh = rows.with_suffix(".new")
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._text = os.open(text, flags | os.O_APPEND | os.O_TRUNC, 0o666)
        self._file = os.open(fresh, flags | os.O_TRUNC, 0o666)
        try:
            _fill(self._file, CAPACITY * SIZE)
            self._rows = _mapped(self._file, rows.parent)
            if self._is_synced:
                os.fsync(self._file)
            fresh.rename(rows)
        except OSError:
            fresh.unlink(missing_ok=True)
            raise
        if self._is_synced:
            sync_folder(rows.parent)
        if not isinstance(self._rows, mmap.mmap):
            self.put = self._put_by_call
        elif self._is_synced:
            self.put = self._put_synced
        else:
            self.put = partial(ROW.pack_into, self._rows)

    @property
    def is_durable(self) -> bool:  # noqa: D102
        return not self._late

    def settle(self) -> None:  # noqa: D102
        if not self._late and self._file >= 0:
            self.close(unlink=False)

    def snapshot(self) -> tuple[bytes, bytes]:  # noqa: D102
        if self._file < 0:
            rows_path, text_path = self._paths
            return rows_path.read_bytes(), text_path.read_bytes()
        late = tuple(self._late)
        rows = os.pread(self._file, os.fstat(self._file).st_size, 0)
        text = os.pread(self._text, os.fstat(self._text).st_size, 0)
        for offset, data in late:
            if offset is None:
                text += data
            else:
                rows = rows[:offset] + data + rows[offset + SIZE :]
        return rows, text

    def save_late(self) -> None:  # noqa: D102
        while self._late:
            offset, data = self._late[0]
            if offset is None:
                self._append(data)
            else:
                self._write_row(offset, data)
            self._late.popleft()

    def close(self, *, unlink: bool) -> None:  # noqa: D102
        if isinstance(self._rows, mmap.mmap):
            self._rows.close()
        for fd in (self._text, self._file):
            if fd >= 0:
                os.close(fd)
        self._text, self._file = -1, -1
        if unlink:
            for path in self._paths:
                path.unlink(missing_ok=True)

    def _add_text(self, data: bytes) -> None:
        self.text_bytes += len(data)
        if self._late:
            self._late.append((None, data))
            return
        try:
            self._append(data)
        except OSError as error:
            self._late.append((None, data))
            _pass_on_if_foreign(error)

    def _append(self, data: bytes) -> None:
        """Append one entry; a part of it that was taken is for readers to skip."""
        if os.write(self._text, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._is_synced:
            os.fsync(self._text)

    def _put_synced(self, offset: int, *fields: Any) -> None:
        """Write a row and wait until its pages are on the disk."""
        ROW.pack_into(self._rows, offset, *fields)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        assert isinstance(self._rows, mmap.mmap)
        with contextlib.suppress(OSError):  # the kernel has the row all the same
            self._rows.flush(start, offset + SIZE - start)

    def _put_by_call(self, offset: int, *fields: Any) -> None:
        """Write a row where mapping is not to be had."""
        row = ROW.pack(*fields)
        try:
            self._write_row(offset, row)
        except OSError as error:
            self._late.append((offset, row))
            _pass_on_if_foreign(error)

    def _write_row(self, offset: int, row: bytes) -> None:
        if os.pwrite(self._file, row, offset) != SIZE:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._is_synced:
            os.fsync(self._file)

    def _is_marked(self, slot: int) -> bool:
        if isinstance(self._rows, mmap.mmap):
            return super()._is_marked(slot)
        mark = os.pread(self._file, 4, slot * SIZE + MARK_AT)
        return int.from_bytes(mark, "little") == MARK ^ slot


def _pass_on_if_foreign(error: OSError) -> None:
    """Raise again what no system call raised: a handler's TimeoutError, say."""
    if error.errno is None:
        raise error


def sync_folder(folder: Path) -> None:
    """Wait until a folder's list of names is on the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _fill(fd: int, size_bytes: int) -> None:
    """Write zeros, all of them."""
    while size_bytes:
        size_bytes -= os.write(fd, bytes(size_bytes))


def _mapped(fd: int, folder: Path) -> bytearray | mmap.mmap:
    """Mapping of a file of rows; an empty array where that is refused or not safe."""
    if _filesystem(folder) in _UNMAPPED:
        return bytearray()
    try:
        mapped = mmap.mmap(fd, CAPACITY * SIZE)
    except OSError:
        return bytearray()
    for at in range(0, CAPACITY * SIZE, mmap.PAGESIZE):
        mapped[at] = 0  # each page's first write is slow: not left to the callers
    return mapped


@functools.lru_cache
def _filesystem(folder: Path) -> str:
    """Type of the filesystem that a folder is on; empty if the system does not tell."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return ""
    depth, found, folder = -1, "", folder.resolve()
    for line in mounts:  # a later mount hides an earlier one at the same place
        mount, _, source = line.partition(" - ")
        point = Path(mount.split()[4].replace("\\040", " "))
        if len(point.parts) >= depth and folder.is_relative_to(point):
            depth, found = len(point.parts), source.split()[0].partition(".")[0]
    return found
