"""Checkpoints on disk: complete or not there at all, and harmless to read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import harness
from harness.checkpoint import format as checkpoint
from harness.checkpoint.format import (
    Manifest,
    Position,
    RunRef,
    begin_checkpoint,
    commit_checkpoint,
    get_final_path,
    list_checkpoints,
    mark_failed,
    read_rank,
    remove_checkpoint,
    remove_killed_saves,
    verify_checkpoint,
    write_rank,
)
from harness.errors import CheckpointError
from harness.pytree import as_bytes, flatten
from tests.harness.checkpoint.newest import find_newest
from tracking.durable import mark_free

POSITION = Position(epoch=1, iter=2, step=3, phase="train")


def manifest_of(world_size: int = 1, position: Position = POSITION) -> Manifest:
    return Manifest(
        world_size=world_size, position=position, run=RunRef(), about={"rows": 9}
    )


def save(folder: Path, step: int = 3, value: float = 1.0) -> Path:
    """A checkpoint of one rank."""
    position = replace(POSITION, step=step)
    temporary = begin_checkpoint(folder, position)
    plan, tensors = flatten({"a": torch.full((50,), value), "n": [step, "x"]})
    write_rank(temporary, 0, plan, tensors)
    return commit_checkpoint(temporary, manifest_of(position=position))


def test_checkpoint_is_on_the_disk_before_it_gets_its_name(tmp_path, disk_calls):
    path = save(tmp_path)
    inode, above = path.stat().st_ino, tmp_path.stat().st_ino
    *written, first, second, third = disk_calls
    assert [first, second, third] == [
        ("fsync", inode),
        ("rename", inode),
        ("fsync", above),
    ]
    assert {("fsync", file.stat().st_ino) for file in path.iterdir()} <= set(written)


# -------------------------------------------------------------- written completely


def test_save_then_read_returns_the_state(tmp_path: Path) -> None:
    place = save(tmp_path)
    assert place.name == "000001-epoch-1-batch-2-step-3"
    assert verify_checkpoint(place).position.step == 3
    state = read_rank(place, 0)
    assert torch.equal(state["a"], torch.ones(50))
    assert state["n"] == [3, "x"]


def test_restored_tensors_own_aligned_storage(tmp_path: Path) -> None:
    image = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    state = {
        "odd": torch.ones(3, dtype=torch.uint8),
        "x": torch.rand(7),
        "image": image,
    }
    temporary = begin_checkpoint(tmp_path, POSITION)
    write_rank(temporary, 0, *flatten(state))
    place = commit_checkpoint(temporary, manifest_of())
    mapped = read_rank(place, 0, is_mapped=True)
    found = read_rank(place, 0)
    # The case is a real one: in the file, tensors lie where torch would not put them.
    assert any(tensor.data_ptr() % 64 for tensor in mapped.values())
    for name, tensor in found.items():
        assert torch.equal(tensor, state[name])
        assert tensor.stride() == state[name].stride()
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == state[name].nbytes


def test_checkpoints_are_ordered_by_saving_not_by_step(tmp_path: Path) -> None:
    places = [save(tmp_path, step) for step in (30, 40, 5)]
    assert list_checkpoints(tmp_path) == places[::-1]
    assert find_newest(tmp_path) == (places[2], [])


def test_begin_clears_away_what_killed_saves_left_and_nothing_else(
    tmp_path: Path,
) -> None:
    place = save(tmp_path)
    left = begin_checkpoint(tmp_path, POSITION)
    (left / "rank-0.safetensors").write_bytes(b"half")
    mark_free(left)  # as the end of a process does
    place.rename(tmp_path / f".{place.name}.removed")
    (tmp_path / "notes.tmp").mkdir()
    begin_checkpoint(tmp_path, replace(POSITION, step=9))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".000001-epoch-1-batch-2-step-9.tmp", "notes.tmp"]


def test_begin_leaves_the_save_of_a_live_writer_alone(tmp_path: Path) -> None:
    live = begin_checkpoint(tmp_path, POSITION)
    second = begin_checkpoint(tmp_path, POSITION)
    remove_killed_saves(tmp_path)
    assert live.is_dir()
    assert live != second
    mark_failed(live, 0)
    remove_killed_saves(tmp_path)
    assert list(tmp_path.iterdir()) == [second]


def test_remove_takes_the_name_away_first(tmp_path: Path) -> None:
    place = save(tmp_path)
    remove_checkpoint(place)
    assert list(tmp_path.iterdir()) == []


def test_commit_waits_for_every_rank_and_keeps_all_parts(tmp_path: Path) -> None:
    temporary = begin_checkpoint(tmp_path, POSITION)
    for rank in (1, 0):
        write_rank(temporary, rank, {"rank": rank}, {})
    place = commit_checkpoint(temporary, manifest_of(2))
    assert [read_rank(place, rank) for rank in (0, 1)] == [{"rank": 0}, {"rank": 1}]
    assert verify_checkpoint(place).world_size == 2


def test_commit_without_the_part_of_a_rank_that_failed_leaves_nothing(
    tmp_path: Path,
) -> None:
    before = save(tmp_path)
    temporary = begin_checkpoint(tmp_path, POSITION)
    write_rank(temporary, 0, {}, {})
    mark_failed(temporary, 1)
    with pytest.raises(CheckpointError, match="expected the files of rank 1, got none"):
        commit_checkpoint(temporary, manifest_of(2))
    assert find_newest(tmp_path) == (before, [])


def test_commit_of_a_file_that_lost_its_end_is_refused(tmp_path: Path) -> None:
    temporary = begin_checkpoint(tmp_path, POSITION)
    write_rank(temporary, 0, {}, {"a": torch.ones(9)})
    os.truncate(temporary / "rank-0.safetensors", 30)
    with pytest.raises(CheckpointError, match=r"bytes in rank-0\.safetensors"):
        commit_checkpoint(temporary, manifest_of())
    assert not get_final_path(temporary).exists()


# ------------------------------------------------------- a save killed at any write


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may grow beyond a size: what a full disk or a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)


@pytest.mark.parametrize("size", [0, 1, 100, 250, 300])
def test_save_on_a_full_disk_leaves_the_previous_checkpoint_the_newest(
    size: int, tmp_path: Path
) -> None:
    before = save(tmp_path)
    with limited(size), pytest.raises(OSError, match="File too large"):
        save(tmp_path, 4)
    assert find_newest(tmp_path) == (before, [])
    assert find_newest(tmp_path)[0] != save(tmp_path, 5)  # space is back


def killed_at(call: int, folder: Path) -> bool:
    """Save in a child that is killed before its n-th system call on files; False at the end."""
    pid = os.fork()
    if pid == 0:
        count = 0

        def stop(event: str, args: tuple[object, ...]) -> None:
            nonlocal count
            if event in {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"}:
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1

        import sys  # noqa: PLC0415

        sys.addaudithook(stop)
        save(folder, 4, 2.0)
        os._exit(0)
    return os.waitpid(pid, 0)[1] != 0


def test_save_killed_before_any_change_of_the_folder_leaves_a_whole_newest(
    tmp_path: Path,
) -> None:
    before, states = save(tmp_path), []
    for call in range(100):
        is_killed = killed_at(call, tmp_path)
        found, faults = find_newest(tmp_path)
        assert found is not None
        assert faults == []
        states.append(found == before)
        if not is_killed:
            break
    assert not states[-1]
    assert (
        sum(states) >= 8
    )  # killed at each of its writes, the former stayed the newest
    assert [one for one in states if not one] == states[sum(states) :]


# ------------------------------------------------------------- torn or hostile files

CANARY: list[int] = []


def sing() -> None:
    CANARY.append(1)


class Canary:
    """Sings when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return sing, ()


