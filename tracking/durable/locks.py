"""Locks of processes, each with a lease beside it where the lock alone does not tell."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from tracking.durable import leases
from tracking.durable.filesystem import get_filesystem
from tracking.durable.leases import BEAT_S, Holder, Lease, LockState
from tracking.errors import warn

with contextlib.suppress(ImportError):  # Windows, where harness must still import
    import fcntl

# Lock files that this process holds. Nothing here may open one of them again: a process
# loses its POSIX lock when it closes any descriptor of the file.
_HELD: Final[dict[Path, ProcessLock]] = {}

_BUSY: Final[dict[Path, contextlib.ExitStack]] = {}
"""What is to be given back for each folder that this process writes."""

_TAKEN: Final = (errno.EACCES, errno.EAGAIN)
"""Errors that say that another process holds a lock. Others say that there are no locks."""

_POLL_S: Final = 1.0


class LockHeldError(Exception):
    """Somebody holds the lock, or may hold it.

    Attributes
    ----------
    holder
        Who that is; None if it is this process.
    """

    def __init__(self, holder: Holder | None) -> None:
        self.holder = holder
        super().__init__(str(holder or f"process {os.getpid()} (this one)"))


def get_lease_path(path: Path) -> Path:
    """Return the file of the lease on a lock."""
    return path.with_name(f"{path.name}.lease")


# ------------------------------------------------------------------ locks of a process


class ProcessLock:
    """A lock file, held until ``release`` or until the process ends.

    A POSIX record lock: unlike that of ``hold_lock``, it is not inherited by a forked
    child, which may outlive the process. A lease beside it is renewed by ``beat``.

    Parameters
    ----------
    path
        Lock file, made if absent; it is never removed.

    Raises
    ------
    LockHeldError
        If a process, this one included, holds it or may hold it.
    OSError
        If the file cannot be opened.

    Notes
    -----
    A process that was killed on another machine leaves a fresh lease. If it will be that of
    an ended process once it is stale, the call waits for that, up to ``STALE_S``. If a file
    server still keeps the lock of a machine that is gone, the call waits as long for it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path.resolve()
        # The kernel gives a lock to all threads of a process: one of them is let through.
        if _HELD.setdefault(self._path, self) is not self:
            raise LockHeldError(None)
        with contextlib.ExitStack() as failed:
            failed.callback(_HELD.pop, self._path, None)
            # The file is overwritten: a link in a run of somebody else is not followed.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._fd = os.open(path, flags)
            failed.callback(os.close, self._fd)
            self._lease = _take(self._path, self._fd)
            failed.callback(self._lease.release)
            os.ftruncate(self._fd, 0)
            if self._lease.has_lock:
                text = f"{os.getpid()} on {socket.gethostname()}"
                os.pwrite(self._fd, text.encode(), 0)
            failed.pop_all()

    def beat(self) -> bool:
        """Renew the lease if it is time; False if another process has taken it over."""
        return self._lease.beat()

    def release(self) -> None:
        """Release the lock; safe to call twice, and in a forked child."""
        if _HELD.get(self._path) is self:
            del _HELD[self._path]
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            self._lease.release()  # before the lock: nobody can have taken it over
            os.close(self._fd)


def find_holder(path: Path) -> Holder | None:
    """Find out who holds a ``ProcessLock``, this process included; None if nobody does.

    A holder that may have ended, or may not, is returned as ``unknown``.
    """
    if _HELD and path.resolve() in _HELD:  # a process that only reads resolves no links
        return Holder(state="live", process=leases.ProcessId.here())
    holder = _find_holder(path, *_ask_lock(path))
    return None if holder is None or holder.state == "ended" else holder


def release_lock(path: Path) -> None:
    """Take the holder of a ``ProcessLock`` for ended, because somebody knows that it has."""
    leases.remove(get_lease_path(path))
    with contextlib.suppress(OSError), path.open("r+b") as file:
        file.truncate(0)


