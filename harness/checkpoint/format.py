"""The folder of a checkpoint: tensors and JSON, written completely or not at all.

    000007-epoch-3-batch-40-step-120/
        manifest.json            format, position, and size and SHA-256 of every file
        rank-0.json              state of the rank without its tensors
        rank-0.safetensors       its tensors
        index.json               of several ranks: which part has which piece of a parameter

Files are written under a temporary name, flushed to the disk, and renamed once. If a save
is killed at any write, the newest checkpoint is still the one before. Reading a checkpoint
runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from harness.errors import CheckpointError
from harness.pytree import DTYPES, as_bytes, restore
from harness.reshard.consolidated import STATE_ERRORS
from harness.reshard.index import PartIndex, PartSummary, make_index
from tracking.durable import (
    mark_busy,
    mark_free,
    move_folder,
    remove_folder,
    remove_unfinished,
    replace_file,
    write_synced,
)
from tracking.errors import describe_mismatch

FORMAT = 1
"""Version of the folder."""

MANIFEST, INDEX = "manifest.json", "index.json"
DIGEST = "sha256"
"""Key of the manifest for its own digest."""

MAX_JSON_BYTES = 1 << 28
"""Larger JSON files are refused unread."""

PEER_WAIT_S = 600.0
"""How long rank 0 waits for the files of the others."""

_NAME = re.compile(r"(\d{6,15})-epoch-\d+-batch-\d+-step-\d+")
_UNFINISHED = re.compile(rf"\.{_NAME.pattern}\.(tmp|removed)")
_RANK_FILE = re.compile(r"rank-(\d{1,9})\.(safetensors|json)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


Phase = Literal["train", "valid", "epoch"]
"""Where in an epoch: after a training batch, before validation, after the epoch."""


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in a fit a checkpoint was taken."""

    epoch: int
    iter: int  #: training batches finished in it (>= 0)
    step: int  #: optimizer steps finished since the start (>= 0)
    #: ``train``: after that batch, and a validation that followed it. ``valid``: before
    #: validation. ``epoch``: after the epoch.
    phase: Phase

    def __str__(self) -> str:
        return f"epoch {self.epoch}, batch {self.iter}, step {self.step}"


@dataclass(frozen=True, kw_only=True)
class RunRef:
    """The run that recorded the fit of a checkpoint; both are None if tracking was off."""

    id: str | None = None
    path: str | None = None  #: its folder, absolute


@dataclass(frozen=True, kw_only=True)
class FileInfo:
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Content of ``manifest.json``."""

    format: int = FORMAT  #: version of the folder
    world_size: int  #: ranks that saved (>= 1)
    position: Position  #: where in the fit the checkpoint was taken
    run: RunRef  #: run that recorded the fit
    #: description of the fit, which a resume compares; see ``describe_fit``
    about: dict[str, Any]
    #: every other file of the folder, by name
    files: dict[str, FileInfo] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``manifest.json`` into a folder, with its own SHA-256."""
        content = asdict(self)
        _write_json(folder / MANIFEST, content | {DIGEST: _digest(content)})


