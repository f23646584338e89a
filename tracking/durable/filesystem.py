"""What a file system can do: its name, whether it keeps maps, and who sees its locks."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

with contextlib.suppress(ImportError):  # Windows, where harness must still import
    import fcntl

_LOCAL: Final = frozenset(
    str.split(
        "apfs bcachefs btrfs exfat ext2 ext3 ext4 f2fs hfs jfs overlay ramfs reiserfs tmpfs "
        "vfat xfs zfs"
    )
)
"""File systems of one machine: whoever writes there asks the same kernel for locks."""

_STABLE: Final = frozenset(str.split("beegfs ceph gfs2 gpfs lustre nfs nfs4"))
"""File systems of several machines whose files have the same inode on each. Those of FUSE
(sshfs, for example) may make inodes up, anew where a file was not used for a while."""

_MAPPED: Final = frozenset(
    str.split("apfs ext2 ext3 ext4 f2fs hfs jfs overlay ramfs reiserfs tmpfs xfs")
)
"""Where a file that has its bytes can be written through a map: the page is the kernel's
at once, and needs no new space. File systems that copy on write (btrfs, zfs) may need some,
and a full disk would end the process by SIGBUS. Others tell different machines of a map
late, or not at all (nfs, fuse), or are not known."""


@dataclass(frozen=True)
class Filesystem:
    """A mounted file system; both fields are empty if the system does not tell."""

    name: str = ""  #: its type, such as ``ext4``, ``nfs4`` or ``lustre``
    #: options that it is mounted with, such as ``flock``
    options: frozenset[str] = frozenset()

    @property
    def is_local(self) -> bool:
        """Whether it belongs to this machine alone."""
        return self.name in _LOCAL

    @property
    def keeps_maps(self) -> bool:
        """Whether a file there is known to be safe to write through a map."""
        return self.name in _MAPPED

    @property
    def shares_locks(self) -> bool:
        """Whether all that write there are known to see the same locks."""
        if self.name in ("nfs", "nfs4"):
            local = {one for one in self.options if one.startswith("local_lock=")}
            return local == {"local_lock=none"} or (self.name == "nfs4" and not local)
        if self.name == "lustre":
            return "flock" in self.options
        if self.name in ("cifs", "smb3"):
            return "nobrl" not in self.options
        return self.is_local or self.name in ("ceph", "gfs2", "gpfs")

    @property
    def keeps_inodes(self) -> bool:
        """Whether a file is known to have the same inode always, and on all machines."""
        if self.name in ("cifs", "smb3"):
            return "serverino" in self.options
        return self.is_local or self.name in _STABLE


_found: Final[dict[int, Filesystem]] = {}
"""File systems by the number of their device, which the kernel tells in a microsecond."""


def get_filesystem(folder: Path) -> Filesystem:
    """Find the file system that a folder is on."""
    try:
        device = folder.stat().st_dev
    except OSError:
        return _find_filesystem(folder)
    if device not in _found:
        _found[device] = _find_filesystem(folder)
    return _found[device]


def _find_filesystem(folder: Path) -> Filesystem:
    try:
        mounts = Path("/proc/self/mountinfo").read_text()
    except OSError:
        return Filesystem(_ask_mac(folder))
    return find_mount(mounts, folder.resolve())


def find_mount(mounts: str, folder: Path) -> Filesystem:
    """Find the file system of a folder in the text of ``/proc/self/mountinfo``."""
    depth, found = -1, Filesystem()
    for line in mounts.splitlines():  # a later mount hides an earlier one
        mount, _, source = line.partition(" - ")
        fields, kind = mount.split(), source.split()
        point = Path(fields[4].replace("\\040", " "))
        if len(point.parts) >= depth and folder.is_relative_to(point):
            options = [*fields[5].split(","), *kind[-1].split(",")]
            name = kind[0].partition(".")[0]
            depth, found = len(point.parts), Filesystem(name, frozenset(options))
    return found


def _ask_mac(folder: Path) -> str:
    """Type of a file system of macOS, from ``statfs``; empty elsewhere."""
    if sys.platform != "darwin":
        return ""
    with contextlib.suppress(OSError, AttributeError, ValueError):
        library = ctypes.CDLL(None)
        ask = getattr(library, "statfs$INODE64", None) or library.statfs
        answer = ctypes.create_string_buffer(4096)
        if ask(os.fsencode(folder), answer) == 0:
            # ``f_fstypename[16]`` of <sys/mount.h>, behind 72 bytes of numbers.
            return answer.raw[72:88].split(b"\0")[0].decode("ascii")
    return ""


# ------------------------------------------------------------------ trying it out


@dataclass(frozen=True)
class FolderReport:
    """What works in a folder, by trying."""

    filesystem: Filesystem  #: the file system that it is on
    #: what does not work: ``write``, ``rename``, ``lock``, ``map`` or ``exclude`` (to
    #: make a file that must be new), and the error
    problems: dict[str, str]


def try_folder(folder: Path) -> FolderReport:
    """Try in a folder that exists what runs need of it; nothing is left behind."""
    filesystem = get_filesystem(folder)
    try:
        place = tempfile.TemporaryDirectory(prefix=".try-", dir=folder)
    except OSError as error:
        return FolderReport(filesystem, {"write": str(error)})
    problems = {}
    with place as name:
        for word, attempt in _ATTEMPTS.items():
            try:
                attempt(Path(name))
            except (OSError, ValueError, AssertionError) as error:
                problems[word] = str(error) or "another result than expected"
    return FolderReport(filesystem, problems)


def _try_write(folder: Path) -> None:
    with (folder / "first").open("wb") as file:
        file.write(b"first")
        file.flush()
        os.fsync(file.fileno())


def _try_rename(folder: Path) -> None:
    (folder / "second").write_bytes(b"second")
    (folder / "second").replace(folder / "first")
    _expect((folder / "first").read_bytes() == b"second")


def _try_exclude(folder: Path) -> None:
    os.close(os.open(folder / "own", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    try:
        os.close(os.open(folder / "own", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    except FileExistsError:
        return
    _expect(False)


def _try_lock(folder: Path) -> None:
    with (folder / "lock").open("a+") as one, (folder / "lock").open("a+") as other:
        fcntl.lockf(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        _expect(False)


def _try_map(folder: Path) -> None:
    with (folder / "map").open("w+b") as file:
        file.write(bytes(mmap.PAGESIZE))
        file.flush()
        with mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapped:
            mapped[7] = 77
        _expect(os.pread(file.fileno(), 1, 7) == b"M")


def _expect(is_right: bool) -> None:
    if not is_right:
        raise ValueError("another result than expected")


_ATTEMPTS: Final = {
    "write": _try_write,
    "rename": _try_rename,
    "exclude": _try_exclude,
    "lock": _try_lock,
    "map": _try_map,
}
