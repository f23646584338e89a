"""Files and folders: replaced in one step, removed, and waited for until on the disk."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tracking.durable.locks import is_busy, mark_busy, mark_free


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file's content; a reader sees all of the old or all of the new one."""
    with replace_file(path) as temporary:
        write_synced(temporary, [data])


def overwrite(path: Path, data: bytes) -> None:
    """Write into the space that a file has already; for a disk that is full.

    A kill in between leaves a torn file, so ``write_atomically`` comes first.
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
            sync_path(temporary)
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

    Both change places in one step where the system can do that (Linux), and the earlier
    one is removed. Elsewhere it is renamed first: a kill in between leaves it whole, but
    not under its name.

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
    if not is_busy(temporary):  # in a container, a killed process had the same number
        shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    mark_busy(temporary)
    try:
        yield temporary
        if not _exchange(temporary, path):
            if path.exists():
                shutil.rmtree(earlier, ignore_errors=True)
                path.rename(earlier)
            temporary.rename(path)
    finally:
        mark_free(temporary)
        shutil.rmtree(temporary, ignore_errors=True)
    # What killed processes left is removed last: until now it may have been the only one.
    name = re.escape(path.name)
    remove_unfinished(path.parent, re.compile(rf"\.(\d+-{name}|{name}\.\d+\.earlier)"))
    shutil.rmtree(earlier, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two files or folders change places; False if the system cannot, or one is missing."""
    rename = (
        getattr(ctypes.CDLL(None), "renameat2", None) if os.name == "posix" else None
    )
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of <fcntl.h>, <stdio.h>
    names = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    return bool(rename(here, names[0], here, names[1], exchange) == 0)


def remove_unfinished(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the folders with such names of which it is known that no process writes them."""
    for path in folder.iterdir():
        if names.fullmatch(path.name) and not is_busy(path):
            shutil.rmtree(path, ignore_errors=True)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder whose files are on the disk; durable when this returns."""
    sync_path(source)
    source.rename(target)
    sync_path(target.parent)


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


def sync_path(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        sync(fd)
    finally:
        os.close(fd)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{os.getpid()}-{path.name}")
