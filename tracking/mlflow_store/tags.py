"""Tags and description of a run for MLflow's page, from the run's manifest."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Final

from tracking.mlflow_store.client import MAX_TAG_LENGTH
from tracking.store import Manifest

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
    manifest
        Of the run.
    run_path
        Folder of the run.
    redact
        Masks the secrets in a text.
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
    """Describe in Markdown what ran, where, on what code, and where the records are."""
    lines = [manifest.note, ""] if manifest.note else []
    if manifest.error:
        lines += [f"**Failed**: `{_error(manifest)}`", ""]
    origin = manifest.extra.get("forked_from")
    if origin:
        step = origin.get("step")
        lines += [f"**Forked** from `{origin.get('run')}` at step {step}", ""]
    lines += [
        f"**Ran** `{shlex.join(manifest.command)}`",
        f"in `{manifest.cwd}` on {manifest.host}, Python {manifest.python}",
    ]
    for resume in manifest.resumed:
        where = f"on {resume.get('host')} at {str(resume.get('time'))[:19]}"
        lines.append(f"- resumed {where}; the status was {resume.get('status')}")
    git = manifest.git
    if git and git.get("commit"):
        dirty = ", with changes (artifact `code.diff`)" if git.get("dirty") else ""
        branch = f" on {git['branch']}" if git.get("branch") else ""
        lines += ["", f"**Code** `{git['commit'][:12]}`{branch}{dirty}"]
    lines += [
        "",
        f"**Records** `{run_path}`: `harness runs show {manifest.id}`, "
        f"`harness export {manifest.id} --to records.parquet`",
    ]
    if per_key is not None:
        lines.append(
            f"**Points** of each metric here: at most {per_key:,}, spread over its steps. "
            "The records have all."
        )
    return "  \n".join(lines)


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
        if word in {
            "-X",
            "-W",
            "--check-hash-based-pycs",
        }:  # the next word is its value
            next(words, None)
        elif word == "-m":
            return next(words, "")
        elif word in {"-c", "-"}:
            break
        elif not word.startswith("-"):
            return word
    return command[0] if command else ""
