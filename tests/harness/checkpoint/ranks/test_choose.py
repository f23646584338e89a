"""All ranks choose one checkpoint, and each file is read by one of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from harness.checkpoint.format import (
    Manifest,
    Position,
    RunRef,
    begin_checkpoint,
    commit_checkpoint,
    write_rank,
)
from harness.checkpoint.ranks.choose import choose_checkpoint
from harness.errors import CheckpointError
from harness.pytree import flatten
from tests.harness.checkpoint.ranks.threads import counting_opens, on_ranks

POSITION = Position(epoch=1, iter=2, step=3, phase="train")
WORLD = 4


def save(folder: Path, step: int) -> Path:
    """A checkpoint of four ranks."""
    position = replace(POSITION, step=step)
    temporary = begin_checkpoint(folder, position)
    for rank in range(WORLD):
        write_rank(temporary, rank, *flatten({"a": torch.full((9,), float(rank))}))
    manifest = Manifest(world_size=WORLD, position=position, run=RunRef(), about={})
    return commit_checkpoint(temporary, manifest)


def flip(path: Path) -> None:
    """Change one bit of a file, which keeps its size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("world_size", [1, 3, 4, 8])
def test_each_file_is_read_once_by_all_ranks_together(
    world_size: int, tmp_path: Path
) -> None:
    place = save(tmp_path, 1)
    for path in (tmp_path, place):
        with counting_opens() as opened:
            found = on_ranks(world_size, partial(choose_checkpoint, path))
        assert [found[0]] * world_size == found
        assert found[0] is not None
        assert found[0][0] == place  # type: ignore[index]
        kinds = ("safetensors", "json")
        names = {f"rank-{n}.{kind}" for n in range(WORLD) for kind in kinds}
        assert dict(opened) == dict.fromkeys(names | {"manifest.json"}, 1)


@pytest.mark.parametrize("world_size", [1, 4, 6])
@pytest.mark.parametrize("name", ["rank-0.json", "rank-2.safetensors"])
def test_a_part_that_one_rank_finds_damaged_is_left_by_all(
    name: str, world_size: int, tmp_path: Path
) -> None:
    before, place = save(tmp_path, 1), save(tmp_path, 2)
    flip(place / name)
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint") as caught:
        found = on_ranks(world_size, lambda ranks: choose_checkpoint(tmp_path, ranks))
    assert [path for path, _ in found] == [before] * world_size  # type: ignore[misc]
    [told] = [str(warning.message) for warning in caught]  # by one rank
    assert f"expected the SHA-256 of {name}" in told
    assert str(place) in told


def test_a_checkpoint_of_a_wrong_size_is_left_before_a_file_is_read(
    tmp_path: Path,
) -> None:
    before, place = save(tmp_path, 1), save(tmp_path, 2)
    with (place / "rank-3.safetensors").open("ab") as file:
        file.write(b"more")
    (tmp_path / "000009-epoch-1-batch-1-step-1").mkdir()  # no manifest
    with (
        pytest.warns(UserWarning, match="skipped") as caught,
        counting_opens() as opened,
    ):
        found = on_ranks(2, lambda ranks: choose_checkpoint(tmp_path, ranks))
    assert [path for path, _ in found] == [before] * 2  # type: ignore[misc]
    assert opened["rank-1.json"] == 1  # of the older one
    told = sorted(str(warning.message) for warning in caught)
    assert "bytes in rank-3.safetensors" in told[0]
    assert "the file manifest.json, got none" in told[1]


def test_a_damaged_checkpoint_that_was_named_is_refused_by_all(tmp_path: Path) -> None:
    place = save(tmp_path, 2)
    flip(place / "rank-1.json")
    found = on_ranks(3, lambda ranks: choose_checkpoint(place, ranks))
    assert all(isinstance(error, CheckpointError) for error in found)
    assert {"SHA-256 of rank-1.json" in str(error) for error in found} == {True}
    (place / "rank-1.json").unlink()
    found = on_ranks(3, lambda ranks: choose_checkpoint(place, ranks))
    assert {"the file rank-1.json, got none" in str(one) for one in found} == {True}


def test_none_is_chosen_where_none_is_whole(tmp_path: Path) -> None:
    assert on_ranks(2, lambda ranks: choose_checkpoint(tmp_path, ranks)) == [None] * 2
    flip(save(tmp_path, 1) / "rank-1.json")
    with pytest.warns(UserWarning, match=r"rank-1\.json"):
        found = on_ranks(2, lambda ranks: choose_checkpoint(tmp_path, ranks))
    assert found == [None] * 2
