"""A checkpoint goes on on another number of ranks; each sample is seen once."""

from __future__ import annotations

import copy
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.classification import multiclass_auroc

import tracking
from harness.accelerators.single import SingleDevice
from harness.checkpoint.format import (
    Position,
    begin_checkpoint,
    commit_checkpoint,
    read_manifest,
    read_rank,
    write_rank,
)
from harness.errors import CheckpointError
from harness.pytree import flatten
from harness.reshard.consolidated import ConsolidatedState, TensorPieces
from tests.harness.accelerators.cases import Lab
from tests.harness.accelerators.launches import run_cases
from tests.harness.checkpoint.newest import find_newest
from tests.harness.reshard import cases as reshapes
from tests.harness.reshard.cases import ROWS, Y

MODULE = "tests.harness.reshard.cases"


STAGES = [0, 1, 2, 3]

BEFORE: dict[int, int | None] = {0: None, 1: None, 2: 3, 3: 1}
"""How one process trained what two ranks go on with, by their stage; None is one device."""

AFTER: dict[int, int | None] = {0: None, 1: 2, 2: None, 3: None}
"""How one process goes on with what two ranks trained, by their stage."""


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of fits on two ranks, some of which went on from a fit of one process."""
    folder = tmp_path_factory.mktemp("reshapes")
    for stage, before in BEFORE.items():
        own = folder / f"gone_on-{stage}"
        own.mkdir()
        _, look = reshapes.fit(own, Lab(stage=before, folder=own).make(), 8, after=3)
        reshapes.note(own, "one", None, look, 0)
    said = run_cases(folder, MODULE, 2, STAGES, reshapes.PAIRS)
    assert set(said.values()) == {"ok"}, said
    return folder


def check_broken_epoch(first: list[Any], last: list[Any]) -> None:
    """Each row once, and the metrics of the epoch are those of all that was seen."""
    seen = torch.cat([part["seen-1"] for part in first + last])
    rows = seen[:, 0].long()
    assert rows.sort().values.tolist() == list(range(ROWS))
    pred, target = seen[:, 1:], Y[rows]
    loss = torch.nn.functional.cross_entropy(pred, target)
    for part in last:
        assert float(part["loss-1"]) == pytest.approx(float(loss), rel=1e-5)
        accuracy = (pred.argmax(1) == target).float().mean()
        assert float(part["accuracy-1"]) == pytest.approx(float(accuracy))
        auroc = multiclass_auroc(pred.softmax(1), target, num_classes=3)
        assert float(part["auroc-1"]) == pytest.approx(float(auroc), abs=1e-6)


def check_weights(found: Any, wanted: Any) -> None:
    for name in reshapes.Net().state_dict():
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


def parts(folder: Path, name: str, ranks: int) -> list[Any]:
    found = []
    for rank in range(ranks):
        found.append(load_file(folder / f"{name}-{rank}.safetensors"))
    return found


def until(part: Any, rows: int) -> Any:
    """What a fit saw before its last checkpoint."""
    return {"seen-1": part["seen-1"][:rows]}


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_as_one_process(stage: int, launch: Path) -> None:
    own = launch / f"broken-{stage}"
    accelerator = Lab(stage=AFTER[stage], folder=own).make()
    fitted, look = reshapes.fit(own, accelerator, 8)
    reshapes.note(own, "rest", fitted, look, 0)
    before = [until(part, 8) for part in parts(own, "broken", 2)]
    last = parts(own, "rest", 1)
    check_broken_epoch(before, last)
    check_weights(last[0], parts(launch / "whole-0", "whole", 2)[0])
    (run,) = tracking.list_runs(own / "runs")
    assert run.status == "finished"
    # The third batch came after the checkpoint: it is superseded on either rank.
    for rank, batches in ((0, 2 + 4 + 6), (1, 2)):
        assert run.records(what="looked", rank=rank).num_rows == batches


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_one_process_goes_on_as_two_ranks(stage: int, launch: Path) -> None:
    own = launch / f"gone_on-{stage}"
    last = parts(own, "gone_on", 2)
    check_broken_epoch([until(parts(own, "one", 1)[0], 16)], last)
    check_weights(last[0], parts(launch / "whole-0", "whole", 2)[0])


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
def test_two_ranks_go_on_at_another_stage(stage: int, launch: Path) -> None:
    own = launch / f"other_stage-{stage}"
    last = parts(own, "last", 2)
    check_broken_epoch([until(part, 8) for part in parts(own, "first", 2)], last)
    check_weights(last[0], parts(launch / "whole-0", "whole", 2)[0])


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_go_on_as_three(tmp_path: Path) -> None:
    assert run_cases(tmp_path, MODULE, 2, [3], ["two"]) == {"two-3": "ok"}
    (tmp_path / "two-3").rename(tmp_path / "three-1")
    assert run_cases(tmp_path, MODULE, 3, [1], ["three"]) == {"three-1": "ok"}
    before = [until(part, 12) for part in parts(tmp_path / "three-1", "two", 2)]
    last = parts(tmp_path / "three-1", "three", 3)
    check_broken_epoch(before, last)
    whole, _ = reshapes.fit(tmp_path / "whole", SingleDevice("cpu"), 12)
    check_weights(last[0], whole.model.state_dict())


BF16: Any = {"bf16": {"enabled": True}}
SMALL: Any = {"zero_optimization": {"sub_group_size": 8}}
OFFLOAD: Any = {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}

FORMS: dict[str, tuple[int | None, Any]] = {
    "device": (None, {}),
    "stage 1": (1, {}),
    "stage 3": (3, {}),
    "stage 2 bf16": (2, BF16),
    "stage 0": (0, {}),
    "stage 0 bf16": (0, BF16),
    "stage 1 bf16": (1, BF16),
    "stage 2": (2, {}),
    "stage 1 offload": (1, OFFLOAD),
    "stage 3 bf16": (3, BF16),
    "stage 3 small": (3, SMALL),
}
"""ZeRO stage and config; some step many parameters at once, some a part of one."""


def made(form: str, folder: Path) -> Any:
    stage, config = FORMS[form]
    return Lab(stage=stage, folder=folder).make(**config)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("unbroken")
    fitted, _ = reshapes.fit(folder, SingleDevice("cpu"), 8)
    return fitted.model.state_dict()


@pytest.mark.parametrize(
    "step", [1, pytest.param(-1, marks=pytest.mark.slow)], ids=["on", "back"]
)
@pytest.mark.parametrize("first", list(FORMS))
def test_every_form_goes_on_in_another(
    first: str, step: int, unbroken: Any, saved: Any, tmp_path: Path
) -> None:
    names = list(FORMS)
    last = names[(names.index(first) + step) % len(names)]
    shutil.copytree(saved(first), tmp_path, dirs_exist_ok=True)
    then = whole_of(saved(first))
    fitted, look = reshapes.fit(tmp_path, made(last, tmp_path), 8)
    assert len(look.seen[1]) == 4
    check_same(look.begun, then)
    in_full = "bf16" not in first + last
    for name, value in unbroken.items():
        found = fitted.model.state_dict()[name]
        torch.testing.assert_close(found, value, rtol=0, atol=0 if in_full else 2e-2)


def check_same(found: ConsolidatedState | None, saved: ConsolidatedState) -> None:
    """Each bit of weights and optimizer states is the one that was saved."""
    assert found is not None
    for name, want in {**saved.weights, **saved.buffers}.items():
        have, want = flat({**found.weights, **found.buffers}[name]), flat(want)
        # Engines in bf16 keep no more of what nobody trains.
        dtype = torch.bfloat16 if name.startswith("fixed") else torch.float32
        assert torch.equal(have.to(dtype), want.to(dtype)), name
    for opt, by_param in saved.entries.items():
        for name, entry in by_param.items():
            live = found.entries[opt].get(name, {})
            assert live.keys() == entry.keys()
            for key in entry:
                assert torch.equal(flat(live[key]), flat(entry[key])), (opt, name, key)
        # ZeRO 1 to 3 leave out a group that is frozen as a whole.
        groups = (
            [own for own in of.groups[opt] if "fixed.bias" not in own[1]]
            for of in (saved, found)
        )
        assert next(groups) == next(groups)


def flat(value: Any) -> Tensor:
    if not isinstance(value, TensorPieces):
        return torch.as_tensor(value)
    pieces = [piece.read() for piece in value.list_pieces()]
    return torch.cat(pieces).reshape(value.shape)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of fits of each form that were broken off."""
    done: dict[str, Path] = {}

    def get(form: str) -> Path:
        if form not in done:
            done[form] = tmp_path_factory.mktemp("saved")
            reshapes.fit(done[form], made(form, done[form]), 8, after=3)
        return done[form]

    return get


