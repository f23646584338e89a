"""One checkpoint: a folder of tensors and JSON, written whole or not at all.

    000007-epoch-3-batch-40-step-120/
        manifest.json            format, position, and size and SHA-256 of every other file
        rank-0.json              state of the rank without its tensors
        rank-0.safetensors       its tensors

Files are written under a temporary name, flushed to the disk, and put in place by one
rename, so that a save killed at any write leaves earlier checkpoints the newest. Reading
executes nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import CheckpointError
from harness.pytree import DTYPES, restore
from tracking.durable import (
    move_folder,
    remove_folder,
    replace_file,
    write_synced,
)

FORMAT = 1
"""Version of the folder."""

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 1 << 28
"""Larger JSON files are refused unread."""

PEER_WAIT_S = 600.0
"""How long rank 0 waits for the files of the others."""

_NAME = re.compile(r"(\d{6,15})-epoch-\d+-batch-\d+-step-\d+")
_SCRAP = re.compile(rf"\.{_NAME.pattern}\.(tmp|removed)")
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


Phase = Literal["train", "valid", "epoch"]
"""Where in an epoch: after a training batch, before validation, after the epoch."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in a fit a checkpoint was taken.

    Attributes
    ----------
    epoch : >= 1
        The epoch.
    iter : >= 0
        Training batches done in it.
    step : >= 0
        Optimizer steps finished since the start.
    phase
        ``train``: after that batch. ``valid``: before validation. ``epoch``: after the
        epoch.
    """

    epoch: int
    iter: int
    step: int
    phase: Phase

    def __str__(self) -> str:
        return f"epoch {self.epoch}, batch {self.iter}, step {self.step}"


# ---------------------------------------------------------------------- writing


def begin(folder: Path, position: Position) -> Path:
    """An empty temporary folder for a checkpoint; on rank 0, before the others write.

    Its name begins with a number above those that are there, so that the one saved last
    is the newest, also after a fit went back to an earlier one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    serial = 1
    for item in folder.iterdir():
        if _NAME.fullmatch(item.name):
            serial = max(serial, _serial(item.name) + 1)
        elif _SCRAP.fullmatch(item.name):  # of a save or removal that was killed
            shutil.rmtree(item, ignore_errors=True)
    where = f"epoch-{position.epoch}-batch-{position.iter}-step-{position.step}"
    temporary = folder / f".{serial:06d}-{where}.tmp"
    temporary.mkdir()
    return temporary


def place_of(temporary: Path) -> Path:
    """Where ``commit`` puts the checkpoint of a temporary folder."""
    return temporary.with_name(temporary.name[1:].removesuffix(".tmp"))


def write_part(
    temporary: Path, rank: int, plan: Any, tensors: Mapping[str, Tensor]
) -> None:
    """Write one rank's part; tensors lie on the CPU, contiguous."""
    files = {
        f"rank-{rank}.safetensors": write_tensors(
            temporary / f"rank-{rank}.safetensors", tensors
        ),
        f"rank-{rank}.json": _write_json(temporary / f"rank-{rank}.json", plan),
    }
    # By this file rank 0 knows that the part is whole.
    done = temporary / f"rank-{rank}.done"
    with replace_file(done) as fresh:
        _write_json(fresh, files)


def give_up(temporary: Path, rank: int) -> None:
    """Tell rank 0 that a part does not come."""
    with contextlib.suppress(OSError):
        (temporary / f"rank-{rank}.failed").touch()


def commit(temporary: Path, world_size: int, about: Mapping[str, Any]) -> Path:
    """Put a checkpoint in place when every rank's part is there; on rank 0.

    Raises
    ------
    CheckpointError
        If a part does not come within ``PEER_WAIT_S``, or a file is not as it was written.
    """
    place = place_of(temporary)
    files: dict[str, Any] = {}
    until = time.monotonic() + PEER_WAIT_S
    for rank in range(world_size):
        done = temporary / f"rank-{rank}.done"
        while not done.exists():
            has_failed = (temporary / f"rank-{rank}.failed").exists()
            if has_failed or time.monotonic() > until:
                msg = f"save({str(place)!r}): expected a part of rank {rank}, got none."
                raise CheckpointError(
                    f"{msg} It could not write, has died, or the folder is not shared."
                )
            time.sleep(0.01)
        files |= json.loads(done.read_text(encoding="utf-8"))
        done.unlink()
    for name, facts in files.items():
        if (temporary / name).stat().st_size != facts["bytes"]:
            msg = f"save({str(place)!r}): expected {facts['bytes']} bytes in {name}."
            raise CheckpointError(f"{msg} Make space and check the file system.")
    manifest = {"format": FORMAT, "world_size": world_size, **about, "files": files}
    _write_json(temporary / MANIFEST, manifest)
    move_folder(temporary, place)
    return place


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file straight from memory; gives its size and SHA-256.

    Notes
    -----
    ``safetensors.torch.save_file`` copies every tensor into a Python object while it holds
    the interpreter lock, which stalls a training that goes on beside it; this does not.

    References
    ----------
    safetensors format, https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        dtype, shape = DTYPES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start_of_file: Iterable[Any] = (len(text).to_bytes(8, "little"), text)
    return _write_hashed(path, chain(start_of_file, _bytes_of(tensors)))


