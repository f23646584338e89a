"""Who writes a run, or how it ended: its status, and the exception that ended it on any rank."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracking import durable
from tracking.errors import InvalidFileError
from tracking.redaction import redact
from tracking.settings import read_secrets
from tracking.store.folders import get_rank_dir, list_rank_dirs
from tracking.store.json_file import read_json
from tracking.store.manifest import Manifest

FAILURE: Final = "failure.json"
"""Written beside the journal of a rank other than 0 that failed."""


@dataclass
class Failure:
    """Exception that ended one rank, stored in its ``failure.json``.

    Attributes
    ----------
    time
        UTC, ISO 8601.
    """

    type: str
    message: str
    time: str


def describe_error(error: BaseException) -> dict[str, str]:
    """Return type and message of an exception, as a manifest stores them: redacted."""
    try:
        text = str(error)
    except Exception:  # noqa: BLE001  of a text of its own that fails
        text = object.__repr__(error)
    message = redact(text, read_secrets())[:10_000]
    return {"type": type(error).__name__, "message": message}


def write_failure(rank_dir: Path, error: BaseException, time: str) -> None:
    """Record why a rank failed; rank 0 may be killed before it can do so itself."""
    text = json.dumps(describe_error(error) | {"time": time})
    with contextlib.suppress(OSError):  # a full disk must not hide the error itself
        rank_dir.mkdir(parents=True, exist_ok=True)
        durable.write_atomically(rank_dir / FAILURE, text.encode(errors="replace"))


def remove_failures(run_path: Path) -> None:
    """Remove the failures of all ranks, as a resumed run does first."""
    for rank_dir in list_rank_dirs(run_path).values():
        (rank_dir / FAILURE).unlink(missing_ok=True)


def get_status(run_path: Path, manifest: Manifest) -> str:
    """Return the status of a run.

    A run that says ``running`` although no process writes it has ``failed`` if a rank
    left a failure, since that may have ended rank 0 too; otherwise it was ``killed``. It is
    ``unknown`` if its process was not heard of for long, and may live on another machine.
    """
    if manifest.status == "running":
        writer = find_writer(get_rank_dir(run_path, 0))
        if writer is not None:
            return "running" if writer.state == "live" else "unknown"
        # It may have finished since the caller read the manifest.
        written = Manifest.read(run_path).status
        if written != "running":
            return written
        return "failed" if _read_failures(run_path) else "killed"
    return manifest.status


def get_first_error(run_path: Path, manifest: Manifest) -> dict[str, str] | None:
    """Return ``type`` and ``message`` of the earliest failure on any rank, if any."""
    found = _read_failures(run_path)
    if manifest.error is not None:
        kind, message = (manifest.error.get(key, "") for key in ("type", "message"))
        found.append(Failure(kind, message, manifest.ended or ""))
    if not found:
        return None
    first = min(found, key=lambda failure: failure.time)
    return {"type": first.type, "message": first.message}


def _read_failures(run_path: Path) -> list[Failure]:
    """Read the failures of ranks other than 0; each message names its rank."""
    found = []
    for rank, rank_dir in list_rank_dirs(run_path).items():
        with contextlib.suppress(OSError, InvalidFileError):
            failure = read_json(rank_dir / FAILURE, Failure, advice="Remove the file.")
            failure.message += f" (rank {rank})"
            found.append(failure)
    return found


# ---------------------------------------------------------- who writes a run


def get_lock_path(rank_dir: Path) -> Path:
    """Return the lock file that the writer of a rank's records holds."""
    return rank_dir / "lock"


def find_writer(rank_dir: Path) -> durable.Holder | None:
    """Find the process that writes a rank's records, or may write them; None without one."""
    return durable.find_holder(get_lock_path(rank_dir))


def is_being_written(rank_dir: Path) -> bool:
    """Whether a process writes a rank's records, or may write them."""
    return find_writer(rank_dir) is not None


def has_live_writer(rank_dir: Path) -> bool:
    """Whether a process writes a rank's records for sure."""
    writer = find_writer(rank_dir)
    return writer is not None and writer.state == "live"


def find_writers(run_path: Path) -> dict[int, durable.Holder]:
    """Find the processes that write the records of a run, or may write them, by rank."""
    found = {rank: find_writer(dir_) for rank, dir_ in list_rank_dirs(run_path).items()}
    return {rank: holder for rank, holder in found.items() if holder is not None}


def describe_unknown(holder: durable.Holder, run_id: str) -> str:
    """Say who may still write a run, and what to do; the end of a message."""
    return (
        f"got one that may still be written by {holder}, which cannot be known from here. "
        f"Make sure that the process has ended, then run 'harness runs release {run_id}'."
    )


def release_run(run_path: Path) -> list[int]:
    """Take the writers of which it is not known whether they live for ended; their ranks."""
    found = [r for r, one in find_writers(run_path).items() if one.state == "unknown"]
    for rank in found:
        durable.release_lock(get_lock_path(get_rank_dir(run_path, rank)))
    return found
