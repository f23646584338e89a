from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from harness.callbacks import AutoResume, ResumeFromCheckpoint
from harness.checkpoint.format import (
    Manifest,
    Position,
    RunRef,
    begin_checkpoint,
    commit_checkpoint,
    write_rank,
)
from harness.checkpoint.full_weights.export import export_weights
from harness.checkpoint.weights import (
    SavedModel,
    load_weights,
    read_saved_model,
    save_weights,
    write_saved_model,
)
from harness.errors import CheckpointError
from harness.fitted import Fitted
from harness.pytree import flatten
from tests.harness.checkpoint.newest import find_newest
from tests.harness.exact import CASES, Net, Stop, same_bits


class Tied(nn.Module):
    """Two names for one weight, and a buffer that a state dict leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("cache", torch.ones(2), persistent=False)


def same(one: nn.Module, two: nn.Module) -> bool:
    first, second = one.state_dict(), two.state_dict()
    return all(same_bits(first[name], second[name]) for name in first)


def fitted(tmp_path: Path, *own: Any, name: str = "augmented") -> Fitted:
    case = CASES[name]
    return case.learner().fit(
        case.data(),
        1,
        callbacks=[*case.callbacks(tmp_path), *own],
        dataloader_options=case.options,
        tracker=False,
        verbose=False,
    )


@pytest.mark.parametrize("module", [Net, Tied])
def test_load_weights_reads_what_save_weights_wrote(
    module: Any, tmp_path: Path
) -> None:
    one, two = module(), module()
    save_weights(one, tmp_path / "sub" / "w.safetensors")
    assert not same(one, two)
    report = load_weights(two, tmp_path / "sub" / "w.safetensors")
    assert same(one, two)
    assert report.is_complete
    assert set(report.loaded) == set(one.state_dict())


def test_load_weights_that_differ_are_refused_and_nothing_is_changed(
    tmp_path: Path,
) -> None:
    path, model, before = tmp_path / "w.safetensors", Net(), Net()
    state = {"head.bias": torch.ones(3), "head.weight": torch.ones(2, 2)}
    save_file(state | {"tail": torch.ones(1)}, path)
    before.load_state_dict(model.state_dict())
    match = r"1 loaded; missing: body.*; unexpected: tail; mismatched: head\.weight"
    with pytest.raises(CheckpointError, match=match):
        load_weights(model, path)
    assert same(model, before)
    report = load_weights(model, path, strict=False)
    assert report.loaded == ("head.bias",)
    assert report.unexpected == ("tail",)
    assert report.mismatched == ("head.weight",)
    assert len(report.missing) == 7
    assert torch.equal(model.head.bias, torch.ones(3))
    assert torch.equal(model.head.weight, before.head.weight)


@pytest.mark.parametrize("content", [None, b"", b"no weights at all"])
def test_load_weights_without_weights_is_refused(
    content: bytes | None, tmp_path: Path
) -> None:
    path = tmp_path / "w"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match="expected weights, got"):
        load_weights(Net(), path)


def test_fitted_weights_go_round_by_file_saved_model_and_checkpoint(
    tmp_path: Path,
) -> None:
    stop = Stop("on_train_batch_end", 6)
    first = fitted(tmp_path, AutoResume(tmp_path / "saved"), stop)
    first.save_weights(tmp_path / "w.safetensors")
    first.save(tmp_path / "model")
    place, _ = find_newest(tmp_path / "saved")
    assert place is not None
    exported = tmp_path / "new" / "folder" / "w.safetensors"
    for _ in range(2):  # the second replaces the first
        export_weights(place, exported)
    for path in (tmp_path / "w.safetensors", tmp_path / "model", place, exported):
        second = fitted(tmp_path)
        assert not same(first.model, second.model)
        assert second.load_weights(path).is_complete
        assert same(first.model, second.model)


def checkpoint_of_ranks(folder: Path, states: list[dict[str, Any]]) -> Path:
    """A checkpoint of several ranks, with states like those of the DeepSpeed accelerator."""
    position = Position(epoch=1, iter=1, step=1, phase="train")
    temporary = begin_checkpoint(folder, position)
    for rank, state in enumerate(states):
        plan, tensors = flatten({"accelerator": state})
        write_rank(temporary, rank, plan, tensors)
    return commit_checkpoint(
        temporary,
        Manifest(world_size=len(states), position=position, run=RunRef(), about={}),
    )


@pytest.mark.parametrize("is_divided", [False, True], ids=["shared", "divided"])
def test_load_weights_of_a_checkpoint_of_three_ranks_are_complete(
    is_divided: bool, tmp_path: Path
) -> None:
    model = Net()
    weights = {name: param.detach() for name, param in model.named_parameters()}
    buffers = dict(model.named_buffers())
    states = []
    for rank in range(3):
        parts = {name: part(value, rank) for name, value in weights.items()}
        own: dict[str, Any] = {"buffers": buffers, "optimizers": {}}
        shared: dict[str, Any] = {}
        if is_divided:
            own["weights"] = parts
        elif rank == 0:
            shared["weights"] = weights
        shapes = {name: list(value.shape) for name, value in weights.items()}
        states.append({"shared": shared, "own": own, "shapes": shapes})
    place = checkpoint_of_ranks(tmp_path, states)
    other = Net()
    assert load_weights(other, place).is_complete
    assert same(model, other)


def part(value: Tensor, rank: int) -> Tensor:
    """A third of the numbers, the last third padded: ZeRO 3."""
    flat = torch.cat([value.reshape(-1), torch.zeros(-value.numel() % 3)])
    return flat.chunk(3)[rank].clone()


def test_fit_begins_with_the_weights_of_a_checkpoint_of_other_ranks(
    tmp_path: Path,
) -> None:
    model = Net()
    state = {
        "shared": {"weights": dict(model.named_parameters())},
        "own": {"buffers": dict(model.named_buffers())},
    }
    place = checkpoint_of_ranks(tmp_path / "saved", [state, {"shared": {}, "own": {}}])
    with pytest.raises(CheckpointError, match="expected the state of a fit"):
        fitted(tmp_path, ResumeFromCheckpoint(place))
    weights_only = ResumeFromCheckpoint(
        tmp_path / "saved",
        restore_optimizers=False,
        restore_records=False,
        restore_callbacks=False,
    )
    seen: list[nn.Module] = []

    class Look(Stop):
        def on_fit_begin(self) -> None:
            other = Net()
            other.load_state_dict(self.ctx.model.state_dict())
            seen.append(other)

    result = fitted(tmp_path, weights_only, Look(None, 1))
    assert same(seen[0], model)
    assert len(result.records["metrics"]["train"]) == 1


class KeepsExtra(nn.Module):
    """Keeps tensors as extra state, exactly as they come."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)
        self.extra = {"a" * n: torch.ones(5) for n in range(1, 9)}

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_extra_state_of_a_saved_model_owns_aligned_storage(tmp_path):
    model = KeepsExtra()
    about = SavedModel(module="", hparams={}, opt_hparams={}, records={})
    write_saved_model(tmp_path / "saved", model.state_dict(), about)
    weights, _ = read_saved_model(tmp_path / "saved")
    model.load_state_dict(weights)
    found = list(model.extra.values())
    assert len(found) == 8
    assert {tensor.data_ptr() % 64 for tensor in found} == {0}
    assert all(t.untyped_storage().nbytes() == 5 * 4 for t in found)
