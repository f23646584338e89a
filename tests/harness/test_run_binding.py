"""Which run a fit goes into, and what that run says of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import harness
import tracking
from harness.accelerators.single import SingleDevice
from harness.context import Context
from harness.run_binding import as_param, get_code_commit, make_null_run
from tests.harness.fakes import At, Line, line_learner, net_learner, points, slope


@pytest.fixture
def options(tmp_path) -> dict[str, Any]:
    return {
        "tracker": {"runs_dir": tmp_path / "runs", "delivery": False},
        "accelerator": SingleDevice("cpu"),
        "verbose": False,
    }


def metrics_of(past) -> list[tuple[Any, ...]]:
    """Set, name, index, epoch, step and value of each metric row."""
    table = past.records(what="metrics")
    names = ("set", "name", "index", "epoch", "step", "value")
    return list(zip(*(table[name].to_pylist() for name in names), strict=True))


# --- forms of tracker


def test_fit_by_default_goes_into_a_run_where_the_environment_says(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path / "here"))
    tracker = {"delivery": False}
    fitted = line_learner().fit(slope(2), 1, tracker=tracker, verbose=False)
    (past,) = tracking.list_runs()
    assert past.path == fitted.run_path == tmp_path / "here" / past.id
    assert fitted.run_id == past.id
    assert past.status == "finished"


def test_fit_without_tracking_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fitted = line_learner().fit(slope(2), 1, tracker=False, verbose=False)
    assert (fitted.run_id, fitted.run_path) == (None, None)
    assert list(tmp_path.iterdir()) == []


FIRST_FIT = """
import contextlib, sys
import torch
import harness
from tracking.delivery.waiting import _deliveries

class Line(torch.nn.Linear):
    def set_optimizers(self, fails):
        assert "torch._dynamo" not in sys.modules
        print(len(_deliveries._processes), end=" ")
        if fails:
            raise KeyError
        return torch.optim.SGD(self.parameters(), 0.1)

def fit(tracker, fails=True):
    learner = harness.setup(Line, loss=torch.nn.MSELoss())
    learner = learner.set_hparams(in_features=1, out_features=1)
    x = torch.ones(2, 1)
    learner.set_opt_hparams(fails=fails).fit((x, x), 1, tracker=tracker, verbose=False)

for tracker in (False, {"delivery": False}, {"run_id": "0"}, None):
    with contextlib.suppress(KeyError):
        fit(tracker)