def change_manifest(place: Path, **changes: Any) -> None:
    manifest = json.loads((place / "manifest.json").read_text()) | changes
    del manifest["sha256"]  # as in checkpoints from before there was one
    (place / "manifest.json").write_text(json.dumps(manifest))


def replaced(place: Path, name: str, data: bytes) -> None:
    """Other content, with a manifest that vouches for it."""
    (place / name).write_bytes(data)
    files = json.loads((place / "manifest.json").read_text())["files"]
    files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    change_manifest(place, files=files)


def flip(place: Path, name: str, at: int) -> None:
    data = bytearray((place / name).read_bytes())
    data[at] ^= 1
    (place / name).write_bytes(bytes(data))


def digit_of_step(place: Path) -> int:
    text = (place / "manifest.json").read_text()
    return text.index('"step": ') + len('"step": ')


def cut(place: Path, name: str, size: int) -> None:
    os.truncate(place / name, size)


def link(place: Path, name: str) -> None:
    aside = place.parent / "aside"
    (place / name).rename(aside)
    (place / name).symlink_to(aside)


def fifo(place: Path, name: str) -> None:
    (place / name).unlink()
    os.mkfifo(place / name)


def with_file(place: Path, name: str) -> None:
    files = json.loads((place / "manifest.json").read_text())["files"]
    (place.parent / "secret").write_text("x")
    change_manifest(place, files=files | {name: {"bytes": 1, "sha256": "0"}})


