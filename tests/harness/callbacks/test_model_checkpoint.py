from __future__ import annotations

import math
import os
import signal
import threading
import time
import warnings
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import harness
import tracking
from harness.accelerators.single import SingleDevice
from harness.callbacks import Interrupt, KeepBestModel, ModelCheckpoint
from harness.checkpoint.format import (
    RunRef,
    list_checkpoints,
    read_rank,
    verify_checkpoint,
)
from harness.fitted import Fitted
from tests.harness.checkpoint.newest import find_newest
from tests.harness.exact import CASES, Case, Stop, sgd
from tests.harness.fakes import At, Tape, line_learner, slope


def train(
    *own: Any, epochs: int = 2, case: Case = CASES["augmented"], **options: Any
) -> Fitted:
    return case.learner().fit(
        case.data(),
        epochs,
        case.valid,
        callbacks=own,
        dataloader_options=case.options,
        verbose=False,
        **{"tracker": False, "seed": 7} | options,
    )


@pytest.mark.parametrize("fails", [False, True])
def test_memory_of_the_copies_is_given_back(tmp_path, fails):
    def end(ctx):
        held.append(bool(saves.writer._copies))
        if fails:
            raise LookupError

    held, saves = [], ModelCheckpoint(tmp_path, every_n_steps=1)
    ending = pytest.raises(LookupError) if fails else nullcontext()
    with ending:
        line_learner().fit(
            *(slope(4), 1),
            callbacks=[saves, At("on_train_end", end)],
            tracker=False,
            verbose=False,
        )
    assert held == [True]
    assert not saves.writer._copies


def steps(folder: Path) -> list[int]:
    return [
        verify_checkpoint(place).position.step for place in list_checkpoints(folder)
    ]


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({}, [12]),
        ({"keep_last": 5}, [12, 6]),
        ({"keep_last": 5, "every_n_epochs": 2}, [12]),
        ({"keep_last": 9, "every_n_steps": 4}, [12, 12, 8, 6, 4]),
        ({"keep_last": 2, "every_n_steps": 4, "every_n_epochs": 0}, [12, 8]),
        (
            {"keep_last": 99, "every_n_minutes": 1e-9, "every_n_epochs": 0},
            [*range(12, 0, -1)],
        ),
        ({"keep_last": 99, "every_n_minutes": 60.0, "every_n_epochs": 0}, []),
    ],
)
def test_model_checkpoint_saves_when_it_is_time_and_keeps_the_newest(
    options: dict[str, Any], found: list[int], tmp_path: Path
) -> None:
    train(ModelCheckpoint(tmp_path, **options))
    assert steps(tmp_path) == found


def test_model_checkpoint_keeps_the_best_epochs_beside_the_last(tmp_path: Path) -> None:
    saves = ModelCheckpoint(tmp_path, keep_best=2, monitor="train/loss", mode="max")
    fitted = train(saves, epochs=5)
    losses = [row["loss"] for row in fitted.records["metrics"]["train"]]
    best = sorted(range(5), key=lambda n: -losses[n])[:2]
    kept = {
        verify_checkpoint(place).position.epoch for place in list_checkpoints(tmp_path)
    }
    assert kept == {5, *(n + 1 for n in best)}


def test_model_checkpoint_without_a_path_saves_in_the_run(tmp_path: Path) -> None:
    tracker = {"runs_dir": tmp_path, "delivery": False}
    fitted = train(ModelCheckpoint(), tracker=tracker)
    assert fitted.run_path is not None
    place, _ = find_newest(fitted.run_path / "checkpoints")
    assert place is not None
    assert verify_checkpoint(place).run == RunRef(
        id=fitted.run_id, path=str(fitted.run_path)
    )


def test_model_checkpoint_without_path_or_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ModelCheckpoint\(path\): expected a folder"):
        train(ModelCheckpoint())


@pytest.mark.parametrize(
    "option", ["every_n_epochs", "every_n_steps", "keep_last", "keep_best"]
)
def test_model_checkpoint_with_a_number_out_of_range_is_refused(option: str) -> None:
    with pytest.raises(
        ValueError, match=rf"ModelCheckpoint\({option}\): expected at least"
    ):
        ModelCheckpoint(**{option: -1})


