"""Where the weights are after a fit, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from harness import setup
from harness.callbacks import AutoResume, ModelCheckpoint
from harness.checkpoint.format import list_checkpoints
from harness.checkpoint.full_weights.export import find_weights
from tests.harness.accelerators.best import CASES
from tests.harness.accelerators.cases import Lab
from tests.harness.accelerators.launches import Launches
from tests.harness.accelerators.whole import fitted, learner, same_weights
from tests.harness.fakes import At

MODULE = "tests.harness.accelerators.best"

STAGES = [0, 1, 3]

OF_ONE = [name for name in CASES if "rank" not in name]
"""Cases that say something of one process too."""


@pytest.mark.parametrize("name", OF_ONE)
def test_weights_one_rank(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    CASES[name](Lab(stage=None, folder=tmp_path))


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs all cases at all stages in one launch."""
    return Launches(tmp_path_factory.mktemp("whole"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_weights_two_ranks(name: str, stage: int, on_ranks: Launches) -> None:
    said = on_ranks.said(2, STAGES, [*CASES], name, stage)
    assert said == "ok", said


@pytest.mark.parametrize(
    ("gather", "kind", "match"),
    [
        ("no", TypeError, r"fit\(gather\): expected .*got 'no'"),
        (-1, ValueError, r"fit\(gather\): expected .*got -1"),
        (
            False,
            ValueError,
            r"fit\(gather=False\): expected a place for the final checkpoint of a model of"
            r" .* got a fit without a run. Add ModelCheckpoint\(path\)",
        ),
    ],
)
def test_gather_is_checked_before_the_first_epoch(
    gather: object, kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        fitted(Lab(stage=None, folder=Path()), gather=gather)


def test_final_checkpoint_of_a_tracked_fit_is_in_the_folder_of_its_run(
    tmp_path: Path,
) -> None:
    tracker = {"runs_dir": tmp_path, "delivery": False}
    lab = Lab(stage=None, folder=tmp_path)
    found = fitted(lab, made=learner(width=8), gather=False, tracker=tracker)
    assert found.checkpoint is not None
    assert found.run_path is not None
    assert found.checkpoint.parent == found.run_path / "checkpoints" / "final"
    assert find_weights(found.run_path) == found.checkpoint


def test_checkpoints_are_found_after_a_change_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(tmp_path)
    lab, made = Lab(stage=None, folder=tmp_path), learner(width=8)
    leave = At("on_train_begin", lambda _: monkeypatch.chdir(elsewhere))
    saves = ModelCheckpoint("saves")
    found = fitted(lab, leave, saves, made=made, gather=False)
    assert len(list_checkpoints(tmp_path / "saves")) == 1
    monkeypatch.chdir(elsewhere)
    assert same_weights(found.gather(), fitted(lab, made=made).model)


def test_auto_resume_leaves_the_final_checkpoint(tmp_path: Path) -> None:
    lab = Lab(stage=None, folder=tmp_path)
    made = learner(width=8)
    found = fitted(lab, AutoResume(tmp_path), made=made, gather=False)
    assert list_checkpoints(tmp_path) == []
    whole = fitted(lab, made=made)
    assert same_weights(found.gather(), whole.model)


class Odd(nn.Linear):
    """A module with a state that no file can hold."""

    def get_extra_state(self) -> object:
        return object()

    def set_extra_state(self, state: object) -> None:
        """Take nothing back."""


def test_weights_are_not_lost_with_a_state_that_cannot_be_saved(tmp_path: Path) -> None:
    made = setup(Odd, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    made = made.set_hparams(in_features=2, out_features=1).set_opt_hparams(lr=0.1)
    saves = ModelCheckpoint(tmp_path, every_n_epochs=0)
    options = {"tracker": False, "verbose": False, "gather": False}
    rows = torch.randn(4, 2), torch.randn(4, 1)
    with pytest.warns(UserWarning, match="final checkpoint, got state/extra"):
        found = made.fit(rows, 1, callbacks=[saves], **options)  # type: ignore[arg-type]
    assert found.checkpoint is None
    assert found.model.weight.shape == (1, 2)
