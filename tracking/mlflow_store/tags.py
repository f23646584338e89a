"""Tags and description of a run for MLflow's page, from the run's manifest."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from tracking.mlflow_store.client import MAX_TAG_LENGTH
from tracking.store import Manifest, get_rank_dir, is_being_written, results_path

NOTE: Final = "mlflow.note.content"
"""The description on a run's page, which can be changed there."""

NOTE_DIGEST: Final = "luz.note"
"""Tag with the digest of the description that was sent last."""

STATUSES: Final = {"finished": "FINISHED", "failed": "FAILED", "killed": "KILLED"}
"""MLflow's status of a run that has ended, by ours."""


def run_tags(
    manifest: Manifest,
    run_path: Path,
    redact: Callable[[str], str],
    per_key: int | None = None,
) -> dict[str, str]:
    """Tags that describe a run: those that MLflow's page shows, and ours (``luz.*``).

    Parameters
    ----------
    per_key
        Number of points that MLflow has of long series; None if no series is longer.
    """
    git = manifest.git or {}
    found = {
        "luz.run_id": manifest.id,
        "luz.path": str(run_path),
        "luz.command": shlex.join(manifest.command),
        "luz.host": manifest.host,
        "luz.python": manifest.python,
        "luz.platform": manifest.platform,
        "luz.devices": ", ".join(manifest.devices),
        "luz.dirty": str(git.get("dirty", "")).lower(),
        "luz.error": _error(manifest),
        # No mlflow.parentRunId: MLflow's page collapses nested runs under their parent.
        "luz.forked_from": manifest.extra.get("forked_from", {}).get("run", ""),
    }
    if not manifest.mlflow.get("borrowed"):
        found |= {
            "mlflow.user": manifest.user,
            "mlflow.source.name": find_source(manifest.command),
            "mlflow.source.type": "LOCAL",
            "mlflow.source.git.commit": git.get("commit") or "",
            "mlflow.source.git.branch": git.get("branch") or "",
            "mlflow.source.git.repoURL": git.get("remote") or "",
            NOTE: description(manifest, run_path, per_key),
        }
    tags = {k: redact(v)[:MAX_TAG_LENGTH] for k, v in found.items() if v}
    if NOTE in tags:
        tags[NOTE_DIGEST] = digest_note(tags[NOTE])
    return tags


def digest_note(text: str) -> str:
    """Digest of a description, to see whether it was changed."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def description(manifest: Manifest, run_path: Path, per_key: int | None = None) -> str:
    """Describe in Markdown how a run went, what ran on what code, and what to type next.

    MLflow's page shows the first lines, and the others on a click: the results come first.
    """
    parts = [manifest.note or ""]
    if manifest.error:
        parts.append(f"**Failed**: {_as_code(_error(manifest))}")
    if not is_being_written(get_rank_dir(run_path, 0)):
        with contextlib.suppress(OSError):
            parts.append(results_path(run_path).read_text(errors="replace").strip())
    if origin := manifest.extra.get("forked_from"):
        run = _as_code(str(origin.get("run")))
        parts.append(f"**Forked** from {run} at step {origin.get('step')}")
    ran = [
        f"**Ran** {_as_code(shlex.join(manifest.command))}",
        f"in {_as_code(manifest.cwd)} on {manifest.host}, Python {manifest.python}",
    ]
    for resume in manifest.resumed:
        where = f"on {resume.get('host')} at {str(resume.get('time'))[:19]}"
        ran.append(f"resumed {where}; the status was {resume.get('status')}")
    git = manifest.git
    if git and git.get("commit"):
        dirty = ", with changes (artifact `code.diff`)" if git.get("dirty") else ""
        branch = f" on {git['branch']}" if git.get("branch") else ""
        ran.append(f"**Code** `{git['commit'][:12]}`{branch}{dirty}")
    parts.append("  \n".join(ran))
    parts.append(f"**Records** {_as_code(str(run_path))}")
    if per_key is not None:
        parts.append(
            f"**Points** of each metric here: at most {per_key:,}, spread over its steps. "
            "The records have all."
        )
    commands = _list_commands(manifest, run_path)
    parts.append("\n".join(["**Next**", "", *(f"    {text}" for text in commands)]))
    return "\n\n".join(filter(None, parts))


def _list_commands(manifest: Manifest, run_path: Path) -> list[str]:
    """Commands that continue or look at a run."""
    found = [f"harness runs show {manifest.id}"]
    has_checkpoints = (run_path / "checkpoints").is_dir()
    if has_checkpoints and manifest.status != "finished":
        found.append(f"harness resume {manifest.id}")
    if has_checkpoints:
        found.append(f"harness runs fork {manifest.id} --at STEP")
    return [*found, f"harness export {manifest.id} --to records.parquet"]


def _as_code(text: str) -> str:
    """A text in Markdown that is shown as it is, in one line."""
    line = " ".join(text.split("\n"))
    longest = max(map(len, re.findall("`+", line)), default=0)
    marks = "`" * (longest + 1)
    return f"{marks} {line} {marks}" if longest else f"`{line}`"


def to_ms(moment: str | None) -> int | None:
    """Convert a time in ISO 8601 to milliseconds since 1970."""
    return round(datetime.fromisoformat(moment).timestamp() * 1000) if moment else None


def _error(manifest: Manifest) -> str:
    """Error of a failed run in one line."""
    error = manifest.error or {}
    text = ": ".join(filter(None, [error.get("type"), error.get("message")]))
    return " ".join(text.split())[:1000]


def find_source(command: list[str]) -> str:
    """Script or module that a command runs; the program itself for code in the command."""
    words = iter(command[1:])
    for word in words:
        if word in {"-X", "-W", "--check-hash-based-pycs"}:
            next(words, None)  # its value
        elif word == "-m":
            return next(words, "")
        elif word in {"-c", "-"}:
            break
        elif not word.startswith("-"):
            return word
    return command[0] if command else ""
