"""What a list shows of many runs, kept so that only runs that have changed are read again.

``.runs-index`` in the folder of runs is a cache. An entry counts only while every file that
it was made from has the same inode, size and times. So an index that is missing, torn, old,
copied from elsewhere or not writable costs time and nothing else.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TypedDict, cast

import msgspec

import tracking
from tracking.durable import replace_file
from tracking.store import MANIFEST, find_writers, list_rank_dirs

INDEX: Final = ".runs-index"
FORMAT: Final = 1
MAX_BYTES: Final = 128 << 20
"""Entries beyond it, of the oldest runs, are not kept."""

SETTLED_S: Final = 2.0
"""The times of files may be that coarse: two changes within it could look like one."""

_FILES: Final = (MANIFEST, "delivery/state.json", "records")


class _Metric(TypedDict):
    last: float
    min: float
    max: float
    count: int


class _Summary(TypedDict):
    """What ``summarize_run`` returns, without what the run's path tells."""

    name: str
    status: str
    experiment: str | None
    created: str
    duration_s: float | None
    behind: int | None
    params: dict[str, Any]
    tags: dict[str, Any]
    metrics: dict[str, _Metric]


class _Entry(msgspec.Struct, array_like=True):
    """A summary, and the files and folders that it was made from, with their state."""

    files: list[str]
    digest: bytes
    summary: _Summary


_ENTRY: Final = msgspec.msgpack.Decoder(_Entry)
_ENTRIES: Final = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_SPOILT: Final = (msgspec.MsgspecError, RecursionError, ValueError)
"""What msgspec raises for bytes that are no entries."""


def read_summary(path: Path) -> dict[str, Any]:
    """Summarize a run from its records; see ``summarize_run``."""
    from tracking.cli.describe import summarize_run  # noqa: PLC0415  an index does without
    from tracking.read import PastRun  # noqa: PLC0415  next to it

    return summarize_run(PastRun(path))


class RunIndex:
    """Summaries of the runs of a folder.

    Parameters
    ----------
    settled_s : seconds
        A run that has changed within this time is not kept.

    Attributes
    ----------
    num_read
        Runs whose records were read.
    """

    def __init__(
        self, runs: Path, paths: list[Path], settled_s: float = SETTLED_S
    ) -> None:
        self.num_read = 0
        self._path = runs / INDEX
        self._names = [path.name for path in paths]
        self._entries = _read_entries(self._path)
        self._new: dict[str, msgspec.Raw] = {}
        self._settled_ns = _read_clock_ns(runs) - int(settled_s * 1e9)

    def summarize(self, path: Path) -> dict[str, Any]:
        """Summarize a run of the folder, as ``summarize_run`` does."""
        summary = self._find(path) or self._read(path)
        return {"id": path.name, **summary, "path": str(path)}

    def save(self) -> None:
        """Write the index with what was read, if there is anything new to write."""
        if not self._new and self._entries.keys() <= set(self._names):
            return
        kept: dict[str, msgspec.Raw] = {}
        num_bytes = 0
        for name in self._names:
            entry = self._new.get(name) or self._entries.get(name)
            if entry is None:
                continue
            num_bytes += len(bytes(entry))
            if num_bytes > MAX_BYTES:
                break
            kept[name] = entry
        data = msgspec.msgpack.encode(kept)
        with contextlib.suppress(OSError), replace_file(self._path) as temporary:
            temporary.write_bytes(_make_head(data) + data)
        # What lists left that were killed here; another one may be writing its own now.
        with contextlib.suppress(OSError):
            for unfinished in self._path.parent.glob(f".*-{INDEX}"):
                if unfinished.stat().st_mtime_ns < self._settled_ns:
                    unfinished.unlink()

    def _find(self, path: Path) -> _Summary | None:
        """Find the summary of a run that has not changed since."""
        try:
            entry = _ENTRY.decode(self._entries[path.name])
            if _get_state(path, entry.files)[0] != entry.digest:
                return None
            datetime.fromisoformat(entry.summary["created"] or "2000-01-01")
        except (KeyError, OSError, *_SPOILT):
            return None
        # A run without an end was killed, which another machine may not know for certain.
        if entry.summary["duration_s"] is None and find_writers(path):
            return None
        return entry.summary

    def _read(self, path: Path) -> dict[str, Any]:
        """Read the summary of a run, and keep it if the run cannot change unnoticed."""
        self.num_read += 1
        files = _list_files(path)
        digest, latest_ns = _get_state(path, files)
        # In this order: a writer that is killed later than this may have written more.
        has_writer = bool(find_writers(path))
        summary = read_summary(path)
        del summary["id"], summary["path"]
        is_kept = not has_writer and latest_ns < self._settled_ns
        if is_kept and _get_state(path, _list_files(path))[0] == digest:
            # What MessagePack does not have, such as an integer of 80 bits, is read again.
            with contextlib.suppress(*_SPOILT, TypeError, OverflowError):
                entry = _Entry(files, digest, cast("_Summary", summary))
                self._new[path.name] = msgspec.Raw(msgspec.msgpack.encode(entry))
        return summary


def _read_entries(path: Path) -> dict[str, msgspec.Raw]:
    """Read an index; it is empty if it is none of this version, or was changed."""
    with contextlib.suppress(OSError, *_SPOILT):
        found = path.stat()
        if stat.S_ISREG(found.st_mode) and found.st_size <= 2 * MAX_BYTES:
            head, line, data = path.read_bytes().partition(b"\n")
            if head + line == _make_head(data):
                return _ENTRIES.decode(data)
    return {}


def _make_head(data: bytes) -> bytes:
    """First line of an index: its version, and the check of the rest."""
    version = f"{tracking.__version__}, format {FORMAT}"
    return f"luz-harness {version}, {zlib.crc32(data):08x}\n".encode()


def _read_clock_ns(folder: Path) -> int:
    """Time of the folder's disk, which may be another machine's; 0 if it cannot be written."""
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime_ns
    return 0


def _list_files(path: Path) -> list[str]:
    """What a summary of a run depends on, relative to the run's folder."""
    found = [*_FILES]
    for rank_dir in list_rank_dirs(path).values():
        place = f"records/{rank_dir.name}"
        found += [place, *sorted(f"{place}/{one.name}" for one in rank_dir.iterdir())]
    return found


def _get_state(path: Path, files: list[str]) -> tuple[bytes, int]:
    """Get a digest of the state of files, which may be missing, and their latest time in ns.

    The state of a folder tells that files in it were added, removed or renamed.
    """
    folder = str(path)
    states: list[tuple[int, ...] | None] = []
    latest_ns = 0
    for name in files:
        try:
            found = os.stat(f"{folder}/{name}")  # noqa: PTH116  half the time of a Path
        except (FileNotFoundError, NotADirectoryError):
            states.append(None)
            continue
        times = found.st_mtime_ns, found.st_ctime_ns
        states.append((found.st_ino, found.st_size, *times))
        latest_ns = max(latest_ns, *times)
    digest = hashlib.blake2b(repr(states).encode(), digest_size=16).digest()
    return digest, latest_ns
