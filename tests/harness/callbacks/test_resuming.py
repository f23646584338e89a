from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harness
import tracking
from harness.accelerators.single import SingleDevice
from harness.callbacks import AutoResume, EarlyStopping, ResumeFromCheckpoint
from harness.checkpoint.format import list_checkpoints
from harness.errors import CheckpointError
from harness.fitted import Fitted
from tests.harness.exact import CASES, Case, Stop, TwoParts, rewritten, same_bits


def train(
    *own: Any, case: Case = CASES["augmented"], epochs: int = 2, **options: Any
) -> Fitted:
    return case.learner().fit(
        options.pop("data", None) or case.data(),
        epochs,
        case.valid,
        callbacks=own,
        dataloader_options=case.options,
        **{"tracker": False, "seed": 7, "verbose": False} | options,
    )


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with the checkpoint of a fit that was stopped after eight batches."""
    train(AutoResume(tmp_path / "saved"), Stop("on_train_batch_end", 8))
    return tmp_path / "saved"


def losses(fitted: Fitted) -> list[float]:
    return [row["loss"] for row in fitted.records["metrics"]["train"]]


def assert_same_result(one: Fitted, two: Fitted) -> None:
    """Records of metrics and weights are equal bit for bit."""
    assert one.records["metrics"] == two.records["metrics"]
    for name, value in one.model.state_dict().items():
        assert same_bits(value, two.model.state_dict()[name])


def test_auto_resume_resumes_then_empties_its_folder(saved: Path) -> None:
    assert len(list_checkpoints(saved)) == 1
    fitted = train(AutoResume(saved))
    assert losses(fitted) == losses(train())
    assert list_checkpoints(saved) == []


@pytest.mark.parametrize("stop", [("on_train_batch_end", 4), ("on_valid_batch_end", 1)])
def test_resume_splits_the_data_again_as_the_saved_fit_did(
    stop: tuple[str, int], tmp_path: Path
) -> None:
    x = torch.arange(24.0).reshape(24, 1)
    trained: set[float] = set()

    class See(harness.Callback):
        def on_train_batch_begin(self) -> None:
            trained.update(self.ctx.input.flatten().tolist())

    def fit(seed: int, *own: harness.Callback) -> Fitted:
        torch.manual_seed(seed)
        learner = harness.setup(
            lambda: nn.Linear(1, 1), loss=nn.MSELoss(), optimizer=torch.optim.SGD
        )
        return learner.set_opt_hparams(lr=1e-4).fit(
            (x, 2 * x),
            3,
            0.25,
            callbacks=own,
            dataloader_options={"batch_size": 6},
            accelerator=SingleDevice("cpu"),
            tracker=False,
            verbose=False,
        )

    whole = fit(1)
    fit(1, AutoResume(tmp_path), Stop(*stop), See())
    resumed = fit(2, AutoResume(tmp_path), See())
    assert_same_result(resumed, whole)
    assert len(trained) == 18


def test_resume_from_checkpoint_takes_a_folder_or_one_checkpoint(saved: Path) -> None:
    [place] = list_checkpoints(saved)
    for path in (saved, place):
        assert losses(train(ResumeFromCheckpoint(path))) == losses(train())
    assert list_checkpoints(saved) == [place]


def test_resume_from_checkpoint_skips_damaged_ones_with_a_warning(saved: Path) -> None:
    (saved / "000099-epoch-9-batch-9-step-9").mkdir()
    with pytest.warns(UserWarning, match="skipped a damaged checkpoint: checkpoint"):
        fitted = train(ResumeFromCheckpoint(saved))
    assert losses(fitted) == losses(train())


def test_resume_of_damaged_checkpoints_alone_says_to_begin_anew(saved: Path) -> None:
    for place in list_checkpoints(saved):
        next(place.glob("*.safetensors")).write_bytes(b"")
    match = "got .*, all of them damaged. Train from the beginning"
    with (
        pytest.warns(UserWarning, match="skipped a damaged checkpoint"),
        pytest.raises(CheckpointError, match=match),
    ):
        train(ResumeFromCheckpoint(saved))


def test_resume_without_a_checkpoint_is_refused_unless_it_may_be_missing(
    tmp_path: Path,
) -> None:
    match = "expected an undamaged checkpoint, or .* got .*set missing_ok"
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(CheckpointError, match=match):
            train(ResumeFromCheckpoint(path))
        fitted = train(ResumeFromCheckpoint(path, missing_ok=True))
        assert losses(fitted) == losses(train())


def test_resume_of_the_records_alone_begins_a_new_run_with_them(
    saved: Path, tmp_path: Path
) -> None:
    parts = {"restore_model": False, "restore_optimizers": False}
    tracker = {"runs_dir": tmp_path / "runs", "delivery": False}
    callback = ResumeFromCheckpoint(saved, restore_callbacks=False, **parts)
    train(callback, epochs=1, tracker=tracker)
    [run] = tracking.list_runs(tmp_path / "runs")
    assert run.wide().column("fit").to_pylist() == [1, 2]
    assert run.params["optimizer"] == "SGD"


def test_resume_of_weights_and_optimizers_begins_at_epoch_one(saved: Path) -> None:
    parts = {"restore_records": False, "restore_callbacks": False}
    fitted = train(ResumeFromCheckpoint(saved, **parts))
    assert len(losses(fitted)) == 2
    assert losses(fitted)[0] < losses(train())[0]


def test_resume_of_an_early_stopped_fit_trains_no_further(tmp_path: Path) -> None:
    def own() -> list[harness.Callback]:
        stopping = EarlyStopping("train/loss", patience=1, baseline=-1.0)
        return [stopping, harness.callbacks.ModelCheckpoint(tmp_path)]

    first = train(*own(), epochs=9)
    assert len(losses(first)) == 1
    again = train(*own(), ResumeFromCheckpoint(tmp_path), epochs=9)
    assert losses(again) == losses(first)


def test_resume_of_a_finished_fit_with_more_epochs_continues(tmp_path: Path) -> None:
    train(harness.callbacks.ModelCheckpoint(tmp_path))
    longer = train(ResumeFromCheckpoint(tmp_path), epochs=4)
    assert losses(longer) == losses(train(epochs=4))


# --------------------------------------------------------------- it explains itself


def test_resume_reports_what_is_restored_missing_and_different(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"batch_size": 4, "drop_last": True}
    other = Case(
        learner=lambda: CASES["augmented"].learner().set_opt_hparams(lr=0.5),
        data=CASES["augmented"].data,
        options=options,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "__version__", "0.0.1")
        train(
            EarlyStopping("train/loss"),
            ResumeFromCheckpoint(saved),
            case=other,
            verbose=True,
        )
    report = " ".join(capsys.readouterr().err.split())
    assert (
        "resumed from 000002-epoch-2-batch-2-step-8: epoch 2, batch 2, step 8" in report
    )
    assert "opt_hparams differs saved \"{'lr': 0.05, 'momentum': 0.9}\", now" in report
    assert "torch differs" in report
    assert "now '0.0.1'" in report
    assert "callbacks missing EarlyStopping is new and has no saved state" in report
    assert "callbacks missing AutoResume was saved, but this fit has none" in report
    for part in ("model", "optimizers", "records", "callbacks", "random generators"):
        assert f"{part} restored" in report
    assert "loader position restored 2 batches done" in report


@pytest.mark.parametrize("change", ["opt_hparams", "data"])
def test_strict_resume_refuses_differences_before_the_run_is_touched(
    change: str, tmp_path: Path
) -> None:
    case = CASES["adam-onecycle-metrics"]
    tracker = {"runs_dir": tmp_path / "runs", "delivery": False}
    stop = Stop("on_train_batch_end", 8)
    train(AutoResume(tmp_path / "saved"), stop, case=case, tracker=tracker)
    [run] = tracking.list_runs(tmp_path / "runs")
    before = run.records(superseded=True), run.manifest
    data = case.data()
    other = case
    if change == "data":
        data = (data[0] + 1e-6, data[1])
    else:
        other = Case(learner=lambda: case.learner().set_opt_hparams(lr=0.5))
    strict = ResumeFromCheckpoint(tmp_path / "saved", strict=True)
    match = rf"strict: expected no difference, got {change}: .*Undo the change, or drop strict"
    with pytest.raises(CheckpointError, match=match):
        train(strict, case=other, data=data, tracker=tracker)
    assert (run.records(superseded=True), run.manifest) == before
    assert train(strict, case=case, tracker=tracker).run_id == run.id


@pytest.mark.parametrize(
    ("learner", "match"),
    [
        (
            lambda: harness.setup(TwoParts, loss=nn.CrossEntropyLoss()),
            r"expected the optimizers \{'body': .*, 'head': .*\}, got \{'opt'",
        ),
        (
            lambda: harness.setup(
                lambda: nn.Linear(4, 3),
                loss=nn.CrossEntropyLoss(),
                optimizer=torch.optim.SGD,
            ).set_opt_hparams(lr=0.1),
            r"expected the tensor 'bias' of shape \(3,\), got none",
        ),
    ],
)
def test_resume_with_another_model_is_refused_before_the_run_is_touched(
    learner: Any, match: str, saved: Path, tmp_path: Path
) -> None:
    tracker = {"runs_dir": tmp_path / "runs", "delivery": False}
    other = Case(learner=learner, data=CASES["augmented"].data)
    with pytest.raises(CheckpointError, match=match):
        train(ResumeFromCheckpoint(saved), case=other, tracker=tracker)
    assert tracking.list_runs(tmp_path / "runs") == []


def test_resume_of_something_else_that_is_whole_is_refused(saved: Path) -> None:
    rewritten(saved, lambda state: state.pop("random"))
    with pytest.raises(
        CheckpointError, match="expected the state of a fit, got one without"
    ):
        train(ResumeFromCheckpoint(saved))


# ------------------------------------------------------- nothing is lost at the end


class FailsToGather(SingleDevice):
    """Cannot gather the weights at the end of a fit, as when memory runs out."""

    def finish(self, *, failed: bool = False, keep: bool = True) -> None:
        super().finish(failed=failed, keep=keep)
        if not failed:
            raise MemoryError("no room for the weights")


class At(harness.Callback):
    """Calls a function after the fit, before `AutoResume` acts."""

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def after_fit(self) -> None:
        self._function()


class CountBatches(harness.Callback):
    count = 0

    def on_train_batch_end(self) -> None:
        self.count += 1


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("every_n_epochs", [1, 2])
def test_auto_resume_keeps_its_checkpoints_when_gathering_the_weights_fails(
    every_n_epochs: int, tmp_path: Path
) -> None:
    options = {"every_n_epochs": every_n_epochs}
    with pytest.raises(MemoryError, match="no room for the weights"):
        train(
            AutoResume(tmp_path, **options), accelerator=FailsToGather("cpu"), epochs=3
        )
    assert len(list_checkpoints(tmp_path)) == 1
    count = CountBatches()
    fitted = train(AutoResume(tmp_path, **options), count, epochs=3)
    assert count.count == (0 if every_n_epochs == 1 else 6)
    assert_same_result(fitted, train(epochs=3))
    assert list_checkpoints(tmp_path) == []


def test_auto_resume_of_a_fit_killed_before_its_folder_was_emptied_returns_the_result(
    tmp_path: Path,
) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(AutoResume(tmp_path), At(interrupt))
    count = CountBatches()
    fitted = train(AutoResume(tmp_path), count)
    assert count.count == 0
    assert_same_result(fitted, train())
    assert list_checkpoints(tmp_path) == []


def test_auto_resume_sees_its_folder_full_until_the_result_exists(
    tmp_path: Path,
) -> None:
    seen: list[int] = []
    callback = AutoResume(tmp_path, every_n_steps=1, keep_last=3)
    train(callback, At(lambda: seen.append(len(list_checkpoints(tmp_path)))))
    assert seen == [3]
    assert list_checkpoints(tmp_path) == []


def test_fit_whose_folder_cannot_be_emptied_warns_and_returns_the_result(
    tmp_path: Path,
) -> None:
    def block_removal() -> None:
        [place] = list_checkpoints(tmp_path)
        (tmp_path / f".{place.name}.removed").write_text("in the way")

    with pytest.warns(UserWarning, match="The result is complete"):
        fitted = train(AutoResume(tmp_path), At(block_removal))
    assert_same_result(fitted, train())