TENSORS, STATE = "rank-0.safetensors", "rank-0.json"
DEEP = b"[" * 200_000 + b"]" * 200_000
PICKLE = pickle.dumps(Canary())

REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (
        lambda p: (p / "manifest.json").unlink(),
        "manifest.json, got none",
    ),
    "torn manifest": (
        lambda p: cut(p, "manifest.json", 50),
        "expected JSON in manifest",
    ),
    "flipped bit in the manifest": (
        lambda p: flip(p, "manifest.json", digit_of_step(p)),
        "manifest.json as it was written, got another content",
    ),
    "empty manifest": (
        lambda p: cut(p, "manifest.json", 0),
        "expected JSON in manifest",
    ),
    "a list for a manifest": (
        lambda p: (p / "manifest.json").write_text("[1]"),
        "expected format 1, got",
    ),
    "deep manifest": (
        lambda p: (p / "manifest.json").write_bytes(DEEP),
        "expected JSON in manifest",
    ),
    "linked manifest": (lambda p: link(p, "manifest.json"), "manifest.json, got none"),
    "a pipe for a manifest": (
        lambda p: fifo(p, "manifest.json"),
        "manifest.json, got none",
    ),
    "another format": (lambda p: change_manifest(p, format=99), "format 1, got 99"),
    "no ranks": (
        lambda p: change_manifest(p, world_size=0),
        "expected a world_size from 1, got 0",
    ),
    "a billion ranks": (
        lambda p: change_manifest(p, world_size=10**9),
        "files of rank 1",
    ),
    "ranks as text": (
        lambda p: change_manifest(p, world_size="1"),
        "expected int in field 'world_size', got str",
    ),
    "no files": (
        lambda p: change_manifest(p, files={}),
        "expected the files of rank 0",
    ),
    "a position elsewhere": (
        lambda p: change_manifest(p, position={"__class__": 1}),
        "expected field 'epoch' in field 'position', got none",
    ),
    "a run that is none": (
        lambda p: change_manifest(p, run="x"),
        "expected object in field 'run', got str",
    ),
    "a phase that is none": (
        lambda p: change_manifest(p, position=asdict(POSITION) | {"phase": "later"}),
        "in field 'position.phase'",
    ),
    "a size that is no number": (
        lambda p: change_manifest(p, files={"x": {"bytes": "1", "sha256": ""}}),
        "expected int in field 'files",
    ),
    "path up": (lambda p: with_file(p, "../secret"), "plain file names"),
    "absolute path": (lambda p: with_file(p, "/etc/passwd"), "plain file names"),
    "hidden name": (lambda p: with_file(p, ".x"), "plain file names"),
    "linked tensors": (lambda p: link(p, TENSORS), "safetensors, got none"),
    "a pipe for tensors": (lambda p: fifo(p, TENSORS), "safetensors, got none"),
    "missing tensors": (lambda p: (p / TENSORS).unlink(), "safetensors, got none"),
    "truncated tensors": (
        lambda p: cut(p, TENSORS, 100),
        "bytes in rank-0.safetensors",
    ),
    "truncated state": (lambda p: cut(p, STATE, 5), "bytes in rank-0.json"),
    "a flipped bit in tensors": (
        lambda p: flip(p, TENSORS, -3),
        "SHA-256 of rank-0.saf",
    ),
    "a flipped bit in the state": (
        lambda p: flip(p, STATE, 9),
        "SHA-256 of rank-0.json",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_check_of_a_damaged_checkpoint_is_refused_and_the_one_before_is_taken(
    fault: str, tmp_path: Path
) -> None:
    before, place = save(tmp_path), save(tmp_path, 4)
    change, match = REFUSED[fault]
    change(place)
    with pytest.raises(CheckpointError, match=match):
        verify_checkpoint(place)
    found, faults = find_newest(tmp_path)
    assert found == before
    assert len(faults) == 1
    assert str(place) in str(faults[0])


def header(text: bytes, size: int | None = None, body: bytes = b"") -> bytes:
    """A safetensors file."""
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def tensor(shape: list[int], offsets: list[int], dtype: str = "F32") -> bytes:
    about = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return json.dumps({"state/a": about}).encode()


HOSTILE: dict[str, tuple[str, bytes]] = {
    "pickle for tensors": (TENSORS, PICKLE),
    "pickle for the state": (STATE, PICKLE),
    "a header of 2**62 bytes": (TENSORS, header(b"{}", 2**62)),
    "a header longer than the file": (TENSORS, header(b"{}", 500)),
    "a tensor of 2**60 numbers": (TENSORS, header(tensor([2**60], [0, 2**62]))),
    "sizes that overflow": (
        TENSORS,
        header(tensor([2**33, 2**33], [0, 4]), None, b"0000"),
    ),
    "offsets beyond the end": (TENSORS, header(tensor([1], [0, 4]))),
    "offsets before the start": (TENSORS, header(tensor([1], [-4, 0]), None, b"0000")),
    "an unknown dtype": (TENSORS, header(tensor([1], [0, 4], "PY"), None, b"0000")),
    "a header that is no JSON": (TENSORS, header(b"\x80\x04K\x01.")),
    "nothing": (TENSORS, b""),
    "a deep header": (TENSORS, header(DEEP)),
    "a deep state": (STATE, DEEP),
    "deep, and short enough for JSON": (STATE, b"[" * 990 + b"]" * 990),
    "an unknown form": (STATE, b'{"$object": "os.system"}'),
    "a tensor that is not there": (STATE, b'{"a": {"$tensor": "state/b"}}'),
    "a permutation of no tensor": (STATE, b'{"$permuted": ["state/b", [0]]}'),
    "a permutation of numbers": (STATE, b'{"$permuted": [1, 2]}'),
    "complex of a string": (STATE, b'{"$complex": "x"}'),
    "keys that no dict can have": (STATE, b'{"$dict": [[[], 1]]}'),
    "bytes that are none": (STATE, b'{"$bytes": "!!"}'),
    "state that is no text": (STATE, b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_read_of_a_hostile_part_with_right_hashes_is_refused_and_runs_nothing(
    fault: str, tmp_path: Path
) -> None:
    place = save(tmp_path)
    replaced(place, *HOSTILE[fault])
    with pytest.raises(CheckpointError, match="Take another checkpoint"):
        read_rank(place, 0)
    assert CANARY == []


def test_canary_sings_when_it_is_unpickled() -> None:
    """The ground of the test above."""
    pickle.loads(PICKLE)
    assert CANARY.pop() == 1


def test_read_of_a_json_file_beyond_the_limit_is_refused_unread(tmp_path: Path) -> None:
    place = save(tmp_path)
    with (place / STATE).open("r+b") as file:
        file.truncate(checkpoint.MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match="expected less than"):
        read_rank(place, 0)


def test_single_element_of_an_odd_stride_is_written_and_sent(tmp_path):
    single = torch.arange(8.0).reshape(2, 4)[:, 1][:1]
    assert single.stride() == (4,)
    checkpoint.write_tensors(tmp_path / "one.safetensors", {"one": single})
    assert load_file(tmp_path / "one.safetensors")["one"].tolist() == [1.0]
    assert as_bytes(single).view(torch.float32).tolist() == [1.0]


def test_fit_of_a_single_row_of_an_odd_stride_is_described_and_trained():
    row = torch.arange(8.0).as_strided((1, 1), (4, 4))
    learner = harness.setup(
        lambda: nn.Linear(1, 1), loss=nn.MSELoss(), optimizer=torch.optim.SGD
    )
    fitted = learner.fit((row, row), 1, tracker=False, verbose=False)
    assert len(fitted.records["metrics"]["train"]) == 1