def whole_of(folder: Path) -> ConsolidatedState:
    place, _ = find_newest(folder / "saved")
    assert place is not None
    return ConsolidatedState([read_rank(place, 0)["accelerator"]])


PARTS: list[Any] = [("device", "stage 1"), ("stage 3", "stage 3")]
PARTS += [
    pytest.param(*pair, marks=pytest.mark.slow)
    for pair in (
        ("stage 1", "stage 1"),
        ("stage 1 bf16", "stage 1 bf16"),
        ("stage 3", "device"),
    )
]


@pytest.mark.parametrize(("first", "last"), PARTS)
def test_model_or_optimizers_alone_are_taken(first: str, last: str, saved: Any) -> None:
    then = whole_of(saved(first))
    accelerator = made(last, saved(first))
    model = reshapes.begun(saved(first), accelerator, restore_optimizers=False)
    assert torch.equal(*(flat(of.weights["head.weight"]) for of in (then, model)))
    assert not any(model.entries["head"].values())
    opts = reshapes.begun(saved(first), accelerator, restore_model=False)
    assert not torch.equal(*(flat(of.weights["head.weight"]) for of in (then, opts)))
    moments = (
        of.entries["head"]["head.weight"]["momentum_buffer"] for of in (then, opts)
    )
    assert torch.equal(*map(flat, moments))