class Block(harness.Callback):
    """Puts a file in the way of a folder, from one epoch until another."""

    def __init__(self, folder: Path, until: int = 9) -> None:
        self.folder, self.until = folder, until

    def on_train_begin(self) -> None:
        if self.ctx.epoch == 1:
            self.folder.write_text("in the way")
        if self.ctx.epoch == self.until:
            self.folder.unlink()


def test_model_checkpoint_of_a_folder_that_cannot_be_written_warns_and_trains_on(
    tmp_path: Path,
) -> None:
    save = ModelCheckpoint(tmp_path / "file" / "saved")
    with pytest.warns(
        UserWarning, match="checkpoint not written: .*Training continues"
    ):
        fitted = train(save, Block(tmp_path / "file"))
    assert len(fitted.records["metrics"]["train"]) == 2


def test_model_checkpoint_tries_again_after_a_failed_write(tmp_path: Path) -> None:
    """The folder is a file at the first epoch's end, and gone at the second's."""
    folder = tmp_path / "saved"
    with pytest.warns(UserWarning, match="The next save tries again"):
        train(ModelCheckpoint(folder), Block(folder, until=2))
    assert steps(folder) == [12]


def test_model_checkpoint_with_a_state_that_cannot_be_written_names_it(
    tmp_path: Path,
) -> None:
    class Odd(harness.Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"seen": range(2)}

    with pytest.raises(TypeError, match="state/callbacks/Odd/seen: expected numbers"):
        train(ModelCheckpoint(tmp_path), Odd())


def test_model_checkpoint_changes_nothing_of_the_training(tmp_path: Path) -> None:
    case = CASES["adam-onecycle-metrics"]
    plain = train(*case.callbacks(tmp_path), case=case)
    saving = ModelCheckpoint(tmp_path, every_n_steps=1)
    saved = train(saving, *case.callbacks(tmp_path), case=case)
    for name, value in plain.model.state_dict().items():
        assert value.equal(saved.model.state_dict()[name])
    assert plain.records["metrics"] == saved.records["metrics"]


def test_model_checkpoint_holds_the_weights_of_its_moment(tmp_path: Path) -> None:
    """The copy is taken at once, although it is written while training continues."""
    seen: dict[int, Any] = {}

    class Look(harness.Callback):
        def on_train_batch_end(self) -> None:
            seen[self.ctx.step] = self.ctx.model.head.bias.detach().clone()

    train(ModelCheckpoint(tmp_path, every_n_steps=1, keep_last=99), Look())
    for place in list_checkpoints(tmp_path):
        state = read_rank(place, 0)
        saved = state["accelerator"]["model"]["head.bias"]
        assert saved.equal(seen[state["position"]["step"]])


