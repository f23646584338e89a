"""Files that survive a crash: atomic replacement, waiting for the disk, and locks.

The only module that renames a file into place, calls ``fsync`` or takes a lock.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Final

with contextlib.suppress(ImportError):  # Windows, where harness must still import
    import fcntl

# Lock files that this process holds. Nothing here may open one of them again: a process
# loses its POSIX lock when it closes any descriptor of the file.
_HELD: Final[set[Path]] = set()

_BUSY: Final[dict[Path, int]] = {}
"""Descriptors, which hold a lock, of the folders that this process writes."""


# ------------------------------------------------------------------------- files


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content; a reader sees all of the old or all of the new one."""
    with replace_file(path) as temporary:
        write_synced(temporary, [data])


def overwrite(path: Path, data: bytes) -> None:
    """Write into the space that a file has already; for a disk that is full.

    A kill in between leaves a torn file, so ``write_atomically`` comes first.

    Raises
    ------
    OSError
        If the file does not have the space.
    """
    with path.open("r+b", buffering=0) as file:
        if len(data) > os.fstat(file.fileno()).st_blocks * 512:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.write(data)
        file.truncate()


@contextlib.contextmanager
def replace_file(
    path: Path, *, temporary: Path | None = None, sync: bool = False
) -> Iterator[Path]:
    """Replace a file by what the block writes, if the block succeeds.

    Parameters
    ----------
    path
        File to replace; its folder must exist.
    temporary
        Where the block writes; None: a hidden file beside ``path`` with the same suffix,
        which some writers take the format from.
    sync
        Wait until the content is on the disk before renaming. Not needed after
        ``write_synced``.

    Yields
    ------
    path that the block must write to; removed if the block raises
    """
    temporary = temporary or _temporary(path)
    try:
        yield temporary
        if sync:
            _sync_path(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def copy_if_absent(source: Path, path: Path) -> bool:
    """Copy a file in one step, unless ``path`` has content; returns whether it did."""
    temporary = _temporary(path)
    try:
        shutil.copyfile(source, temporary)
        try:
            os.link(temporary, path)  # unlike a rename, it replaces nothing
        except FileExistsError:
            if has_content(path):
                return False
            temporary.replace(path)  # empty, as touch leaves it
        except OSError:  # a filesystem without hard links
            temporary.replace(path)
        return True
    finally:
        temporary.unlink(missing_ok=True)


def has_content(path: Path) -> bool:
    """Whether a file exists and is not empty."""
    with contextlib.suppress(OSError):
        return path.stat().st_size > 0
    return False


@contextlib.contextmanager
def replace_folder(path: Path, *, temporary: Path | None = None) -> Iterator[Path]:
    """Replace a folder by the one that the block fills, if the block succeeds.

    An earlier folder is renamed before the new one takes its place, and then removed. A
    kill at any moment leaves the earlier or the new one whole, if not always under its
    name.

    Parameters
    ----------
    path
        Folder to replace; its parents are made.
    temporary
        Folder that the block fills, made here; None: a hidden one beside ``path``.

    Yields
    ------
    empty folder; removed if the block raises
    """
    temporary = temporary or _temporary(path)
    earlier = path.with_name(f".{path.name}.{os.getpid()}.earlier")
    temporary.mkdir(parents=True)
    mark_busy(temporary)
    try:
        yield temporary
        if path.exists():
            path.rename(earlier)
        temporary.rename(path)
    finally:
        mark_free(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
    # What killed processes left is removed last: until now it may have been the only one.
    name = re.escape(path.name)
    remove_unfinished(path.parent, re.compile(rf"\.(\d+-{name}|{name}\.\d+\.earlier)"))
    shutil.rmtree(earlier, ignore_errors=True)


def mark_busy(folder: Path) -> None:
    """Mark a folder as being written until ``mark_free``, or until the process ends."""
    _BUSY[folder] = fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    with contextlib.suppress(OSError):  # a filesystem without locks
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def mark_free(folder: Path) -> None:
    """Take the mark of ``mark_busy`` away; safe to call twice, and after a rename."""
    fd = _BUSY.pop(folder, None)
    if fd is not None:
        os.close(fd)


def remove_unfinished(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the folders with such names that no live process is writing."""
    for path in folder.iterdir():
        if names.fullmatch(path.name) and not _is_busy(path):
            shutil.rmtree(path, ignore_errors=True)


def _is_busy(folder: Path) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a filesystem without locks
        return False
    finally:
        os.close(fd)
    return False


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder whose files are on the disk; durable when this returns."""
    sync_folder(source)
    source.rename(target)
    sync_folder(target.parent)


def remove_folder(path: Path, *, aside: Path) -> None:
    """Remove a folder; it is renamed to ``aside`` first, and never seen half removed."""
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def write_synced(path: Path, chunks: Iterable[Any]) -> None:
    """Write bytes-like chunks to a file and wait until they are on the disk."""
    with path.open("wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        sync(file.fileno())


def sync(fd: int) -> None:
    """Wait until an open file's content is on the disk."""
    os.fsync(fd)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's list of names is on the disk."""
    _sync_path(folder)


def _sync_path(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}-{path.name}")


# ------------------------------------------------------------------------- locks


class LockHeldError(Exception):
    """Somebody holds the lock already; the message says who."""


class ProcessLock:
    """A lock file, held until ``release`` or until the process ends.

    A POSIX record lock: unlike that of ``hold_lock``, it is not inherited by a forked
    child, which may outlive the process. It contains the holder's process id and host.

    Parameters
    ----------
    path
        Lock file, made if absent; it is never removed.

    Raises
    ------
    LockHeldError
        If a process, this one included, holds it.
    OSError
        If the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        if self._path in _HELD:
            raise LockHeldError(f"process {os.getpid()} (this one)")
        # The file is overwritten, so a link in a run of somebody else is not followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(path, flags)
        try:
            _lock_record(self._fd)
        except LockHeldError:
            os.close(self._fd)
            raise
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
        _HELD.add(self._path)

    def release(self) -> None:
        """Release the lock; safe to call twice, and in a forked child."""
        if self._path in _HELD:
            _HELD.discard(self._path)
            os.close(self._fd)


def is_locked(path: Path) -> bool:
    """Whether a live process, this one included, holds a ``ProcessLock``."""
    if path.resolve() in _HELD:
        return True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # no pipe
    except OSError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EACCES, errno.EAGAIN)
    finally:
        os.close(fd)
    return False


def _lock_record(fd: int) -> None:
    """Take the POSIX lock; ``is_locked`` elsewhere holds it for an instant only."""
    for attempt in range(50):
        try:
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                return  # no locks on this filesystem: the caller must take care
            if attempt < 49:
                time.sleep(0.01)
    raise LockHeldError(f"process {os.pread(fd, 300, 0).decode(errors='replace')}")


@contextlib.contextmanager
def hold_lock(path: Path, timeout_s: float | None = None) -> Iterator[bool]:
    """Hold a lock file during the block.

    The kernel releases it when the process ends. A forked child inherits it.

    Parameters
    ----------
    path
        Lock file, made if absent; it is never removed.
    timeout_s
        Seconds to wait for another holder; None: without limit.

    Yields
    ------
    whether the lock was acquired
    """
    with path.open("a") as file:
        yield _lock_file(file.fileno(), timeout_s)


def _lock_file(fd: int, timeout_s: float | None) -> bool:
    if timeout_s is None:
        fcntl.flock(fd, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.1)
        else:
            return True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HELD.clear)  # a child holds no record lock