class Turned(reshapes.Net):
    """As many numbers in another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed.weight = nn.Parameter(torch.zeros(2, 8), requires_grad=False)


class Counting(reshapes.Net):
    """One more buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("more", torch.zeros(2))


class Stepped(reshapes.Net):
    """Another kind of optimizer for a part."""

    def set_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        head = torch.optim.RMSprop(self.head.parameters())
        return {**super().set_optimizers(), "head": head}


OTHERS = {
    Turned: "'fixed.weight' of shape (2, 8), got (4, 4)",
    Counting: "'more' of shape (2,), got none",
    Stepped: "'head': 'RMSprop'}, got {'body': 'AdamW', 'head': 'SGD'}",
}


@pytest.mark.parametrize(("first", "last"), PARTS)
@pytest.mark.parametrize("other", list(OTHERS))
def test_another_model_or_optimizer_is_refused(
    other: Any, first: str, last: str, saved: Any
) -> None:
    with pytest.raises(CheckpointError, match=re.escape(OTHERS[other])):
        reshapes.begun(saved(first), made(last, saved(first)), other)


def test_scheduler_of_the_config_that_was_not_there_is_refused(saved: Any) -> None:
    params = {"warmup_num_steps": 8, "warmup_type": "linear"}
    scheduler = {"type": "WarmupLR", "params": params}
    folder = saved("stage 1")
    with pytest.raises(CheckpointError, match=r"for \['body', 'head'\], got \[\]"):
        reshapes.begun(folder, Lab(stage=1, folder=folder).make(scheduler=scheduler))


COLUMNS = ["stepped", "param", "at", "start", "length"]
SPOILT = [(name, value) for name in COLUMNS for value in (-1, 2**62)]


@pytest.mark.parametrize(("column", "value"), [*SPOILT, ("length", 5), ("start", 3)])
@pytest.mark.parametrize(
    "first",
    [
        "stage 1",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("device", "stage 3")),
    ],
)
def test_forged_layout_is_refused(
    first: str, column: str, value: int, saved: Any, tmp_path: Path
) -> None:
    place, _ = find_newest(saved(first) / "saved")
    assert place is not None
    state = copy.deepcopy(read_rank(place, 0))
    state["accelerator"]["layouts"]["body"][-1, COLUMNS.index(column)] = value
    temporary = begin_checkpoint(
        tmp_path / "saved", Position(epoch=1, iter=2, step=2, phase="train")
    )
    write_rank(temporary, 0, *flatten(state))
    commit_checkpoint(temporary, read_manifest(place))
    with pytest.raises(CheckpointError, match="Take another checkpoint"):
        reshapes.begun(tmp_path, made("stage 2", tmp_path))


SIZES = [(("stage 0", "device"), 6, 3, 2), (("device", "device"), 8, 4, 1)]
SIZES += [(("stage 3", "stage 3"), 8, 4, 1)]


@pytest.mark.parametrize(("forms", "then", "now", "accumulate"), SIZES)
def test_other_batch_size_goes_on_where_samples_fill_whole_steps(
    forms: tuple[str, str], then: int, now: int, accumulate: int, tmp_path: Path
) -> None:
    _, before = reshapes.fit(tmp_path, made(forms[0], tmp_path), then, after=3)
    stage, _ = FORMS[forms[1]]
    accelerator = Lab(stage=stage, folder=tmp_path).make(accumulate)
    fitted, look = reshapes.fit(tmp_path, accelerator, now)
    rows = torch.cat([*before.seen[1][:2], *look.seen[1]])[:, 0]
    assert rows.long().sort().values.tolist() == list(range(ROWS))
    assert len(fitted.records["metrics"]["train"]) == 2


REFUSED = {
    "odd": (0, None, 1, 5, "got 2 batches of 8"),
    "window": (3, None, 3, 4, "got 2 batches of 8"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_go_on_is_refused(name: str, tmp_path: Path) -> None:
    before, now, accumulate, batch_size, match = REFUSED[name]
    reshapes.fit(tmp_path, Lab(stage=before, folder=tmp_path).make(), 8, after=3)
    accelerator = Lab(stage=now, folder=tmp_path).make(accumulate)
    with pytest.raises(CheckpointError, match=match):
        reshapes.fit(tmp_path, accelerator, batch_size)