def test_model_checkpoint_of_a_fit_that_fails_is_awaited(tmp_path: Path) -> None:
    class Fails(harness.Callback):
        def on_train_batch_end(self) -> None:
            if self.ctx.step == 3:
                raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        train(ModelCheckpoint(tmp_path, every_n_steps=2), Fails())
    assert steps(tmp_path) == [2]
    assert [path for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_fit_whose_folder_is_read_only_keeps_the_former_checkpoint(
    tmp_path: Path,
) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write anywhere")

    class Close(harness.Callback):
        def on_train_begin(self) -> None:
            tmp_path.chmod(0o500)

    train(ModelCheckpoint(tmp_path))
    with pytest.warns(UserWarning, match="checkpoint not written"):
        train(ModelCheckpoint(tmp_path), Close())
    assert steps(tmp_path) == [12]
    with pytest.raises(PermissionError, match="read-only: choose another"):
        train(ModelCheckpoint(tmp_path))


def test_keep_best_model_puts_the_best_epochs_weights_in(tmp_path: Path) -> None:
    seen: dict[int, Any] = {}

    class Look(harness.Callback):
        def on_epoch_end(self) -> None:
            seen[self.ctx.epoch or 0] = self.ctx.model.head.bias.detach().clone()

    fitted = train(KeepBestModel("train/loss", "max"), Look(), epochs=4)
    losses = [row["loss"] for row in fitted.records["metrics"]["train"]]
    best = 1 + max(range(4), key=losses.__getitem__)
    assert best != 4
    assert fitted.model.head.bias.equal(seen[best])


def test_saved_run_is_not_run_by_warnings(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(ModelCheckpoint(tmp_path), case=Case(learner=sgd))
    assert tracking.list_runs(tmp_path) == []


def test_a_nan_epoch_holds_no_best_place(tmp_path):
    values = [float("nan"), 0.5, 0.4, 0.3, 0.6]

    def log(ctx):
        ctx.log("metrics", "valid", {"m": values[ctx.epoch - 1]}, index=ctx.epoch)

    keep = ModelCheckpoint(tmp_path, keep_best=1, monitor="valid/m", mode="min")
    line_learner().fit(
        slope(4), 5, callbacks=[At("on_train_end", log), keep], tracker=False
    )
    epochs = sorted(path.name.split("-")[2] for path in tmp_path.iterdir())
    assert epochs == ["4", "5"]


Pair = namedtuple("Pair", "x y")


class Keeps(DataLoader):
    """A loader that saves its own position."""

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("collate", [lambda rows: Pair(*zip(*rows, strict=True)), set])
def test_batches_that_a_checkpoint_cannot_hold_are_refused_at_the_first(
    collate, tmp_path
):
    def fit(accumulate, *callbacks):
        line_learner(loss=lambda pred, target: pred.sum()).fit(
            Keeps([(1.0, 2.0)] * 3, collate_fn=collate),
            1,
            callbacks=[At("on_train_batch_begin", set_batch), *callbacks],
            accelerator=SingleDevice("cpu", accumulate=accumulate),
            tracker=False,
        )

    def set_batch(ctx):
        seen.append(ctx.iter)
        ctx.batch = slope(2)

    seen = []
    with pytest.raises(TypeError, match=r"and checkpoint, got (Pair|set)"):
        fit(2, ModelCheckpoint(tmp_path))
    assert seen == [1]
    fit(1, ModelCheckpoint(tmp_path))
    fit(2)


@pytest.mark.parametrize("mode", ["min", "max", "zero"])
def test_model_checkpoint_keeps_the_best_alone(mode: str, tmp_path: Path) -> None:
    values = {"min": [3, 1, 2, 5], "max": [1, 3, 2, 0], "zero": [-3, 1, -2, 5]}[mode]

    def log(ctx: harness.Context) -> None:
        ctx.log("metrics", "valid", {"watched": values[ctx.epoch - 1]}, index=ctx.epoch)

    saves = ModelCheckpoint(
        tmp_path, keep_last=0, keep_best=1, monitor="valid/watched", mode=mode
    )
    line_learner().fit(
        slope(4),
        4,
        callbacks=[saves, At("on_train_end", log)],
        tracker=False,
        verbose=False,
    )
    (place,) = list_checkpoints(tmp_path)
    assert verify_checkpoint(place).position.epoch == 2


def test_model_checkpoint_of_the_best_alone_keeps_that_of_an_interrupted_fit(
    tmp_path: Path,
) -> None:
    case = CASES["adam-onecycle-metrics"]
    saves = ModelCheckpoint(tmp_path, keep_last=0, keep_best=1)
    train(saves, Stop("on_train_batch_end", 8), case=case)
    newest, best = list_checkpoints(tmp_path)
    assert verify_checkpoint(newest).position.iter == 2
    assert verify_checkpoint(best).position.phase == "epoch"


@pytest.mark.parametrize("options", [{}, {"keep_best": 1, "every_n_steps": 5}])
def test_model_checkpoint_that_would_keep_nothing_is_refused(
    options: dict[str, int],
) -> None:
    with pytest.raises(
        ValueError,
        match=r"ModelCheckpoint\(keep_last\): expected at least 1, or keep_b",
    ):
        ModelCheckpoint(keep_last=0, **options)


def test_model_checkpoint_fills_the_fields_of_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    learner = line_learner().set_hparams(w=0.5)
    saves = ModelCheckpoint("~/{model}/w-{w:.2f}-lr-{lr}")
    learner.fit(slope(4), 1, callbacks=[saves], tracker=False, verbose=False)
    assert len(list_checkpoints(tmp_path / "Line" / "w-0.50-lr-0.01")) == 1


@pytest.mark.parametrize("field", ["{epoch}", "{0}", "{w", "{w.x}"])
def test_model_checkpoint_with_an_unknown_field_is_refused(
    field: str, tmp_path: Path
) -> None:
    tape = Tape()
    with pytest.raises(
        ValueError, match=r"ModelCheckpoint\(path\): expected fields of"
    ):
        line_learner().set_hparams(w=0.5).fit(
            slope(4),
            1,
            callbacks=[ModelCheckpoint(tmp_path / field), tape],
            tracker=False,
            verbose=False,
        )
    assert tape.events == []


NOT_BEGUN = (
    "checkpoint not started: expected time for it before the process is killed, got"
)


@pytest.mark.parametrize(
    ("stop_within", "end_in", "saved"),
    [
        (None, None, True),
        (1e-6, None, False),
        (6000.0, None, True),
        (None, 100, False),
        (6000.0, -100, True),  # the job got more time
    ],
)
def test_save_that_a_killed_process_cannot_finish_is_not_begun(
    stop_within, end_in, saved, tmp_path, monkeypatch
):
    save = ModelCheckpoint(tmp_path)

    def finish_saves(ctx):
        assert save.writer is not None
        save.writer.wait()
        save.writer._durations.append(2000.0)  # as if one had taken so long
        if end_in is not None:
            monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + end_in)))

    stop = At("on_train_batch_end", lambda ctx: ctx.epoch == 2 and stop_now())
    own = [save, At("on_epoch_end", finish_saves, weight=math.inf), stop]
    own.append(Interrupt(stop_within=stop_within))
    match = rf"{NOT_BEGUN} -?\d+ s left and 2000 s for it"
    told = nullcontext() if saved else pytest.warns(UserWarning, match=match)
    with told:
        fitted = train(*own)
    assert fitted.signum == signal.SIGTERM
    (found,) = list_checkpoints(tmp_path)
    position = verify_checkpoint(found).position
    assert (position.epoch, position.phase) == ((2, "train") if saved else (1, "epoch"))