def _ask_lock(path: Path) -> tuple[LockState, str]:
    """Ask a lock file; what it tells, and the text in it."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # no pipe
    except (FileNotFoundError, NotADirectoryError):
        return "free", ""
    except OSError:
        return "missing", ""
    try:
        text = _read_text(fd)
        return _try_lock(fcntl.lockf, fd, fcntl.LOCK_SH | fcntl.LOCK_NB), text
    finally:
        os.close(fd)


def _try_lock(lock: Callable[[int, int], object], fd: int, operation: int) -> LockState:
    """Call a function of ``fcntl`` for the lock of an open file; what it tells."""
    try:
        lock(fd, operation)
    except OSError as error:
        return "held" if error.errno in _TAKEN else "missing"
    return "free"


def _read_text(fd: int) -> str:
    with contextlib.suppress(OSError):
        return os.pread(fd, 300, 0).decode(errors="replace")
    return ""


def _find_holder(
    path: Path, lock: LockState, text: str, *, when_stale: bool = False
) -> Holder | None:
    """Judge by the lease, and where there is none by the lock, which has a text."""
    holder = leases.judge(get_lease_path(path), lock, when_stale=when_stale)
    if holder is None and lock == "held":
        return Holder(state="live", text=text)
    return holder


def _take(path: Path, fd: int) -> Lease:
    """Take the POSIX lock, where the file system has one, and write a lease.

    A holder that may be gone is waited for, until it shows that it lives.
    """
    first: Holder | None = None
    deadline = 0.0
    for attempt in itertools.count():
        lock = _try_lock(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock == "held" and attempt < 50:  # ``find_holder`` has it for an instant
            time.sleep(0.01)
            continue
        text = _read_text(fd)
        holder = _find_holder(path, lock, text)
        if holder is None or holder.state == "ended":
            if holder is not None:
                leases.remove(get_lease_path(path), lock)
            with contextlib.suppress(FileExistsError):
                return Lease(get_lease_path(path), has_lock=lock == "free")
            continue
        is_unreadable = holder.process is None  # its lease may be being written
        if first is None:
            if not _may_be_gone(path, lock, text, holder):
                raise LockHeldError(holder)
            first, deadline = holder, time.monotonic() + leases.STALE_S
            warn(
                f"{path.parent}: expected a folder that no process writes, got one of "
                f"{holder}, which may have been killed. This process waits up to "
                f"{leases.STALE_S:g} s for a sign of life."
            )
        else:
            is_late = time.monotonic() > deadline and (lock == "held" or is_unreadable)
            if is_late or (holder != first and not is_unreadable):
                raise LockHeldError(holder)
        time.sleep(_POLL_S)
    raise AssertionError


def _may_be_gone(path: Path, lock: LockState, text: str, holder: Holder) -> bool:
    """Whether the holder of a lock may be on a machine that is gone, or be killed.

    A file server releases the locks of a machine that does not answer only after a while:
    NFS 4 after 90 s. A lease shows it once it is stale.
    """
    if lock == "held":
        process = holder.process
        return process is not None and not process.has_same_kernel(
            leases.ProcessId.here()
        )
    later = _find_holder(path, lock, text, when_stale=True)
    return later is None or later.state == "ended"


# -------------------------------------------------------------------- locks of a block


@contextlib.contextmanager
def hold_lock(path: Path, timeout_s: float | None = None) -> Iterator[bool]:
    """Hold a lock file during the block.

    The kernel releases it when the process ends. A forked child inherits it. Where locks
    are missing or not known to be shared, a lease is held too.

    Parameters
    ----------
    path
        Lock file, made if absent; it is never removed.
    timeout_s
        Seconds to wait for another holder; None: without limit.

    Yields
    ------
    whether the lock was acquired

    Raises
    ------
    LockHeldError
        Without a limit, if it is not known whether the holder lives.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with path.open("a") as file, contextlib.ExitStack() as stack:
        while not (is_held := _try_to_hold(file.fileno(), path, stack, deadline)):
            if deadline is not None and time.monotonic() >= deadline:
                break
            time.sleep(0.1)
        yield is_held


def _try_to_hold(
    fd: int, path: Path, stack: contextlib.ExitStack, deadline: float | None
) -> bool:
    """Take a lock, and what has to be held beside it; False if another process has it.

    Without a deadline, the lock is waited for.
    """
    wait = 0 if deadline is None else fcntl.LOCK_NB
    lock = _try_lock(fcntl.flock, fd, fcntl.LOCK_EX | wait)
    if lock == "held":
        return False
    if lock == "free" and get_filesystem(path.parent).shares_locks:
        return True
    lease_path = get_lease_path(path)
    holder = leases.judge(lease_path, lock)
    if holder is not None:
        if holder.state == "unknown" and deadline is None:
            raise LockHeldError(holder)
        if holder.state != "ended":
            return False
        leases.remove(lease_path, lock)
    try:
        lease = Lease(lease_path, has_lock=lock == "free")
    except FileExistsError:
        return False
    stack.enter_context(_beating(lease))
    return True


@contextlib.contextmanager
def _beating(lease: Lease) -> Iterator[None]:
    """Renew a lease in a thread during the block, and release it afterwards."""
    has_ended = threading.Event()

    def beat() -> None:
        while not has_ended.wait(BEAT_S):
            lease.beat()

    try:
        threading.Thread(target=beat, name="tracking-lease", daemon=True).start()
        yield
    finally:
        has_ended.set()
        lease.release()


# ------------------------------------------------------------- folders that are written


def mark_busy(folder: Path) -> None:
    """Mark a folder as being written until ``mark_free``, or until the process ends."""
    with contextlib.ExitStack() as stack:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        _try_to_hold(fd, folder, stack, deadline=0.0)
        _BUSY[folder] = stack.pop_all()


def mark_free(folder: Path) -> None:
    """Take the mark of ``mark_busy`` away; safe to call twice, and after a rename."""
    stack = _BUSY.pop(folder, None)
    if stack is not None:
        stack.close()


def is_busy(folder: Path) -> bool:
    """Whether a process writes a folder, or may write it."""
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        lock = _try_lock(fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)
    if lock == "held":
        return True
    if lock == "free" and get_filesystem(folder.parent).shares_locks:
        return False
    holder = leases.judge(get_lease_path(folder), lock)
    if holder is None:  # where there are no locks, an earlier version left none either
        return lock == "missing"
    if holder.state == "ended":
        leases.remove(get_lease_path(folder), lock)
    return holder.state != "ended"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HELD.clear)  # a child holds no record lock
