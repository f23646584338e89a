"""A checkpoint goes on on another number of ranks; each sample is seen once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torchmetrics.functional.classification import multiclass_auroc

import tracking
from harness.accelerator import SingleDevice
from harness.errors import CheckpointError
from tests.harness.accelerator import reshapes
from tests.harness.accelerator.cases import Lab
from tests.harness.accelerator.launches import run_cases
from tests.harness.accelerator.reshapes import ROWS, Y

MODULE = "tests.harness.accelerator.reshapes"


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of fits on two ranks, one of which went on from a fit of one process."""
    folder = tmp_path_factory.mktemp("reshapes")
    own = folder / "gone_on-0"
    own.mkdir()
    _, look = reshapes.fit(own, SingleDevice("cpu"), 8, after=3)
    reshapes.note(own, "one", None, look, 0)
    names = list(reshapes.CASES)
    said = run_cases(folder, MODULE, 2, [0], names)
    assert said == {f"{name}-0": "ok" for name in names}
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
def test_two_ranks_go_on_as_one_process(launch: Path) -> None:
    own = launch / "broken-0"
    fitted, look = reshapes.fit(own, SingleDevice("cpu"), 8)
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
def test_one_process_goes_on_as_two_ranks(launch: Path) -> None:
    own = launch / "gone_on-0"
    last = parts(own, "gone_on", 2)
    check_broken_epoch([until(parts(own, "one", 1)[0], 16)], last)
    check_weights(last[0], parts(launch / "whole-0", "whole", 2)[0])


@pytest.mark.parametrize("forms", [(None, 0), (0, None)], ids=["to", "from"])
def test_one_device_and_an_engine_take_each_others_checkpoints(
    forms: tuple[int | None, int | None], tmp_path: Path
) -> None:
    first, last = (Lab(stage=stage, folder=tmp_path).make() for stage in forms)
    whole, _ = reshapes.fit(tmp_path / "whole", SingleDevice("cpu"), 8)
    reshapes.fit(tmp_path, first, 8, after=3)
    found, look = reshapes.fit(tmp_path, last, 8)
    assert len(look.seen[1]) == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[name], value), name


def test_other_batch_size_goes_on_where_samples_fill_whole_steps(
    tmp_path: Path,
) -> None:
    _, before = reshapes.fit(tmp_path, Lab(stage=0, folder=tmp_path).make(), 6, after=3)
    fitted, look = reshapes.fit(tmp_path, SingleDevice("cpu", accumulate=2), 3)
    rows = torch.cat([*before.seen[1][:2], *look.seen[1]])[:, 0]
    assert rows.long().sort().values.tolist() == list(range(ROWS))
    assert len(fitted.records["metrics"]["train"]) == 2


REFUSED = {
    "divided": (2, None, 1, 8, "got stage 2 where it was saved"),
    "to be divided": (None, 2, 1, 8, "got stage 2 where it is"),
    "another stage": (0, 2, 1, 8, "got stage 2 where it is"),
    "odd": (0, None, 1, 5, "got 2 batches of 8"),
    "window": (0, None, 3, 8, "got 2 batches of 8"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_cannot_go_on_is_refused(name: str, tmp_path: Path) -> None:
    before, now, accumulate, batch_size, match = REFUSED[name]
    reshapes.fit(tmp_path, Lab(stage=before, folder=tmp_path).make(), 8, after=3)
    accelerator = Lab(stage=now, folder=tmp_path).make(accumulate)
    with pytest.raises(CheckpointError, match=match):
        reshapes.fit(tmp_path, accelerator, batch_size)