def stop_now():
    signal.raise_signal(signal.SIGTERM)


def test_save_that_is_under_way_is_not_waited_for_until_the_process_is_killed(tmp_path):
    save, release = ModelCheckpoint(tmp_path, every_n_epochs=0), threading.Event()

    def hang(ctx):
        assert save.writer is not None
        save.writer.wait()
        save.writer._start(release.wait)

    own = [save, At("on_train_batch_end", lambda _: stop_now()), At("on_fit_end", hang)]
    match = "checkpoint not finished: the process is"
    with pytest.warns(UserWarning, match=match):
        train(*own, Interrupt(stop_within=3.5))
    release.set()
    assert steps(tmp_path) == [1]


class Big(nn.Module):
    """Many weights, of which a step uses one."""

    def __init__(self, size_mb: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size_mb * 250_000))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight[0]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf(
        "SC_PAGE_SIZE"
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux tells it")
@pytest.mark.parametrize("size_mb", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_save_every_step_waits_for_the_one_before_and_says_so(
    size_mb: int, tmp_path: Path
) -> None:
    saves = ModelCheckpoint(tmp_path, every_n_steps=1, every_n_epochs=0)
    saves.max_wait_s = 0.0  # not half a minute
    unfinished, resident = [], []

    def look(ctx: Any) -> None:
        unfinished.append(sum(path.suffix == ".tmp" for path in tmp_path.iterdir()))
        resident.append(resident_bytes())

    learner = harness.setup(
        lambda: Big(size_mb), loss=nn.MSELoss(), optimizer=torch.optim.SGD
    )
    with pytest.warns(UserWarning, match="a save to end before the next") as caught:
        learner.set_opt_hparams(lr=0.1).fit(
            (torch.ones(25), torch.ones(25)),
            1,
            callbacks=[saves, At("on_train_batch_end", look)],
            dataloader_options={"batch_size": 1},
            tracker=False,
            verbose=False,
        )
    assert len(caught) == 1
    assert "Save less often" in str(caught[0].message)
    assert steps(tmp_path) == [25]
    assert max(unfinished) == 1
    # Nineteen saves later: the system keeps some memory, and a save that stays is a copy.
    assert resident[-1] - resident[5] < 80e6 + size_mb * 1e6
