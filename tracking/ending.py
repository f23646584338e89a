"""How a run ended: what rank 0 wrote, what other ranks left behind, what can be seen."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Final

from tracking.journal.reader import is_being_written
from tracking.store import Manifest, get_rank_dir, list_rank_dirs, write_atomically

FAILURE: Final = "failure.json"
"""Beside the journal of a rank that failed, other than rank 0: ``type, message, time``."""


def describe_error(error: BaseException) -> dict[str, str]:
    """What a manifest keeps of an exception."""
    return {"type": type(error).__name__, "message": str(error)[:10_000]}


def write_failure(rank_dir: Path, error: BaseException, time: str) -> None:
    """Tell why a rank failed; rank 0 may be ended before it can say anything."""
    text = json.dumps(describe_error(error) | {"time": time})
    with suppress(OSError):  # a full disk must not hide the error itself
        write_atomically(rank_dir / FAILURE, text.encode(errors="replace"))


def remove_failures(run_path: Path) -> None:
    """Begin anew, as a run that is gone on with does."""
    for rank_dir in list_rank_dirs(run_path).values():
        (rank_dir / FAILURE).unlink(missing_ok=True)


def get_status(run_path: Path, manifest: Manifest) -> str:
    """Status of a run; one that says ``running`` and that nobody writes was killed.

    It failed if another rank did, which had rank 0 ended.
    """
    if manifest.status == "running" and not is_being_written(get_rank_dir(run_path, 0)):
        # It may have finished between the two looks.
        written = Manifest.read(run_path).status
        if written != "running":
            return written
        return "failed" if _failures(run_path) else "killed"
    return manifest.status


def get_first_error(run_path: Path, manifest: Manifest) -> dict[str, str] | None:
    """What failed first, on whichever rank: ``type`` and ``message``."""
    found = _failures(run_path)
    if manifest.error is not None:
        found.append(manifest.error | {"time": manifest.ended or ""})
    if not found:
        return None
    first = min(found, key=lambda failure: failure["time"])
    return {what: first[what] for what in ("type", "message")}


def _failures(run_path: Path) -> list[dict[str, str]]:
    """What other ranks left; each message names its rank."""
    found = []
    for rank, rank_dir in list_rank_dirs(run_path).items():
        try:
            failure = json.loads((rank_dir / FAILURE).read_bytes())
            failure["message"] = f"{failure['message']} (rank {rank})"
            found.append({what: failure[what] for what in ("type", "message", "time")})
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found