def _digest(content: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest as JSON, which is the same when it is read again."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# ---------------------------------------------------------------------- writing


def begin_checkpoint(folder: Path, position: Position) -> Path:
    """Make an empty temporary folder for a checkpoint; on rank 0, before the others write.

    The name begins with a number above those of all other checkpoints in `folder`. So the
    checkpoint saved last is the newest, even if the fit resumed from an earlier one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    serial = 1
    remove_killed_saves(folder)
    for item in folder.iterdir():
        name = item.name.removeprefix(".").removesuffix(".tmp")
        if _NAME.fullmatch(name):
            serial = max(serial, _get_serial(name) + 1)
    where = f"epoch-{position.epoch}-batch-{position.iter}-step-{position.step}"
    temporary = folder / f".{serial:06d}-{where}.tmp"
    temporary.mkdir()
    mark_busy(temporary)
    return temporary


def remove_killed_saves(folder: Path) -> None:
    """Remove what killed saves and removals left; a save of a live process stays."""
    if folder.is_dir():
        remove_unfinished(folder, _UNFINISHED)


def get_final_path(temporary: Path) -> Path:
    """Return where ``commit_checkpoint`` moves a temporary folder."""
    return temporary.with_name(temporary.name[1:].removesuffix(".tmp"))


def write_rank(
    temporary: Path,
    rank: int,
    plan: object,
    tensors: Mapping[str, Tensor],
    summary: PartSummary | None = None,
) -> None:
    """Write the files of one rank.

    Parameters
    ----------
    plan, tensors
        From ``flatten``; the tensors must be contiguous, on the CPU.
    summary
        What the index takes from them; None: the checkpoint gets no index.
    """
    tensor_path, plan_path = (temporary / name for name in list_rank_files(rank))
    files = {
        tensor_path.name: asdict(write_tensors(tensor_path, tensors)),
        plan_path.name: asdict(_write_json(plan_path, plan)),
    }
    # Rank 0 waits for this file: both files are complete now.
    with replace_file(temporary / f"rank-{rank}.done") as fresh:
        about = None if summary is None else asdict(summary)
        _write_json(fresh, {"files": files, "summary": about})


def list_rank_files(rank: int) -> tuple[str, str]:
    """Names of the files of a rank: its tensors, and its plan, which is JSON."""
    return f"rank-{rank}.safetensors", f"rank-{rank}.json"


def mark_failed(temporary: Path, rank: int) -> None:
    """Tell rank 0 that the files of a rank will not come; the folder can be removed."""
    mark_free(temporary)
    with contextlib.suppress(OSError):
        (temporary / f"rank-{rank}.failed").touch()


def commit_checkpoint(temporary: Path, manifest: Manifest) -> Path:
    """Move a checkpoint to its final name when all ranks have written; on rank 0.

    Parameters
    ----------
    manifest
        Without its `files`.

    Raises
    ------
    CheckpointError
        If files do not come within ``PEER_WAIT_S``, or one has not its size on the disk.
    """
    path = get_final_path(temporary)
    files: dict[str, FileInfo] = {}
    summaries = []
    deadline = time.monotonic() + PEER_WAIT_S
    for rank in range(manifest.world_size):
        done = _wait_for_rank(temporary, rank, deadline)
        found = msgspec.json.decode(done.read_bytes(), type=WrittenFiles)
        files |= found.files
        summaries.append(found.summary)
        done.unlink()
    known = [summary for summary in summaries if summary is not None]
    if manifest.world_size > 1 and len(known) == manifest.world_size:
        index = vars(make_index(known))
        files[INDEX] = _write_json(temporary / INDEX, index)
    for name, info in files.items():
        size = (temporary / name).stat().st_size
        if size != info.bytes:
            msg = f"save({str(path)!r}): expected {info.bytes} bytes in {name}, got {size}."
            raise CheckpointError(f"{msg} Free some space, check the file system.")
    replace(manifest, files=files).write(temporary)
    move_folder(temporary, path)
    mark_free(temporary)
    return path


@dataclass(frozen=True, kw_only=True)
class WrittenFiles:
    """What a rank tells rank 0 about its part: its files, and what the index needs."""

    files: dict[str, FileInfo]
    summary: PartSummary | None = None


def _wait_for_rank(temporary: Path, rank: int, deadline: float) -> Path:
    """Wait for the file that a rank writes last; return its path."""
    done, failed = (temporary / f"rank-{rank}.{end}" for end in ("done", "failed"))
    while not done.exists():
        if failed.exists() or time.monotonic() > deadline:
            path = str(get_final_path(temporary))
            msg = f"save({path!r}): expected the files of rank {rank}, got none."
            raise CheckpointError(
                f"{msg} It could not write, has died, or the folder is not shared."
            )
        time.sleep(0.01)
    return done


FILE_DTYPES = DTYPES | {torch.complex64: "C64"}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileInfo:
    """Write a safetensors file straight from memory.

    Notes
    -----
    ``safetensors.torch.save_file`` copies every tensor into a Python object while it holds
    the interpreter lock, which blocks the training thread. This function copies nothing.
    """
    return write_each_tensor(path, tensors, tensors.__getitem__)


def write_each_tensor(
    path: Path, specs: Mapping[str, Tensor], read: Callable[[str], Tensor]
) -> FileInfo:
    """Write a safetensors file of tensors that are read one after another.

    Parameters
    ----------
    specs
        Tensors by name that have the dtypes and shapes; they may be without memory.
    read
        Returns the tensor of a name, contiguous and on the CPU.

    References
    ----------
    safetensors format, https://github.com/huggingface/safetensors#format
    """
    header: dict[str, Any] = {}
    end = 0
    for name, spec in specs.items():
        dtype, shape = spec.dtype, spec.shape
        start, end = end, end + shape.numel() * dtype.itemsize
        if dtype not in FILE_DTYPES:
            msg = f"{name}: expected a dtype that a safetensors file holds"
            raise TypeError(f"{msg}, got {dtype}. Convert the tensor.")
        header[name] = {
            "dtype": FILE_DTYPES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    start_of_file: Iterable[Any] = (len(text).to_bytes(8, "little"), text)
    return _write_hashed(path, chain(start_of_file, map(_as_memory, map(read, specs))))


def _as_memory(tensor: Tensor) -> memoryview:
    """The memory of a tensor, without a copy."""
    return memoryview(as_bytes(tensor).numpy())  # type: ignore[arg-type]


def _write_json(path: Path, value: object) -> FileInfo:
    return _write_hashed(path, [json.dumps(value, allow_nan=False).encode()])


def _write_hashed(path: Path, chunks: Iterable[Any]) -> FileInfo:
    digest, size_bytes = hashlib.sha256(), 0

    def hash_chunks() -> Iterator[Any]:
        nonlocal size_bytes
        for chunk in chunks:
            digest.update(chunk)
            size_bytes += len(chunk)
            yield chunk

    write_synced(path, hash_chunks())
    return FileInfo(bytes=size_bytes, sha256=digest.hexdigest())


# ---------------------------------------------------------------------- reading


def list_checkpoints(folder: Path) -> list[Path]:
    """List the checkpoints of a folder, newest first; unfinished ones have other names."""
    if not folder.is_dir():
        return []
    found = [item for item in folder.iterdir() if _NAME.fullmatch(item.name)]
    return sorted(found, key=lambda path: _get_serial(path.name), reverse=True)


def _get_serial(name: str) -> int:
    return int(name.partition("-")[0])


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint; ``begin_checkpoint`` finishes a removal that was killed."""
    remove_folder(path, aside=path.with_name(f".{path.name}.removed"))


def verify_checkpoint(path: Path) -> Manifest:
    """Compare every file with the manifest, and return the manifest.

    Raises
    ------
    CheckpointError
        If a file is missing, is a link, or has another size or content; also as for
        ``read_manifest``.
    """
    manifest = read_manifest(path)
    verify_files(path, manifest)
    return manifest


def verify_files(
    path: Path, manifest: Manifest, rank: int = 0, world_size: int = 1
) -> None:
    """Compare a rank's share of the files with the manifest; the default is all of them.

    Parameters
    ----------
    rank, world_size
        This rank of those that share the work. A rank's share is its own part, and the
        parts ``world_size`` ranks on; what belongs to no rank is rank 0's.
    """
    for name, info in manifest.files.items():
        if _get_rank(name) % world_size == rank:
            verify_file(path, name, info)


def _get_rank(name: str) -> int:
    """Rank whose part a file is in; 0 for a file of the whole checkpoint."""
    found = _RANK_FILE.fullmatch(name)
    return int(found[1]) if found else 0


def check_sizes(path: Path, manifest: Manifest) -> None:
    """Raise ``CheckpointError`` if a file is missing or has another size; none is read."""
    for name, info in manifest.files.items():
        check_size(path, name, info)


def describe_file(path: Path) -> FileInfo:
    """Size and SHA-256 of a file."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return FileInfo(bytes=path.stat().st_size, sha256=digest)


def verify_file(path: Path, name: str, info: FileInfo) -> None:
    """Raise ``CheckpointError`` unless a file of a folder has this size and content."""
    check_size(path, name, info)
    try:
        found = describe_file(path / name).sha256
    except OSError as error:
        raise _make_error(path, f"to read {name}", str(error)) from error
    if found != info.sha256:
        raise _make_error(path, f"the SHA-256 of {name} to be {info.sha256}", found)


def check_size(path: Path, name: str, info: FileInfo) -> None:
    """Raise ``CheckpointError`` unless a file exists, is no link, and has this size."""
    try:
        found = (path / name).lstat()
    except OSError as error:
        raise _make_error(path, f"the file {name}", "none") from error
    if not stat.S_ISREG(found.st_mode):
        raise _make_error(path, f"the file {name}", "none")
    if found.st_size != info.bytes:
        raise _make_error(path, f"{info.bytes} bytes in {name}", f"{found.st_size}")


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of a checkpoint and check its types; files are not read.

    Raises
    ------
    CheckpointError
        If the manifest is missing or damaged, has another format or wrong types, or names
        files outside the folder.
    """
    return parse_manifest(path, read_text(path, MANIFEST))


def parse_manifest(path: Path, text: str) -> Manifest:
    """The manifest of a checkpoint from the text in its file; see ``read_manifest``."""
    content = _parse_json(path, MANIFEST, text)
    found = content.get("format") if isinstance(content, dict) else content
    if found != FORMAT:
        raise _make_error(path, f"format {FORMAT}", repr(found)[:80])
    digest = content.pop(DIGEST, None)  # earlier checkpoints have none
    if digest is not None and digest != _digest(content):
        raise _make_error(path, f"{MANIFEST} as it was written", "another content")
    try:
        manifest = msgspec.convert(content, Manifest)
    except msgspec.ValidationError as error:
        msg = f"checkpoint {str(path)!r}, {MANIFEST}: {describe_mismatch(error)}."
        raise CheckpointError(f"{msg} Take another checkpoint.") from error
    _check_file_names(path, manifest)
    return manifest


def _check_file_names(path: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        if not _PLAIN_NAME.fullmatch(name):
            raise _make_error(path, "plain file names", repr(name)[:80])
    if manifest.world_size < 1:
        raise _make_error(path, "a world_size from 1", f"{manifest.world_size}")
    for rank in range(manifest.world_size):
        if not manifest.files.keys() >= {*list_rank_files(rank)}:
            raise _make_error(path, f"the files of rank {rank}", "none")


def read_index(path: Path, manifest: Manifest) -> PartIndex:
    """Read the index of a checkpoint."""
    content = read_json(path, INDEX)
    try:
        index = msgspec.convert(content, PartIndex)
        index.check()
    except (msgspec.ValidationError, ValueError) as error:
        raise _make_error(path, f"an index in {INDEX}", str(error)) from error
    if len(index.journals) != manifest.world_size:
        expected = f"an index of {manifest.world_size} ranks"
        raise _make_error(path, expected, f"one of {len(index.journals)}")
    return index


def read_rank(
    path: Path, rank: int, *, is_mapped: bool = False, key: str | None = None
) -> Any:
    """Read the state of one rank; call ``verify_checkpoint`` first.

    Parameters
    ----------
    is_mapped
        Whether tensors may be views into the file. Views need no memory, but their
        addresses are not aligned as torch aligns them, and kernels of some processors
        round differently there. So copy such tensors before computing with them.
    key
        Read only what is below this key of the state; None: all of it.
    """
    tensor_name, plan_name = list_rank_files(rank)
    plan = read_json(path, plan_name)
    try:
        tensors = load_file(path / tensor_name)
        if not is_mapped:
            tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        return restore(plan if key is None else plan[key], tensors)
    except (SafetensorError, OSError, *STATE_ERRORS) as error:
        expected = f"readable files of rank {rank}"
        raise _make_error(path, expected, str(error)) from error


def read_json(path: Path, name: str) -> Any:
    """Read a JSON file of a checkpoint."""
    return _parse_json(path, name, read_text(path, name))


def read_text(path: Path, name: str) -> str:
    """Read a JSON file of a checkpoint as text; ``CheckpointError`` if it cannot be."""
    file_path = path / name
    try:
        if file_path.is_symlink() or not file_path.is_file():
            raise _make_error(path, f"the file {name}", "none")
        if file_path.stat().st_size > MAX_JSON_BYTES:
            expected = f"less than {MAX_JSON_BYTES} bytes in {name}"
            raise _make_error(path, expected, "more")
        return file_path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise _make_error(path, f"JSON in {name}", str(error)) from error


def _parse_json(path: Path, name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _make_error(path, f"JSON in {name}", str(error)) from error


def _make_error(path: Path, expected: str, got: str) -> CheckpointError:
    msg = f"checkpoint {str(path)!r}: expected {expected}, got {got}."
    return CheckpointError(f"{msg} Take another checkpoint.")
