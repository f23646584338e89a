"""A rank of another form opens only the parts that have something of its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from harness.checkpoint.format import describe_file, read_manifest, verify_checkpoint
from harness.checkpoint.ranks.states import SavedRanks
from harness.checkpoint.weights import load_weights
from harness.errors import CheckpointError
from harness.reshard.consolidated import ConsolidatedState
from harness.reshard.convert import convert_model_part, convert_state
from harness.reshard.model_part import take_model_part
from tests.harness.checkpoint.ranks import faked
from tests.harness.checkpoint.ranks.threads import counting_opens

SHAPES = [(13, 5), (3,), (40,), (2, 2, 2), (90,), (1,)]
"""None is a multiple of the numbers of ranks, and one is smaller than each."""


def convert(
    place: Path, rank: int, world_size: int, stage: Literal[1, 3]
) -> dict[str, Any]:
    """The state of a rank of another form, from a checkpoint."""
    parts = SavedRanks(place, read_manifest(place))
    model = faked.Model(SHAPES)
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    live = faked.Faker(model, world_size, stage).accelerator(rank, zeros)
    return convert_state(parts.accelerators, model, live, rank, index=parts.index)


def opened_parts(opened: Any) -> set[int]:
    """Ranks whose parts were opened."""
    found = (re.fullmatch(r"rank-(\d+)\.json", name) for name in opened)
    return {int(match[1]) for match in found if match}


CHANGES: list[Any] = [
    ((3, 4), (3, 2)),
    ((3, 4), (3, 7)),
    ((1, 4), (1, 3)),
    ((1, 4), (3, 4)),
    ((3, 5), (1, 3)),
]
"""Stage and number of ranks, then and now."""


@pytest.mark.parametrize("has_index", [True, False])
@pytest.mark.parametrize(("then", "now"), CHANGES)
def test_every_element_comes_to_its_place(
    then: Any, now: Any, has_index: bool, tmp_path: Path
) -> None:
    model = faked.Model(SHAPES)
    place = faked.save(
        tmp_path, faked.Faker(model, then[1], then[0]), has_index=has_index
    )
    assert (place / "index.json").exists() == has_index
    values = faked.numbered(model)
    for rank in range(now[1]):
        found = convert(place, rank, now[1], now[0])
        wanted = faked.Faker(model, now[1], now[0]).accelerator(rank, values)
        # What is whole on one rank is padding on the others.
        found["own"].get("weights", {}).pop("parts.5", None)
        wanted["own"].get("weights", {}).pop("parts.5", None)
        check_equal(found["own"], wanted["own"])
        check_equal(found["shared"], wanted["shared"])
        assert found["facts"]["opt"]["state"] == [{"step": 5}]


@pytest.mark.parametrize(("then", "now"), CHANGES)
def test_every_element_of_a_part_of_the_model_comes_to_its_place(
    then: Any, now: Any
) -> None:
    model = faked.Model(SHAPES)
    values = faked.numbered(model)
    zeros = {name: torch.zeros_like(value) for name, value in values.items()}
    for dtype in (
        "torch.float32",
        "torch.bfloat16",
    ):  # without master weights, and with
        saved, live, wanted = (
            [of_dtype(dtype, model, form, rank, of) for rank in range(form[1])]
            for form, of in ((then, values), (now, zeros), (now, values))
        )
        for rank in range(now[1]):
            taken = [take_model_part(state) for state in saved]
            found = convert_model_part(taken, model, live[rank], rank)
            whole = take_model_part(wanted[rank])
            for side in ("shared", "own"):
                found[side].get("weights", {}).pop("parts.5", None)  # padding
                whole[side].get("weights", {}).pop("parts.5", None)
                check_equal(found[side], whole[side])


def of_dtype(
    dtype: str, model: faked.Model, form: Any, rank: int, values: dict[str, Tensor]
) -> dict[str, Any]:
    """The state of an accelerator on a rank, whose engine says that it trains this dtype."""
    state = faked.Faker(model, form[1], form[0]).accelerator(rank, values)
    state["facts"]["opt"]["form"] = ["Faked", dtype]
    return state


def check_equal(found: Any, wanted: Any) -> None:
    """Each kind of tensors, by name; what is padded with zeros has no values."""
    assert found.keys() == wanted.keys()
    for kind in wanted:
        assert found[kind].keys() == wanted[kind].keys()
        for name, value in wanted[kind].items():
            padded = value.clone()
            if name.endswith("exp_avg_sq"):  # one more than the value, also of padding
                padded[found[kind][name] == 0] = 0
            assert torch.equal(found[kind][name], padded), (kind, name)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_rank_opens_the_parts_that_overlap_its_own(
    stage: Literal[1, 3], tmp_path: Path
) -> None:
    shapes = [(64, 8), (256,), (1024,)]
    model = faked.Model(shapes)
    place = faked.save(tmp_path, faked.Faker(model, 32, stage))
    zeros = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    # At ZeRO 1, rank 0 restores the whole weights for all.
    first = {0, 1} if stage == 3 else set(range(32))
    for rank, wanted in ((0, first), (9, {0, 18, 19}), (15, {0, 30, 31})):
        parts = SavedRanks(place, read_manifest(place))
        live = faked.Faker(model, 16, stage).accelerator(rank, zeros)
        with counting_opens() as opened:
            convert_state(parts.accelerators, model, live, rank, index=parts.index)
        # The part before has the beginning of a parameter, and so its number of steps.
        more = opened_parts(opened) - wanted
        assert len(more) <= (stage == 1), more
        assert opened_parts(opened) >= wanted


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux tells of maps")
@pytest.mark.parametrize("stage", [1, 3])
def test_parts_that_rank_0_needs_are_opened_one_after_another(
    stage: Literal[1, 3], tmp_path: Path
) -> None:
    model = faked.Model([(64, 8), (256,), (1024,)])
    place = faked.save(tmp_path, faked.Faker(model, 32, stage))
    parts = SavedRanks(place, read_manifest(place))
    with counting_opens() as opened:
        zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
        live = faked.Faker(model, 16, 1).accelerator(0, zeros)
        found = convert_state(parts.accelerators, model, live, 0, index=parts.index)
        weights = found["shared"]["weights"]
    for name, value in faked.numbered(model).items():
        assert torch.equal(weights[name], value)
    assert opened_parts(opened) == set(range(32))
    maps = Path("/proc/self/maps").read_text()
    mapped = set(re.findall(rf"{re.escape(str(place))}/(rank-\d+)\.safetensors", maps))
    assert len(mapped) <= 5, mapped
    assert max(opened.values()) <= 2


def test_runs_of_the_index_are_as_many_as_parameters_and_ranks(tmp_path: Path) -> None:
    counts = {}
    for world_size in (16, 64):
        for stage in (1, 3):
            model = faked.Model([(64, 8), (256,), (1024,), (50,)])
            faker = faked.Faker(model, world_size, stage)  # type: ignore[arg-type]
            place = faked.save(tmp_path / f"{stage}-{world_size}", faker)
            runs = faked.read_index_json(place)["runs"]["opt"]
            counts[stage, world_size] = len(runs)
            assert sum(run[2] * run[4] for run in runs) == 64 * 8 + 256 + 1024 + 50
            for run, follower in pairwise(runs):
                assert run[0] != follower[0] or run[1] + run[2] * run[4] == follower[1]
    # At ZeRO 3 a last piece may be shorter.
    assert counts[3, 16] <= 2 * 4
    assert counts[3, 64] <= 2 * 4
    assert counts[1, 64] <= 64 + 4


def test_weights_of_many_ranks_are_loaded_by_the_index(tmp_path: Path) -> None:
    model = faked.Model(SHAPES)
    faked.save(tmp_path, faked.Faker(model, 5, 3))
    assert load_weights(model, tmp_path).is_complete
    for name, value in faked.numbered(model).items():
        assert torch.equal(model.get_parameter(name), value)


def change_index(place: Path, change: Any) -> None:
    """Forge an index; the manifest matches it."""
    content = faked.read_index_json(place)
    change(content)
    (place / "index.json").write_text(json.dumps(content))
    manifest = read_manifest(place)
    files = {**manifest.files, "index.json": describe_file(place / "index.json")}
    replace(manifest, files=files).write(place)
    verify_checkpoint(place)


def set_run(column: int, value: int) -> Any:
    def change(content: Any) -> None:
        content["runs"]["opt"][0][column] = value

    return change


FORGED: dict[str, Any] = {
    "no object": lambda c: c.clear(),
    "runs of other types": lambda c: c["runs"].update(opt=[["a"] * 8]),
    "a run of five numbers": lambda c: c["runs"].update(opt=[[0] * 5]),
    "too few ranks": lambda c: c["journals"].pop(),
    "a negative parameter": set_run(0, -1),
    "an unknown parameter": set_run(0, 99),
    "a gap": set_run(1, 3),
    "a huge piece": set_run(2, 2**62),
    "a rank that is not there": set_run(3, 2**40),
    "a huge count": set_run(4, 2**62),
    "another stepped tensor": set_run(5, 4),
    "a place behind the end": set_run(6, 2**40),
    "an unknown form": set_run(7, 9),
    "no runs": lambda c: c["runs"].clear(),
    "a form of other keys": lambda c: c["forms"].update(opt=[{"other": 76}]),
}


@pytest.mark.parametrize("fault", FORGED)
def test_a_forged_index_is_refused(fault: str, tmp_path: Path) -> None:
    model = faked.Model(SHAPES)
    place = faked.save(tmp_path, faked.Faker(model, 3, 3))
    change_index(place, FORGED[fault])
    errors = (CheckpointError, LookupError, TypeError, ValueError)
    with pytest.raises(errors):
        convert(place, 0, 2, 3)
    if fault != "a form of other keys":
        with pytest.raises(CheckpointError):
            load_weights(model, tmp_path)


def test_values_of_a_state_are_read_from_their_own_parts(tmp_path: Path) -> None:
    """A part that cannot be read is told when something of it is needed, and not before."""
    model = faked.Model([(64,)])
    place = faked.save(tmp_path, faked.Faker(model, 4, 3))
    (place / "rank-3.json").unlink()
    parts = SavedRanks(place, read_manifest(place))
    weights = ConsolidatedState(parts.accelerators, parts.index).weights["parts.0"]
    found = [piece.read() for piece in weights.list_pieces(0, 40)]
    assert torch.cat(found).tolist() == list(range(40))
    with pytest.raises(CheckpointError, match=r"rank-3\.json"):
        [piece.read() for piece in weights.list_pieces()]
