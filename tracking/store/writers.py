"""The processes that write a run, or may still write it."""

from __future__ import annotations

from pathlib import Path

from tracking import durable
from tracking.store.folders import get_rank_dir, list_rank_dirs


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
