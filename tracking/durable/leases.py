"""Leases: who writes a folder, where a lock does not tell.

Some file systems have no locks (Lustre without the option ``flock``), or keep them on one
machine (NFS with ``local_lock``). So whoever holds a lock writes a lease beside it: host,
boot and process, and the time of the file is renewed again and again. From it follows
whether the holder lives, has ended, or whether that cannot be known from here. What is not
known is never taken for ended.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal

from tracking.durable.filesystem import get_filesystem
from tracking.settings import read_job

BEAT_S: Final = 10.0
"""Seconds after which a holder renews its lease."""

STALE_S: Final = 120.0
"""A lease that was renewed within so many seconds is that of a live holder.

It leaves room for slow disks, for clocks that differ, and for the time in which NFS shows an
old state of a file.
"""

State = Literal["live", "ended", "unknown"]
"""Of the holder of a lock. One that is stopped or slow is live or unknown, never ended."""

LockState = Literal["held", "free", "missing"]
"""What a lock tells; ``missing`` where the file system has none, or it cannot be asked."""

_MAX_BYTES: Final = 10_000
_LATEST: Final = 1e11  # seconds since 1970: a year of four digits


@dataclass(frozen=True, kw_only=True)
class ProcessId:
    """A process, so that no other one is taken for it."""

    #: Name of the host, its id, and the id of its boot. The last two are empty where
    #: the system has none.
    host: str
    machine: str = ""
    boot: str = ""
    #: the process ids are those of this namespace: containers have their own
    namespace: str = ""
    #: id of the process, and when it started in clock ticks since the boot
    pid: int = 0
    began: int | None = None
    #: job of the batch system, and how often it was restarted
    job: str = ""
    restart: int = 0

    @classmethod
    def here(cls) -> ProcessId:
        """Describe this process."""
        return _describe_process(os.getpid())

    def has_same_kernel(self, other: ProcessId) -> bool:
        """Whether both ask the same kernel for locks and processes.

        Machines that were cloned while they ran have the same boot, but other host names.
        So have containers, each with a namespace of its own.
        """
        is_same_host = self.host == other.host
        if not (self.boot or other.boot):
            return is_same_host
        is_container = self.namespace != other.namespace
        return self.boot == other.boot and (is_same_host or is_container)

    def was_rebooted(self, now: ProcessId) -> bool:
        """Whether the machine of this process has started again since."""
        is_same = self.host == now.host and self.machine == now.machine != ""
        # Containers may have the machine's id from their image.
        is_same = is_same and self.namespace == now.namespace
        return is_same and self.boot != now.boot

    def was_restarted(self, now: ProcessId) -> bool:
        """Whether the batch system has started the same job again since."""
        return self.job == now.job != "" and self.restart < now.restart


@functools.lru_cache(1)
def _describe_process(pid: int) -> ProcessId:
    namespace = ""
    with contextlib.suppress(OSError):
        namespace = str(Path("/proc/self/ns/pid").readlink())
    job, restart = read_job() or ("", 0)
    return ProcessId(
        host=socket.gethostname(),
        machine=_read_line("/etc/machine-id"),
        boot=_read_line("/proc/sys/kernel/random/boot_id"),
        namespace=namespace,
        pid=pid,
        began=read_start(pid),
        job=job,
        restart=restart,
    )


def _read_line(path: str) -> str:
    with contextlib.suppress(OSError, ValueError):
        return Path(path).read_text(encoding="ascii").strip()
    return ""


def read_stat(pid: int) -> list[str] | None:
    """Fields of ``/proc/<pid>/stat``: state, parent, group and so on; None if there are none.

    See proc(5); the command's name comes before them, in brackets, and may contain anything.
    """
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return text.rpartition(")")[2].split()
    return None


def read_start(pid: int) -> int | None:
    """When a process started, in clock ticks of the system; None if it has ended.

    A process that has ended but is still listed by its parent has ended, too.
    """
    found = read_stat(pid)
    return None if found is None or found[0] in "ZX" else int(found[19])


def is_alive(pid: int, began: int | None) -> bool | None:
    """Whether a process of this namespace lives; None if that cannot be known."""
    start = read_start(pid)
    if start is not None and began is not None:
        return start == began
    if pid <= 0:
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return None
    # Of another user, whose process is hidden; or another process has its number now.
    return False if start is None and Path(f"/proc/{pid}/stat").exists() else None


@dataclass(frozen=True, kw_only=True)
class Holder:
    """Who holds a lock, as well as it can be known."""

    state: State  #: whether it lives
    process: ProcessId | None = None  #: the process; None if it has left no lease
    #: when it took the lock, and when it was last heard of; seconds since 1970
    since: float = 0.0
    beat: float = 0.0
    text: str = ""  #: what it wrote into the lock

    def __str__(self) -> str:
        """``process 12 on node7``, and when it was last heard of if it may have ended."""
        if self.process is None:
            name = f"process {self.text}" if self.text else "a process without a name"
        else:
            name = f"process {self.process.pid} on {self.process.host}"
        if self.state != "unknown":
            return name
        since = f"since {_format_time(self.since)}, " if self.since else ""
        return f"{name} ({since}last heard of at {_format_time(self.beat)})"


def _format_time(seconds: float) -> str:
    known = min(max(seconds, 0), _LATEST)  # somebody else's file may have any
    return datetime.fromtimestamp(known, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


FileId = tuple[int, int] | bytes
"""Device and inode of a file; its text where inodes change."""


@dataclass(frozen=True, kw_only=True)
class _Claim:
    """What a lease says besides its process."""

    since: float
    has_lock: bool
    file: int  #: inode of the lease; a copy of the folder has it too, in another file


@dataclass(frozen=True, kw_only=True)
class _Content:
    """What is in the file of a lease, and of the file itself."""

    beat: float
    file: FileId
    process: ProcessId | None = None  # None: it cannot be read
    since: float = 0.0
    has_lock: bool = False
    is_copy: bool = False  #: it came with a copied folder


class Lease:
    """The lease of this process on a lock.

    Raises
    ------
    FileExistsError
        If there is one.
    """

    def __init__(self, path: Path, *, has_lock: bool) -> None:
        self._path, self.has_lock = path, has_lock
        self._since, self._pid = time.time(), os.getpid()
        self._create()

    def _create(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        fd = os.open(self._path, flags, 0o666)
        try:
            found = os.fstat(fd)
            claim = _Claim(since=self._since, has_lock=self.has_lock, file=found.st_ino)
            written = json.dumps(asdict(ProcessId.here()) | asdict(claim)).encode()
            os.write(fd, written)
            self._file = _identify(self._path, found, written)
        except OSError:
            self._path.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self._due = time.monotonic() + BEAT_S

    def beat(self) -> bool:
        """Renew the lease if it is time; False if another process has taken it over."""
        if time.monotonic() < self._due:
            return True
        self._due = time.monotonic() + BEAT_S
        try:
            if _find_id(self._path) != self._file:
                return False
            os.utime(self._path)
        except FileNotFoundError:  # somebody took this process for ended
            with contextlib.suppress(OSError):
                self._create()
        except OSError:  # the next time may be better
            pass
        return True

    def release(self) -> None:
        """Remove the lease; nothing happens in a forked child, or if it is another's."""
        with contextlib.suppress(OSError):
            if self._pid == os.getpid() and _find_id(self._path) == self._file:
                self._path.unlink()


