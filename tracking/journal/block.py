"""The block that takes new rows; a row belongs to the kernel as soon as it is put.

The file of rows is mapped into memory. It is filled with zeros first, so that a full
disk shows then, as an error, and not later as a SIGBUS. Where mapping fails or is not
safe, each row is written by ``pwrite``. A text is appended by one ``write``, before the
row that refers to it is put.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any, Final

from tracking import durable
from tracking.journal.row_format import (
    KEY,
    MAX_COUNT,
    NO_COUNT,
    NO_EPOCH,
    PAYLOAD,
    ROW,
    ROW_BYTES,
    encode_row,
    encode_text,
    get_block_paths,
    is_written,
)
from tracking.journal.segment import CAPACITY
from tracking.schema import VOID

_NO_ROW: Final = (NO_COUNT, NO_COUNT, 0.0, NO_EPOCH, 0, VOID, 0)


class AutoIndex:
    """The automatic index of one (what, set), counted from 1."""

    __slots__ = ("_counter", "_find", "_lock", "_start", "given")

    def __init__(
        self, highest: int = 0, find: Callable[[], None] | None = None
    ) -> None:
        self._lock = threading.RLock()
        self.reset(highest)
        if find is not None:
            self.reset_later(find)

    def reset(self, highest: int) -> None:
        """Continue after ``highest``."""
        self.given = highest  # highest index that a caller has passed
        self._start = min(highest + 1, MAX_COUNT)
        self._counter: Iterator[int] = itertools.count(self._start)

    def reset_later(self, find: Callable[[], None]) -> None:
        """Call ``find``, which resets this index, before the next one is taken."""
        self.given, self._find, self._counter = 0, find, iter(())

    @property
    def highest(self) -> int:
        """Highest index that was given or taken."""
        taken = int(repr(self._counter)[len("count(") : -1]) - 1
        return max(self.given, taken)

    def choose(self, index: int | None, step: int | None) -> int:
        """Return a row's index: ``index`` if given, none beside a step, else the next."""
        if index is None:
            return self.next() if step is None else NO_COUNT
        self.give(index)
        return index

    def give(self, index: int) -> None:
        """Take note of an index that a caller passed."""
        if index > self.given:
            self.given = int(index)

    def next(self) -> int:
        """Take the next index; no two threads or signal handlers get the same one."""
        try:
            index = next(self._counter)
        except StopIteration:
            self._find()
            return self.next()
        if index > self.given:
            return index
        with self._lock:
            if self.given == MAX_COUNT:
                raise ValueError(
                    f"Run.log: expected an index below {MAX_COUNT}, got that one before, "
                    "so there is no next one. Pass an index."
                )
            if self._start <= self.given:
                self._start = self.given + 1
                self._counter = itertools.count(self._start)
        return self.next()


class KeyGroup:
    """The names of one (what, set) in one block, and the number that stands for each."""

    __slots__ = ("auto_index", "ids")

    def __init__(self, auto_index: AutoIndex) -> None:
        self.ids: dict[str, int] = {}
        self.auto_index = auto_index


