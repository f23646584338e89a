"""Choose the checkpoint to resume from: all ranks together, each file read by one of them.

Rank 0 looks at names, manifests and sizes. Each rank hashes its own part. If one finds
damage, all go to the checkpoint before. So a rank reads its share, however many there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from harness.checkpoint.format import (
    MANIFEST,
    Manifest,
    check_sizes,
    list_checkpoints,
    parse_manifest,
    read_text,
    verify_files,
)
from harness.errors import CheckpointError

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


def choose_checkpoint(
    path: Path, ranks: Accelerator | None = None
) -> tuple[Path, Manifest] | None:
    """Choose the newest checkpoint in which no rank finds damage, and warn of newer ones.

    Every rank must call it.

    Parameters
    ----------
    path
        A checkpoint, or a folder of checkpoints.
    ranks
        The ranks that share the work; None: this process reads everything.

    Raises
    ------
    CheckpointError
        If `path` is a checkpoint, and damaged.
    """
    search = _Search(path) if ranks is None or ranks.is_main else None
    while True:
        offer = None if search is None else search.find_next()
        if ranks is not None:
            offer = ranks.broadcast(offer)
        if offer is None:
            return None
        if search is not None:
            search.warn()
        errors = [offer["error"]] if "error" in offer else []
        if not errors:
            place = path / offer["name"]
            manifest = parse_manifest(place, offer["manifest"])
            errors = _list_errors(place, manifest, ranks)
            if not errors:
                return place, manifest
        if not offer["name"]:
            raise CheckpointError(errors[0])
        if search is not None:
            search.skipped += errors


def _list_errors(
    path: Path, manifest: Manifest, ranks: Accelerator | None
) -> list[str]:
    """What ranks found damaged, each in its share of the files."""
    error = None
    rank, world_size = (0, 1) if ranks is None else (ranks.rank, ranks.world_size)
    try:
        verify_files(path, manifest, rank, world_size)
    except CheckpointError as found:
        error = str(found)
    if ranks is None:
        return [] if error is None else [error]
    if not ranks.any(error is not None):
        return []
    return [text for text in ranks.gather_objects(error) if text is not None]


@dataclass
class _Search:
    """The checkpoints at a path, newest first; on rank 0."""

    path: Path
    skipped: list[str] = field(default_factory=list)
    _left: Iterator[Path] | None = None

    def find_next(self) -> dict[str, str] | None:
        """Name and manifest of the next one whose sizes are right, or its error."""
        is_one = (self.path / MANIFEST).is_file()
        if self._left is None:
            self._left = iter([self.path] if is_one else list_checkpoints(self.path))
        for place in self._left:
            name = "" if is_one else place.name
            try:
                text = read_text(place, MANIFEST)
                check_sizes(place, parse_manifest(place, text))
            except CheckpointError as error:
                if is_one:
                    return {"name": name, "error": str(error)}
                self.skipped.append(str(error))
            else:
                return {"name": name, "manifest": text}
        self.warn()
        return None

    def warn(self) -> None:
        """Warn of the checkpoints that were skipped."""
        for text in self.skipped:
            warnings.warn(f"skipped a damaged checkpoint: {text}", stacklevel=2)
        self.skipped = []
