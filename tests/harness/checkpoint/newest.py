"""The newest checkpoint of a folder, as tests look for it."""

from __future__ import annotations

from pathlib import Path

from harness.checkpoint.format import list_checkpoints, verify_checkpoint
from harness.errors import CheckpointError


def find_newest(folder: Path) -> tuple[Path | None, list[CheckpointError]]:
    """Its path if one is undamaged, and the errors of newer, damaged ones."""
    errors: list[CheckpointError] = []
    for path in list_checkpoints(folder):
        try:
            verify_checkpoint(path)
        except CheckpointError as error:
            errors.append(error)
        else:
            return path, errors
    return None, errors