def _identify(path: Path, found: os.stat_result, text: bytes | None = None) -> FileId:
    if get_filesystem(path.parent).keeps_inodes:
        return found.st_dev, found.st_ino
    return path.read_bytes() if text is None else text


def _find_id(path: Path) -> FileId:
    return _identify(path, path.lstat())


def _read(path: Path) -> _Content | None:
    """Read a lease; None if there is none."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        fd = os.open(path, flags | getattr(os, "O_NOFOLLOW", 0))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:  # of another user, or a link
        with contextlib.suppress(OSError):
            found = path.lstat()
            return _Content(beat=0, file=(found.st_dev, found.st_ino))
        return None
    try:
        found = os.fstat(fd)
        text = os.read(fd, _MAX_BYTES)
    except OSError:
        text = b""
    finally:
        os.close(fd)
    # Not above: the process that captures the environment of a run has no such package.
    import msgspec  # noqa: PLC0415

    content = _Content(beat=found.st_mtime, file=_identify(path, found, text))
    # It may be torn, or by somebody else: a wrong one tells no more than an empty one.
    with contextlib.suppress(msgspec.MsgspecError, RecursionError, UnicodeError):
        claim = msgspec.json.decode(text, type=_Claim)
        if claim.file != found.st_ino and get_filesystem(path.parent).keeps_inodes:
            return replace(content, is_copy=True)
        process = msgspec.json.decode(text, type=ProcessId)
        if 0 <= process.pid < 1 << 31 and 0 <= claim.since < _LATEST:
            return replace(
                content, process=process, since=claim.since, has_lock=claim.has_lock
            )
    return content


def judge(path: Path, lock: LockState, *, when_stale: bool = False) -> Holder | None:
    """Judge whether the holder of a lease lives; None if there is no lease.

    That of a copied folder is that of an ended process, and tells nothing of a held lock.

    Parameters
    ----------
    lock
        What the lock beside it tells.
    when_stale
        Judge as if the lease had not been renewed for long.
    """
    lease = _read(path)
    if lease is None or (lease.is_copy and lock == "held"):
        return None
    state = _judge(path, lease, lock, when_stale=when_stale)
    return Holder(
        state=state, process=lease.process, since=lease.since, beat=lease.beat
    )


def _judge(path: Path, lease: _Content, lock: LockState, *, when_stale: bool) -> State:
    if lock == "held":
        return "live"
    if lease.is_copy:
        return "ended"
    is_stale = when_stale or abs(time.time() - lease.beat) > STALE_S
    process, here = lease.process, ProcessId.here()
    # A power cut may leave an empty file.
    is_locked_no_more = lock == "free" and (lease.has_lock or process is None)
    if process is not None and process.has_same_kernel(here):
        if is_locked_no_more:
            return "ended"
        if process.namespace == here.namespace:
            lives = is_alive(process.pid, process.began)
            if lives is not None:
                return "live" if lives else "ended"
    if not is_stale:
        return "live"
    if process and (process.was_rebooted(here) or process.was_restarted(here)):
        return "ended"
    if is_locked_no_more and get_filesystem(path.parent).shares_locks:
        return "ended"
    return "unknown"


def remove(path: Path, lock: LockState | None = None) -> None:
    """Remove a lease, unless it is another one by now.

    Parameters
    ----------
    lock
        What the lock beside it tells: then only that of an ended process is removed. Two
        processes may find it at the same time, and one has written its own since.
    """
    lease = _read(path)
    aside = path.with_name(f"{path.name}.{os.getpid()}.removed")
    with contextlib.suppress(OSError):
        if lock is not None and not _has_ended(path, lock):
            return
        path.rename(aside)
        try:
            is_other = lease is not None and _find_id(aside) != lease.file
            if is_other or (lock is not None and not _has_ended(aside, lock)):
                os.link(aside, path)  # taken anew meanwhile
        finally:
            aside.unlink()


def _has_ended(path: Path, lock: LockState) -> bool:
    holder = judge(path, lock)
    return holder is not None and holder.state == "ended"
