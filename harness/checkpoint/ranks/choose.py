"""Choose the checkpoint to resume from: all ranks together, each file read by one of them.

Rank 0 looks at names, manifests and sizes. Each rank hashes its own part. If one finds
damage, all go to the checkpoint before. So a rank reads its share, however many there are.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness.accelerators.single import SingleDevice
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
    ranks = ranks or SingleDevice("cpu")
    offers = _iter_offers(path) if ranks.is_main else None
    while True:
        offer = ranks.broadcast(None if offers is None else next(offers, None))
        if offer is None:
            return None
        place = path / offer["name"]
        if "error" in offer:
            errors = [offer["error"]]
        else:
            manifest = parse_manifest(place, offer["manifest"])
            errors = _list_errors(place, manifest, ranks)
        if not errors:
            return place, manifest
        if place == path:
            raise CheckpointError(errors[0])
        if offers is not None:
            for error in errors:
                warnings.warn(f"skipped a damaged checkpoint: {error}", stacklevel=2)


def _iter_offers(path: Path) -> Iterator[dict[str, str]]:
    """Yield name and manifest of each checkpoint at a path, newest first; or its error.

    The name is empty if the path is a checkpoint itself.
    """
    is_one = (path / MANIFEST).is_file()
    for place in [path] if is_one else list_checkpoints(path):
        offer = {"name": "" if is_one else place.name}
        try:
            text = read_text(place, MANIFEST)
            check_sizes(place, parse_manifest(place, text))
        except CheckpointError as error:
            yield offer | {"error": str(error)}
        else:
            yield offer | {"manifest": text}


def _list_errors(path: Path, manifest: Manifest, ranks: Accelerator) -> list[str]:
    """What ranks found damaged, each in its share of the files."""
    error = None
    try:
        verify_files(path, manifest, ranks.rank, ranks.world_size)
    except CheckpointError as found:
        error = str(found)
    errors = ranks.gather_objects(error) if ranks.any(error is not None) else []
    return [text for text in errors if text is not None]