class Block:
    """An open block in memory, used while the disk cannot be written.

    Any thread or signal handler writes without a lock, in this order: take a slot
    (``for slot in block.slots``), write what the row refers to (``add_keys``,
    ``add_payload``), write the row (``put``).

    Attributes
    ----------
    slots
        Counter; a slot of CAPACITY or more means that the block takes no more rows.
    groups
        Names written in it, by (what, set).
    entries
        Number and automatic index of each name, by (what, set, name).
    put
        ``put(slot * ROW_BYTES, data, check)`` writes one row, see ``encode_row``.
    next
        The following block, once made.
    limit
        Number of slots taken, once retired.

    Notes
    -----
    CPython checks for signals and other threads after calls and backward jumps, not
    between the steps of ``for``: no slot is taken without its taker knowing, and a
    handler that raises cannot leave a hole. With ``next(slots)`` it could. In
    ``zip(values, slots)`` the values come first, so that no slot is taken after the last
    one.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.slots = itertools.count()
        self.groups: dict[tuple[str, str], KeyGroup] = {}
        self.entries: dict[tuple[str, str, str], tuple[int, AutoIndex]] = {}
        self.next: Block | None = None
        self.limit: int | None = None
        self.text_bytes = 0
        self._keys = itertools.count()
        # Texts (at None) and rows (at their offset) that are not on the disk yet.
        self._pending: deque[tuple[int | None, bytes]] = deque()
        self._rows: bytearray | mmap.mmap = bytearray(CAPACITY * ROW_BYTES)
        self.put: Any = partial(ROW.pack_into, self._rows)

    @property
    def is_durable(self) -> bool:
        """Whether everything was passed to the kernel."""
        return False

    def add_keys(
        self, group: KeyGroup, what: str, set: str, names: Sequence[str]
    ) -> None:
        """Number new names, with one write for all, before any row that uses them."""
        numbered = dict(zip(names, self._keys, strict=False))
        head = json.dumps([what, set])[:-1]
        texts = [
            encode_text(KEY, number, f"{head}, {encode_basestring_ascii(name)}]")
            for name, number in numbered.items()
        ]
        self._add_text(b"".join(texts))
        group.ids.update(numbered)
        index = group.auto_index
        for name, number in numbered.items():
            self.entries[what, set, name] = number, index

    def add_payload(self, slot: int, payload: str) -> None:
        """Write a payload, before its row."""
        self._add_text(encode_text(PAYLOAD, slot, payload))

    def void(self, slot: int) -> None:
        """Mark a slot whose row will not be written, unless it was already."""
        if slot < CAPACITY and not is_written(slot, self._read_row(slot)):
            self.put(*encode_row(slot, 1, *_NO_ROW))

    def find_last_slot(self) -> int:
        """Find the highest slot that has a row; -1 if none has.

        Behind it are at most those slots whose rows other threads are about to write.
        """
        slot = min(int(repr(self.slots)[len("count(") : -1]), CAPACITY) - 1
        while slot >= 0 and not is_written(slot, self._read_row(slot)):
            slot -= 1
        return slot

    def retire(self) -> None:
        """Stop handing out slots."""
        if self.limit is None:
            # Takes the rest in one step that no other thread can interrupt.
            left = list(itertools.islice(self.slots, CAPACITY))
            self.limit = min(left[0], CAPACITY)

    def snapshot(self) -> tuple[bytes, bytes]:
        """Return the bytes of rows and texts as they are now."""
        return bytes(self._rows), b"".join(data for _, data in self._pending)

    def release_files(self) -> None:
        """Close the files of a block that has all its rows."""

    def write_pending(self) -> None:
        """Write what an earlier failure kept in memory; OSError if it fails again."""

    def close(self, *, unlink: bool) -> None:
        """Close the files, and remove them if they are not needed."""

    def _add_text(self, data: bytes) -> None:
        self.text_bytes += len(data)
        self._pending.append((None, data))

    def _read_row(self, slot: int) -> bytes:
        return bytes(self._rows[slot * ROW_BYTES : (slot + 1) * ROW_BYTES])


class DiskBlock(Block):
    """An open block in its two files.

    Parameters
    ----------
    number
        Number of the block, which must be new.
    is_synced
        Whether ``put`` waits until a row is on the disk, not only in the kernel.
    is_mapped
        Whether the rows are mapped into memory; else they are written by system calls.
        None: where the file system is known to keep them.

    Raises
    ------
    OSError
        If the files cannot be made; none is left behind.
    """

    def __init__(
        self,
        rank_dir: Path,
        number: int,
        *,
        is_synced: bool,
        is_mapped: bool | None = None,
    ) -> None:
        super().__init__(number)
        self._paths = get_block_paths(rank_dir, number)
        self._is_synced = is_synced
        self._text, self._file = -1, -1
        try:
            if is_mapped is None:
                is_mapped = durable.get_filesystem(rank_dir).keeps_maps
            self._make_files(is_mapped)
        except OSError:
            self.close(unlink=True)
            raise

    def _make_files(self, is_mapped: bool) -> None:
        rows, text = self._paths
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._text = os.open(text, flags | os.O_APPEND | os.O_TRUNC, 0o666)
        # The rows get their name once the file has its full size.
        fresh = rows.with_suffix(".new")
        with durable.replace_file(rows, temporary=fresh, sync=self._is_synced):
            self._file = os.open(fresh, flags | os.O_TRUNC, 0o666)
            _fill_with_zeros(self._file, CAPACITY * ROW_BYTES)
            self._rows = _map_rows(self._file) if is_mapped else bytearray()
        if self._is_synced:
            durable.sync_path(rows.parent)
        if not isinstance(self._rows, mmap.mmap):
            self.put = self._put_unmapped
        elif self._is_synced:
            self.put = self._put_synced
        else:
            self.put = partial(ROW.pack_into, self._rows)

    @property
    def is_durable(self) -> bool:  # noqa: D102
        return not self._pending

    def release_files(self) -> None:  # noqa: D102
        if not self._pending and self._file >= 0:
            self.close(unlink=False)

    def snapshot(self) -> tuple[bytes, bytes]:  # noqa: D102
        if self._file < 0:
            rows_path, text_path = self._paths
            return rows_path.read_bytes(), text_path.read_bytes()
        pending = tuple(self._pending)
        rows = os.pread(self._file, os.fstat(self._file).st_size, 0)
        text = os.pread(self._text, os.fstat(self._text).st_size, 0)
        for offset, data in pending:
            if offset is None:
                text += data
            else:
                rows = rows[:offset] + data + rows[offset + ROW_BYTES :]
        return rows, text

    def find_last_slot(self) -> int:  # noqa: D102
        pending = [at // ROW_BYTES for at, _ in tuple(self._pending) if at is not None]
        return max([super().find_last_slot(), *pending])

    def write_pending(self) -> None:  # noqa: D102
        while self._pending:
            offset, data = self._pending[0]
            if offset is None:
                self._append(data)
            else:
                self._write_row(offset, data)
            self._pending.popleft()

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
        if self._pending:
            self._pending.append((None, data))
            return
        try:
            self._append(data)
        except OSError as error:
            self._pending.append((None, data))
            _raise_if_foreign(error)

    def _append(self, data: bytes) -> None:
        """Append one entry; readers skip one that was written in part."""
        if os.write(self._text, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._is_synced:
            durable.sync(self._text)

    def _put_synced(self, offset: int, data: bytes, check: int) -> None:
        """Write a row and wait until its pages are on the disk."""
        ROW.pack_into(self._rows, offset, data, check)
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        assert isinstance(self._rows, mmap.mmap)
        with contextlib.suppress(OSError):  # the kernel has the row anyway
            self._rows.flush(start, offset + ROW_BYTES - start)

    def _put_unmapped(self, offset: int, data: bytes, check: int) -> None:
        row = ROW.pack(data, check)
        try:
            self._write_row(offset, row)
        except OSError as error:
            self._pending.append((offset, row))
            _raise_if_foreign(error)

    def _write_row(self, offset: int, row: bytes) -> None:
        if os.pwrite(self._file, row, offset) != ROW_BYTES:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._is_synced:
            durable.sync(self._file)

    def _read_row(self, slot: int) -> bytes:
        if isinstance(self._rows, mmap.mmap):
            return super()._read_row(slot)
        return os.pread(self._file, ROW_BYTES, slot * ROW_BYTES)


def _raise_if_foreign(error: OSError) -> None:
    """Raise an error that no system call made, such as a signal handler's TimeoutError."""
    if error.errno is None:
        raise error


def _fill_with_zeros(fd: int, size_bytes: int) -> None:
    while size_bytes:
        size_bytes -= os.write(fd, bytes(size_bytes))


def _map_rows(fd: int) -> bytearray | mmap.mmap:
    """Map a file of rows; an empty array where that fails."""
    try:
        mapped = mmap.mmap(fd, CAPACITY * ROW_BYTES)
    except OSError:
        return bytearray()
    for at in range(0, CAPACITY * ROW_BYTES, mmap.PAGESIZE):
        mapped[at] = (
            0  # the first write to a page is slow: callers shall not pay for it
        )
    return mapped