def _bytes_of(tensors: Mapping[str, Tensor]) -> Iterator[Any]:
    """Memory of each tensor, uncopied."""
    for tensor in tensors.values():
        flat = tensor.reshape(-1)
        if flat.numel():
            yield memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _write_json(path: Path, value: Any) -> dict[str, Any]:
    """Write JSON to the disk; returns its size and SHA-256."""
    return _write_hashed(path, [json.dumps(value, allow_nan=False).encode()])


def _write_hashed(path: Path, chunks: Iterable[Any]) -> dict[str, Any]:
    """Write a file to the disk; returns its size and SHA-256."""
    digest, size_bytes = hashlib.sha256(), 0

    def hash_chunks() -> Iterator[Any]:
        nonlocal size_bytes
        for chunk in chunks:
            digest.update(chunk)
            size_bytes += len(chunk)
            yield chunk

    write_synced(path, hash_chunks())
    return {"bytes": size_bytes, "sha256": digest.hexdigest()}


# ---------------------------------------------------------------------- reading


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints of a folder, newest first; half-written ones have other names."""
    if not folder.is_dir():
        return []
    found = [item for item in folder.iterdir() if _NAME.fullmatch(item.name)]
    return sorted(found, key=lambda place: _serial(place.name), reverse=True)


def _serial(name: str) -> int:
    """The number that a checkpoint's name begins with."""
    return int(name.partition("-")[0])


def remove(place: Path) -> None:
    """Remove a checkpoint; ``begin`` finishes a removal that was killed."""
    remove_folder(place, aside=place.with_name(f".{place.name}.removed"))


def newest(folder: Path) -> tuple[Path | None, list[CheckpointError]]:
    """The newest checkpoint that is whole, and what is wrong with newer ones."""
    faults: list[CheckpointError] = []
    for place in checkpoints(folder):
        try:
            check(place)
        except CheckpointError as fault:
            faults.append(fault)
        else:
            return place, faults
    return None, faults


def check(place: Path) -> dict[str, Any]:
    """The manifest of a checkpoint, after every file was compared with it.

    Raises
    ------
    CheckpointError
        If it is of another format, a file is missing, of another size or content, or a
        name leads elsewhere.
    """
    manifest = read_manifest(place)
    for name, facts in manifest["files"].items():
        path = place / name
        if path.is_symlink() or not path.is_file():
            raise _torn(place, f"the file {name}", "none")
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise _torn(place, f"{facts['bytes']} bytes in {name}", f"{size}")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != facts.get("sha256"):
            expected = f"the SHA-256 of {name} to be {facts.get('sha256')}"
            raise _torn(place, expected, found)
    return manifest


def read_manifest(place: Path) -> dict[str, Any]:
    """The manifest, checked for its form alone.

    Raises
    ------
    CheckpointError
        If it is missing, torn, of another format, or names files elsewhere.
    """
    manifest = _read_json(place, MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        have = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise _torn(place, f"format {FORMAT}", repr(have))
    kinds = {"files": dict, "world_size": int, "position": dict, "run": dict}
    for key, kind in {**kinds, "about": dict}.items():
        if not isinstance(manifest.get(key), kind):
            got = repr(manifest.get(key))[:80]
            raise _torn(place, f"{key} in the manifest as a {kind.__name__}", got)
    files, ranks = manifest["files"], manifest["world_size"]
    if set(manifest["position"]) != {f.name for f in fields(Position)} or ranks < 1:
        raise _torn(place, "a position and 1 rank or more in the manifest", "others")
    for name, facts in files.items():
        whole = isinstance(facts, dict) and isinstance(facts.get("bytes"), int)
        if not _PLAIN.fullmatch(name) or not whole:
            raise _torn(place, "plain file names with size and hash", repr(name)[:80])
    for rank in range(ranks):
        if not {f"rank-{rank}.json", f"rank-{rank}.safetensors"} <= files.keys():
            raise _torn(place, f"a part of rank {rank}", "none")
    return manifest


def read_part(place: Path, rank: int, *, is_mapped: bool = False) -> Any:
    """The state of one rank; ``check`` the checkpoint first.

    Parameters
    ----------
    place
        Folder of the checkpoint.
    rank
        Whose state.
    is_mapped
        Whether tensors may stay views into the file. They cost no memory, but lie at
        addresses where some processors' kernels round differently, so only what is copied
        before it is computed with may be read this way.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    plan = _read_json(place, f"rank-{rank}.json")
    try:
        tensors = load_file(place / f"rank-{rank}.safetensors")
        if not is_mapped:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return restore(plan, tensors)
    except (
        SafetensorError,
        OSError,
        ValueError,
        TypeError,
        LookupError,
        RuntimeError,
    ) as error:
        raise _torn(place, f"a readable part of rank {rank}", str(error)) from error


def _read_json(place: Path, name: str) -> Any:
    """A JSON file of a checkpoint."""
    path = place / name
    try:
        if path.is_symlink() or not path.is_file():
            raise _torn(place, f"the file {name}", "none")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise _torn(place, f"less than {MAX_JSON_BYTES} bytes in {name}", "more")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _torn(place, f"JSON in {name}", str(error)) from error


def _torn(place: Path, expected: str, got: str) -> CheckpointError:
    """The error for a checkpoint that is not what it should be."""
    msg = f"checkpoint {str(place)!r}: expected {expected}, got {got}."
    return CheckpointError(f"{msg} Take another checkpoint.")
