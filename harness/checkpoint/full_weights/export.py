"""Write the weights of a checkpoint into safetensors files, one parameter after another."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from harness.checkpoint.format import MANIFEST, list_checkpoints, write_each_tensor
from harness.checkpoint.full_weights.final import FINAL
from harness.checkpoint.ranks.merge import MergedWeights
from harness.errors import CheckpointError
from tracking.durable import replace_file, replace_folder
from tracking.errors import describe_path

INDEX = "model.safetensors.index.json"
"""File that says which shard has which tensor, as Hugging Face names it."""

SHARD_BYTES = 5_000_000_000
"""Size of a shard by default; a larger tensor has one of its own."""


def export_weights(source: Path, to: Path, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write whole weights, with at most one parameter in memory.

    Parameters
    ----------
    source
        A checkpoint, a folder of checkpoints, of which the newest is taken, or the folder
        of a run.
    to
        A file that ends with ``.safetensors``; or a new folder, for several files with an
        index, as Hugging Face's libraries read them.
    shard_bytes : >= 1
        Size of a file in a folder.

    Raises
    ------
    CheckpointError
        If there is no checkpoint, or it is damaged.
    ValueError
        If `to` is a file of another kind, or a folder with something in it.
    """
    place = f"export_weights({str(to)!r})"
    if to.suffix and to.suffix != ".safetensors" and not to.is_dir():
        msg = f"{place}: expected a folder or a .safetensors file, got {to.suffix!r}."
        raise ValueError(f"{msg} torch.save needs the whole model in memory.")
    if to.is_dir() and (to.suffix == ".safetensors" or any(to.iterdir())):
        msg = f"{place}: expected a new file, or a new or empty folder, got a folder."
        raise ValueError(f"{msg} Choose another path.")
    merged = MergedWeights(find_weights(source))
    names = [name for name in merged if name not in merged.left_out]
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".safetensors":
        with replace_file(to) as temporary:
            _write(temporary, merged, names)
        return merged.path
    shards = list(_split(merged, names, shard_bytes))
    with replace_folder(to) as temporary:
        weight_map: dict[str, str] = {}
        for number, shard in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            _write(temporary / file, merged, shard)
            weight_map |= dict.fromkeys(shard, file)
        total = sum(merged.specs[name].nbytes for name in names)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True)
        (temporary / INDEX).write_text(text, encoding="utf-8")
    return merged.path


def find_weights(source: Path) -> Path:
    """Find the checkpoint at a path: itself, the newest of a folder, or a run's."""
    if (source / MANIFEST).is_file():
        return source
    for folder in (source / "checkpoints", source):
        found = [*list_checkpoints(folder / FINAL)[:1], *list_checkpoints(folder)[:1]]
        if found:
            # By the step, which ends the name; of equal ones the first, the final one.
            return max(found, key=lambda path: int(path.name.rpartition("-")[2]))
    msg = f"export_weights({str(source)!r}): expected a checkpoint"
    got = describe_path(source)
    raise CheckpointError(
        f"{msg}, got {got}. Pass a checkpoint, a folder of them, or a run."
    )


def _split(
    merged: MergedWeights, names: list[str], shard_bytes: int
) -> Iterator[list[str]]:
    """Yield the names of each file."""
    shard: list[str] = []
    total = 0
    for name in names:
        size = merged.specs[name].nbytes
        if shard and total + size > shard_bytes:
            yield shard
            shard, total = [], 0
        shard.append(name)
        total += size
    yield shard


def _write(path: Path, merged: MergedWeights, names: list[str]) -> None:
    specs = {name: merged.specs[name] for name in names}
    write_each_tensor(path, specs, merged.__getitem__)