fit(None, fails=False)
(process,) = _deliveries._processes
(run,) = _deliveries.list_unsent()
print(run._process is process)
"""


@pytest.mark.slow
def test_first_fit_has_mlflow_imported_beside_the_compiler_of_torch(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(Path(harness.__file__).parents[1])}
    out = subprocess.check_output(
        [sys.executable, "-c", FIRST_FIT], cwd=tmp_path, env=environment, text=True
    )
    assert out.split() == ["0", "0", "0", "1", "1", "True"]


def test_fit_into_a_run_of_the_users_leaves_it_open(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        fitted = line_learner().fit(slope(2), 1, tracker=run, verbose=False)
        assert fitted.run_id == run.id
        assert run.status == "running"
        run.log("notes", "after", "still open")
    past = tracking.open(run.path)
    assert past.status == "finished"
    assert past.records(what="notes").num_rows == 1
    assert past.records(what="metrics").num_rows == 1


def test_fit_into_a_run_of_the_users_that_is_interrupted_leaves_it_open(tmp_path):
    stop = At("on_train_batch_end", lambda _: signal.raise_signal(signal.SIGINT))
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        options: Any = {"tracker": run, "callbacks": [stop], "verbose": False}
        assert line_learner().fit(slope(2), 1, **options).is_interrupted
        run.log("notes", "after", "still open")
    assert tracking.open(run.path).records(what="notes").num_rows == 1


def test_fit_tracker_options_reach_the_run(tmp_path):
    tracker = {
        "runs_dir": tmp_path,
        "delivery": False,
        "name": "mine",
        "experiment": "lines",
        "tags": {"colour": "blue"},
        "params": {"extra": 3},
    }
    fitted = line_learner().fit(slope(2), 1, tracker=tracker, verbose=False)
    past = tracking.open(fitted.run_path)
    assert (past.name, past.manifest.experiment) == ("mine", "lines")
    assert past.tags["colour"] == "blue"
    assert past.params["extra"] == 3


# --- several fits in one run


class StopAt(harness.Callback):
    """Ends the fit by a signal."""

    def __init__(self, epoch: int, iter: int) -> None:
        self.place = (epoch, iter)

    def on_train_batch_end(self) -> None:
        if (self.ctx.epoch, self.ctx.iter) == self.place:
            signal.raise_signal(signal.SIGINT)


def fit_into(run: tracking.Run, *callbacks: harness.Callback, **hparams: float) -> Any:
    callbacks = (harness.callbacks.StepMetrics(), *callbacks)
    return (
        line_learner()
        .set_opt_hparams(**hparams)
        .fit(
            slope(8),
            2,
            slope(4),
            tracker=run,
            callbacks=callbacks,
            dataloader_options={"batch_size": 4, "shuffle": False},
            verbose=False,
        )
    )


def in_fit(past: tracking.PastRun, fit: int) -> dict[str, list[Any]]:
    """Metrics of the epochs of one fit, in the form of its records."""
    rows = [row for row in past.wide().to_pylist() if row.get("fit", 1) == fit]
    return {
        split: [{"loss": row[f"{split}/loss"]} for row in rows[:2]]
        for split in ("train", "valid")
    }


def test_fits_of_a_run_are_told_apart(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        folds = []
        for fold, lr in enumerate((0.01, 0.1, 0.1), start=1):
            folds.append(fit_into(run, harness.callbacks.ModelCheckpoint(), lr=lr))
            folds[-1].evaluate(slope(4), verbose=False)
            run.log_metric("fold", float(fold), set="", index=fold)
        past = tracking.open(run.path)
    for fit, fitted in enumerate(folds, start=1):
        assert in_fit(past, fit) == fitted.records["metrics"]
        kept = past.summary()
        name = "train/loss_step" + ("" if fit == 1 else f"_fit{fit}")
        assert kept[name]["count"] == 4
    assert kept["fold"] == {"last": 3.0, "min": 1.0, "max": 3.0, "count": 3}
    assert {k: v for k, v in past.params.items() if k.startswith("opt.lr")} == {
        "opt.lr": 0.01,
        "opt.lr_fit2": 0.1,
        "opt.lr_fit3": 0.1,
    }
    found = [path.name[7:14] for path in sorted((run.path / "checkpoints").iterdir())]
    assert found == ["epoch-2"] * 3
    assert (run.path / "artifacts" / "model_fit2.txt").is_file()


def test_resume_inside_a_later_fit_continues_that_fit(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        fit_into(run)
        whole = fit_into(run, lr=0.05)
    folder = tmp_path / "saved"
    save = harness.callbacks.ModelCheckpoint(folder)
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        fit_into(run)
        assert fit_into(run, save, StopAt(2, 1), lr=0.05).is_interrupted
    # In another process, and then in a fit that begins anew with the weights alone.
    with tracking.start(runs_dir=tmp_path, run_id=run.id, delivery=False) as again:
        resume = harness.callbacks.ResumeFromCheckpoint
        resumed = fit_into(again, resume(folder), lr=0.05)
        past = tracking.open(run.path)
        assert resumed.records["metrics"] == whole.records["metrics"]
        assert in_fit(past, 2) == whole.records["metrics"]
        assert set(past.wide()["fit"].to_pylist()) == {1, 2}
        assert len(past.records("steps")) == len(past.records("steps", rank=0))
        assert past.summary()["train/loss_step_fit2"]["count"] == 4
        assert again.fit == 1
        warm = fit_into(again, resume(folder, restore_records=False), lr=0.05)
        assert in_fit(tracking.open(run.path), 3) == warm.records["metrics"]


def test_fit_that_takes_over_records_begins_behind_them(tmp_path):
    save = harness.callbacks.ModelCheckpoint(tmp_path / "saved")
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        before = fit_into(run, save)
        resume = harness.callbacks.ResumeFromCheckpoint(
            tmp_path / "saved", restore_optimizers=False
        )
        after = fit_into(run, resume)
    past = tracking.open(run.path)
    assert in_fit(past, 1) == before.records["metrics"]
    assert in_fit(past, 2) == after.records["metrics"] != before.records["metrics"]


def test_fit_inside_of_a_callback_trains_and_leaves_the_outer_fit_its_number(tmp_path):
    inner = []
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        fit_into(run)
        probe = At("on_train_end", lambda _: inner.append(fit_into(run, lr=0.1)))
        outer = fit_into(run, probe)
    past = tracking.open(run.path)
    assert in_fit(past, 2) == outer.records["metrics"]
    for fit, fitted in enumerate(inner, start=3):
        losses = [one["loss"] for one in fitted.records["metrics"]["train"]]
        assert losses[0] != losses[1]
        assert in_fit(past, fit) == fitted.records["metrics"]


def test_fit_into_a_run_that_another_thread_fits_into_is_refused(tmp_path):
    errors: list[Exception] = []

    def fit_beside() -> None:
        try:
            fit_into(run)
        except RuntimeError as error:
            errors.append(error)

    def start(ctx: Context) -> None:
        if ctx.epoch == 1:
            thread = threading.Thread(target=fit_beside)
            thread.start()
            thread.join()

    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        fitted = fit_into(run, At("on_train_end", start))
    assert "expected one fit at a time, got one in another thread" in str(errors)
    assert in_fit(tracking.open(run.path), 1) == fitted.records["metrics"]


def test_fit_after_one_that_failed_at_once_is_the_first(tmp_path):
    fail = At("on_fit_begin", lambda _: 1 / 0)
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        with pytest.raises(ZeroDivisionError):
            fit_into(run, fail)
        fit_into(run)
    assert "fit" not in tracking.open(run.path).wide().column_names


# --- status


def test_run_of_a_fit_that_fails_is_marked_so_with_its_error(options, tmp_path):
    fail = At("on_train_batch_end", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        line_learner().fit(slope(2), 1, callbacks=[fail], **options)
    (past,) = tracking.list_runs(tmp_path / "runs")
    assert past.status == "failed"
    assert "division by zero" in str(past.manifest.error)


def test_run_of_a_fit_that_is_interrupted_is_marked_killed(options, tmp_path):
    stop = At("on_train_batch_end", lambda _: signal.raise_signal(signal.SIGINT))
    fitted = line_learner().fit(slope(2), 1, callbacks=[stop], **options)
    assert fitted.is_interrupted
    assert tracking.open(fitted.run_path).status == "killed"


def test_run_of_a_fit_that_stops_early_is_finished(options):
    def stop(_: Context) -> None:
        raise harness.EarlyStop

    fitted = line_learner().fit(
        slope(2), 5, callbacks=[At("on_epoch_end", stop)], **options
    )
    assert tracking.open(fitted.run_path).status == "finished"


def test_run_folder_that_cannot_be_made_is_told_before_any_epoch(tmp_path):
    (tmp_path / "file").write_text("in the way")
    begun: list[Context] = []
    with pytest.raises(OSError, match="file"):
        line_learner().fit(
            slope(2),
            1,
            callbacks=[At("on_epoch_begin", begun.append)],
            tracker={"runs_dir": tmp_path / "file" / "runs", "delivery": False},
        )
    assert begun == []


# --- what the run holds


def test_run_holds_the_metrics_that_fitted_has(options):
    learner = net_learner(metrics=[MulticlassAccuracy(3)])
    fitted = learner.fit(
        points(40), 2, 0.5, dataloader_options={"batch_size": 5}, **options
    )
    expected = [
        (split, name, epoch, epoch, 4 * epoch, value)
        for epoch in (1, 2)
        for split in ("train", "valid")
        for name, value in fitted.records["metrics"][split][epoch - 1].items()
    ]
    assert metrics_of(tracking.open(fitted.run_path)) == expected
    assert len(expected) == 8


def test_run_holds_what_callbacks_log_and_overwrite(options):
    def log(ctx: Context) -> None:
        ctx.log("notes", "train", {"a": torch.tensor(1.5), "b": {"c": "text"}})
        ctx.log("other", "train", torch.tensor(1.0), index=1)
        ctx.log("other", "train", 2.0, index=1, append=False)

    fitted = line_learner().fit(
        slope(2), 1, callbacks=[At("on_fit_end", log)], **options
    )
    past = tracking.open(fitted.run_path)
    notes = past.records(what="notes").to_pylist()
    # Tensors are read out later than other values are written.
    found = [(r["name"], r["value"], r["payload"]) for r in notes]
    assert sorted(found) == [("a", 1.5, None), ("b/c", None, '"text"')]
    assert past.records(what="other")["value"].to_pylist() == [2.0]


def test_run_tells_params_of_model_optimizer_and_data(options):
    learner = line_learner().set_hparams(w=2.0).set_opt_hparams(momentum=0.5)
    fitted = learner.fit(
        slope(8), (1, 2), seed=7, dataloader_options={"batch_size": 4}, **options
    )
    assert tracking.open(fitted.run_path).params == {
        "model": "Line",
        "num_params": 2,
        "optimizer": "SGD",
        "loss": "MSELoss",
        "epochs": 2,
        "min_epochs": 1,
        "batch_size": 4,
        "accumulate": 1,
        "accelerator": "SingleDevice",
        "device": "cpu",
        "world_size": 1,
        "seed": 7,
        "w": 2.0,
        "opt.lr": 0.01,
        "opt.momentum": 0.5,
    }


def test_run_tells_hparams_that_are_no_numbers_as_text(options):
    def make(sizes: tuple[int, ...], kind: type) -> Line:
        return Line()

    learner = harness.setup(
        make, loss=nn.functional.mse_loss, optimizer=torch.optim.SGD
    )
    learner = learner.set_hparams(sizes=(1, 2), kind=Line)
    params = tracking.open(learner.fit(slope(2), 1, **options).run_path).params
    assert params["sizes"] == "(1, 2)"
    assert params["kind"] == str(Line)
    assert params["loss"] == "mse_loss"
    assert params["seed"] == "None"


def test_run_tells_its_data(options):
    fitted = net_learner().fit(points(40), 1, points(8), **options)
    inputs = tracking.open(fitted.run_path).records(what="inputs").to_pylist()
    found = {row["name"]: json.loads(row["payload"])[0] for row in inputs}
    assert list(found) == ["training", "validation"]
    assert found["training"]["rows"] == 40
    assert found["training"]["shapes"] == [[2], []]
    assert found["validation"]["rows"] == 8


def test_run_keeps_the_model_as_text(options):
    fitted = net_learner().fit(points(8), 1, **options)
    assert fitted.run_path is not None
    text = (fitted.run_path / "artifacts" / "model.txt").read_text()
    assert text == f"{fitted.summary()}\n\n{fitted.model}\n"


@pytest.mark.filterwarnings("ignore:.*step. expected an optimizer step")
def test_run_of_a_model_with_its_own_step_names_it(options):
    class Own(Line):
        def step(self) -> None:
            self.ctx.pred = None

    fitted = harness.setup(Own, optimizer=torch.optim.SGD).fit(slope(2), 1, **options)
    assert tracking.open(fitted.run_path).params["loss"] == "model.step"


# --- parts


@pytest.mark.parametrize(
    ("value", "param"),
    [(1, 1), (0.5, 0.5), (True, True), ("a", "a"), (None, "None"), ([1], "[1]")],
)
def test_as_param_keeps_what_a_param_can_be(value, param):
    assert as_param(value) == param
    assert type(as_param(value)) is type(param)


def test_get_code_commit_outside_a_repository_is_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_code_commit() is None


def test_get_code_commit_is_that_of_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    who = "-c user.name=a -c user.email=a@b"
    for command in ("init -q", f"{who} commit -q --allow-empty -m first"):
        assert os.system(f"git {command}") == 0
    commit = (tmp_path / ".git" / "refs" / "heads").iterdir()
    name = next(commit).read_text().strip()
    assert get_code_commit() == name
    Path("new.py").write_text("x = 1\n")
    assert os.system("git add new.py") == 0
    assert get_code_commit() == name  # this program runs the code that it started with
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    assert get_code_commit() == f"{name} (changed)"


def test_null_run_refuses_what_a_run_would():
    run = make_null_run()
    run.log("notes", "train", {"a": [1, None, torch.ones(2)]})
    with pytest.raises(TypeError, match=r"log\('notes', 'train'\): .* at value\['a'\]"):
        run.log("notes", "train", {"a": object()})
    with pytest.raises(TypeError, match=r"log_step\(set='train'\): .*value\['loss'\]"):
        run.log_step({"loss": object()}, 1)
    with pytest.raises(TypeError, match=r"log_metric: .* at value\['loss'\]"):
        run.log_metric("loss", object())


def test_fit_without_tracking_takes_calls_on_the_run():
    class Draw(harness.Callback):
        def on_epoch_end(self) -> None:
            self.ctx.run.log_figure("a figure", "curves.png")
            self.ctx.run.set_tags({"done": self.ctx.epoch})
            assert self.ctx.run.id is None

    fitted = line_learner().fit(slope(8), 1, callbacks=[Draw()], tracker=False)
    assert fitted.run_id is None


def test_call_without_tracking_refuses_the_items_that_a_run_would_refuse():
    run = make_null_run()
    run.log_image("samples", [[0.0, 1.0]], step=1)
    run.log_table("errors", {"a": [1]})
    run.log_histogram("grads", [1.0], bins=8)
    with pytest.raises(TypeError, match=r"Run.log_image\('a'\): expected a tensor"):
        run.log_image("a", "cat.png")
    with pytest.raises(TypeError, match=r"Run.log_table\('a'\): expected a table"):
        run.log_table("a", 3)
    with pytest.raises(ValueError, match=r"Run.log_histogram\('a'\): expected bins"):
        run.log_histogram("a", [1.0], bins=0)


def test_resumed_fit_has_the_images_of_an_unbroken_one(tmp_path, options):
    class Show(harness.Callback):
        def __init__(self, last_step=None):
            self.last_step = last_step

        def on_train_batch_end(self):
            ctx = self.ctx
            weights = torch.stack([ctx.model.w, ctx.model.b])[None]  # type: ignore[list-item]
            ctx.run.log_image("weights", weights, step=ctx.step)
            if ctx.step == self.last_step:
                raise ConnectionError

    def fit(*callbacks):
        given = {**options, "callbacks": callbacks, "seed": 1}
        fitted = line_learner().fit(slope(64), 3, **given)  # two batches an epoch
        rows = tracking.open(fitted.run_path).records(what="images")
        return [rows[name].to_pylist() for name in ("set", "step", "name")]

    whole = fit(Show())
    with pytest.raises(ConnectionError):
        fit(Show(last_step=3), harness.callbacks.ModelCheckpoint())
    (broken,) = (tmp_path / "runs").glob("*/checkpoints")
    resume = harness.callbacks.ResumeFromCheckpoint(broken)
    assert fit(Show(), resume) == whole
    assert whole[1] == [1, 2, 3, 4, 5, 6]
