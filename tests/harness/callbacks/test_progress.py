from __future__ import annotations

import io
import logging
import re
import sys
from contextlib import redirect_stderr
from typing import Any

import pytest
import torch
import torchmetrics

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import EarlyStopping, KeepBestModel, Progress
from harness.callbacks.display.bar import ProgressBar
from harness.callbacks.display.epoch_lines import EpochTable, format_duration
from harness.callbacks.progress import REDRAW_S
from tests.harness.fakes import At, Line, line_learner, slope
from tests.harness.terminal import frames, in_terminal, screen

TIME = re.compile(r" +\d+\.\d\d s")


class Second(SingleDevice):
    """Another rank, as far as display goes."""

    is_main = False


def lines(capsys, *callbacks, epochs: Any = 2, **options):
    """What a fit writes where nobody watches."""
    options = {"verbose": True, "tracker": False} | options
    learner = line_learner().set_opt_hparams(lr=0.0)
    learner.fit(slope(2), epochs, slope(3), callbacks=callbacks, **options)
    written = capsys.readouterr()
    assert written.out == ""
    return [TIME.sub(" T s", line) for line in written.err.splitlines()]


def epoch_lines(*args, **options):
    """The lines of the epochs among them."""
    return [line for line in lines(*args, **options) if line.startswith("epoch")]


class Tee:
    """Stands for stderr, as programs replace it: it cannot say whether it is a terminal."""

    def write(self, text: str) -> None:
        pass


class Broken(Tee):
    def write(self, text: str) -> None:
        raise OSError("closed")


@pytest.mark.parametrize(
    "stderr", [None, Tee(), Broken()], ids=["None", "Tee", "Broken"]
)
@pytest.mark.parametrize("verbose", [None, True])
def test_fit_ends_well_whatever_stderr_is(stderr, verbose, tmp_path):
    tracker = {"runs_dir": tmp_path, "delivery": False}
    with redirect_stderr(stderr):
        fitted = line_learner().fit(slope(4), 2, verbose=verbose, tracker=tracker)
    assert len(fitted.records["metrics"]["train"]) == 2


def test_progress_without_a_terminal_writes_a_line_an_epoch(capsys):
    # x = 0, 1 at w = b = 0: (0 + 4) / 2; with 2: (0 + 4 + 16) / 3
    assert lines(capsys) == [
        "model Line, 2 parameters, cpu, fp32",
        "data  train 2 rows in 1 batch of 32; valid 3 rows in 1 batch of 32",
        "epoch 1/2 T s  train: loss 2      | valid: loss 6.667  *",
        "epoch 2/2 T s  train: loss 2      | valid: loss 6.667",
        "ended  2 epochs in T s",
        "last  epoch 2   train: loss 2      | valid: loss 6.667",
        "best  epoch 1   train: loss 2      | valid: loss 6.667",
    ]


def test_progress_is_silent_unless_verbose(capsys):
    assert lines(capsys, verbose=False) == []


def test_progress_where_nobody_watches_is_silent_by_default(capsys):
    assert lines(capsys, verbose=None) == []


def test_progress_of_other_ranks_is_silent(capsys):
    assert lines(capsys, accelerator=Second("cpu")) == []


def test_progress_by_steps_writes_a_line_for_each_validation_and_set(capsys):
    options = {"max_steps": 3, "valid_every": "2 steps", "epochs": None}
    line_learner().set_opt_hparams(lr=0.0).fit(
        slope(2),
        valid_data={"a": slope(3), "b": slope(2)},
        verbose=True,
        tracker=False,
        **options,
    )
    found = [TIME.sub(" T s", line) for line in capsys.readouterr().err.splitlines()]
    sets = "train: loss 2      | a: loss 6.667  | b: loss 2"
    assert found[2:] == [
        f"epoch 2/3, step 2/3 T s  {sets}  *",
        f"epoch 3/3, step 3/3 T s  {sets}",
        "ended  3 steps in T s",
        f"last  step 3   {sets}",
        f"best  step 2   {sets}",
    ]


@pytest.mark.parametrize("verbose", [True, None, False])
def test_progress_of_evaluate_and_predict_is_a_line_if_asked_for(capsys, verbose):
    fitted = line_learner().fit(slope(2), 1, verbose=False, tracker=False)
    fitted.evaluate({"a": slope(3), "b": slope(2)}, verbose=verbose)
    fitted.predict(slope(70)[0], verbose=verbose)
    found = [TIME.sub(" T s", line) for line in capsys.readouterr().err.splitlines()]
    told = [re.sub(r"loss \S+", "loss", line).split() for line in found]
    assert told == [
        ["evaluate", "T", "s", "a:", "loss", "|", "b:", "loss"],
        ["predict", "3", "batches", "T", "s"],
    ] * bool(verbose)


def test_progress_of_evaluate_and_predict_draws_bars():
    fitted = line_learner().fit(slope(2), 1, verbose=False, tracker=False)

    def run() -> None:
        for call in (fitted.evaluate, fitted.predict):
            progress = Progress(min_s=1e9)
            progress.clock = Clock(0.25)  # type: ignore[method-assign]
            call(slope(40), callbacks=[progress])

    text = in_terminal(run, 80)
    titles = [frame.split("%")[0].rsplit(maxsplit=1)[0] for frame in frames(text)]
    assert titles == ["evaluate valid"] * 3 + ["predict"] * 3
    assert screen(text) == []


def test_progress_tells_of_an_early_stop(capsys):
    # The losses stay as they are: the second epoch is no better.
    found = lines(capsys, EarlyStopping(), epochs=10)
    assert [line.split()[:2] for line in found[2:4]] == [
        ["epoch", "1/10"],
        ["epoch", "2/10"],
    ]
    assert found[4:6] == ["stopped early after epoch 2", "ended  2 epochs in T s"]


class Clock:
    """A clock that moves by a step each time somebody looks at it."""

    def __init__(self, step_s: float) -> None:
        self.now, self.step_s = 0.0, step_s

    def __call__(self) -> float:
        self.now += self.step_s
        return self.now


def get_progress(ctx: Any) -> Progress:
    (progress,) = (cb for cb in ctx.callbacks if isinstance(cb, Progress))
    return progress


def fit_in_terminal(
    *callbacks: Any,
    epochs: int = 2,
    step_s: float = 0.25,
    width: int = 80,
    num_rows: int = 2,
) -> str:
    """What a fit writes to a terminal, if `step_s` passes between looks at the clock."""
    clock = Clock(step_s)
    set_clock = At(
        "on_fit_begin", lambda ctx: setattr(get_progress(ctx), "clock", clock)
    )
    callbacks = [set_clock, *callbacks]  # type: ignore[assignment]
    learner, data = line_learner(), slope(num_rows)
    options = {"callbacks": callbacks, "verbose": None, "tracker": False}
    return in_terminal(lambda: learner.fit(data, epochs, data, **options), width)


def test_progress_in_a_terminal_draws_bars_and_erases_them():
    text = fit_in_terminal()
    titles = [frame.split("%")[0].rsplit(maxsplit=1)[0] for frame in frames(text)]
    assert titles == [
        *["epoch 1/2 train"] * 2,
        *["epoch 1/2 valid"] * 2,
        *["epoch 2/2 train"] * 2,
        *["epoch 2/2 valid"] * 2,
    ]
    # The times and the losses are not the same everywhere.
    left = [re.sub(r"\d+\.[\de.+-]+( s)?", "N", line) for line in screen(text)]
    assert [" ".join(line.split()) for line in left] == [
        "model Line, 2 parameters, cpu, fp32",
        "data train 2 rows in 1 batch of 32; valid 2 rows in 1 batch of 32",
        "| train | valid",
        "epoch time | loss | loss",
        "1/2 N | 2 | N *",
        "2/2 N | N | N *",
        "ended 2 epochs in N",
        "best epoch 2, the last one, by valid/loss",
    ]


def rows(text: str) -> list[str]:
    """Rows of epochs in the table that is left to see."""
    return [line for line in screen(text) if re.match(r" *\d+/\d+ ", line)]


def test_progress_of_a_resumed_epoch_leaves_no_bar_above_the_report(tmp_path):
    def fail(ctx: Any) -> None:
        if ctx.iter == 2:
            raise ArithmeticError

    folder = tmp_path / "checkpoints"
    save = harness.callbacks.ModelCheckpoint(folder, every_n_steps=1)
    with pytest.raises(ArithmeticError):
        fit_in_terminal(save, At("on_train_batch_end", fail), num_rows=64)
    resume = harness.callbacks.ResumeFromCheckpoint(folder)
    text = fit_in_terminal(resume, num_rows=64)
    assert "random generators    restored" in text
    assert not [line for line in screen(text) if "━" in line]


def test_what_a_program_writes_while_a_bar_is_drawn_stays_whole_above_it():
    logger = logging.getLogger("own")
    streams, handlers = [], []

    def log(ctx: Any) -> None:
        if ctx.iter == 1 and ctx.epoch == 1:
            handlers.append(logging.StreamHandler())
            logger.addHandler(handlers[0])
        logger.warning("log %d", ctx.iter)

    def begin(ctx: Any) -> None:
        sys.stderr.writelines([f"line {ctx.iter}\n"])
        sys.stderr.write("begun ")  # no bar may be drawn over it
        streams.append(sys.stderr)

    def end(ctx: Any) -> None:
        sys.stderr.write("and ended\n")

    before = sys.stderr, sys.stdout
    try:
        text = fit_in_terminal(
            At("on_train_batch_begin", log),
            At("on_train_batch_after_pred", begin),
            At("on_train_batch_after_step", end),
            num_rows=96,
        )
    finally:
        logger.removeHandler(handlers[0])
    assert (sys.stderr, sys.stdout) == before
    assert len(frames(text)) > 8
    shown = [line for line in screen(text) if line[:3] in ("lin", "beg", "log")]
    assert shown == [
        line
        for n in (1, 2, 3) * 2
        for line in (f"log {n}", f"line {n}", "begun and ended")
    ]
    assert not [line for line in screen(text) if "\u2501" in line]
    assert handlers[0].stream is streams[0].stream  # nothing of the bar is left


class Closed(io.StringIO):
    """A terminal that was closed."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_bar_of_a_terminal_that_was_closed_is_not_drawn_and_fails_nothing(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Closed())
    bar = ProgressBar("epoch 1/1 train", 100, 0.0)
    for done in (1, 2):
        bar.draw(done, (), float(done), 80)
    bar.end()
    assert bar.drawn_at == 2.0


def test_progress_of_short_splits_is_drawn_at_most_ten_times_a_second():
    epochs, step_s = 50, 0.004
    text = fit_in_terminal(epochs=epochs, step_s=step_s)
    looks = 6 * epochs  # two an epoch for the line, and two for each split
    assert 1 <= len(frames(text)) <= looks * step_s / REDRAW_S + 1
    assert len(rows(text)) == epochs


def skip(ctx: Any) -> None:
    if ctx.epoch == 1:
        raise harness.SkipEpoch


def test_progress_of_a_skipped_epoch_leaves_no_bar_behind():
    left = rows(fit_in_terminal(At("on_train_batch_end", skip)))
    assert [line.split()[0] for line in left] == ["2/2"]


def test_progress_of_a_fit_that_fails_leaves_the_terminal_usable():
    progress: list[Progress] = []

    def fail(ctx: Any) -> None:
        progress.append(get_progress(ctx))
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fit_in_terminal(At("on_train_batch_end", fail))
    assert progress[0]._bar is None


def test_progress_in_a_terminal_shows_the_loss_and_fills_the_line():
    first, last = frames(fit_in_terminal(epochs=1))[:2]
    assert re.fullmatch(r"epoch 1/1 train +0% \u2501+ 0/1", first.rstrip())
    assert re.fullmatch(
        r"epoch 1/1 train 100% \u2501+ 1/1 4\.0 batches/s eta 00:00 loss 2", last
    )
    assert len(last) == 80


@pytest.mark.parametrize("width", [40, 60])
def test_progress_in_a_narrow_terminal_leaves_out_what_does_not_fit(width):
    for frame in frames(fit_in_terminal(width=width)):
        assert len(frame) == width
        assert re.search(r"\d/1( |$)", frame)
        assert "\u2026" not in frame


def log_many(ctx: Any) -> None:
    for name in "abcdefgh":
        ctx.log_metric(f"metric_{name}", 1234.5)


@pytest.mark.parametrize("width", [40, 80])
def test_progress_of_metrics_too_many_for_a_table_gives_each_set_lines(width):
    text = fit_in_terminal(At("on_train_end", log_many), epochs=1, width=width)
    left = screen(text)
    first = next(place for place, line in enumerate(left) if "epoch 1/1" in line)
    found = left[first : next(i for i, line in enumerate(left) if "ended" in line)]
    assert len(found) > 3
    assert all(len(line) <= width for line in left)
    assert all(line.startswith("  ") for line in found[1:])
    assert re.findall(r"metric_(\w) 1234\b", " ".join(found)) == list("abcdefgh")


def test_progress_line_without_a_terminal_is_one_line(capsys):
    assert len(epoch_lines(capsys, At("on_train_end", log_many), epochs=1)) == 1


def test_progress_in_a_terminal_that_cannot_erase_writes_lines_only(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    text = fit_in_terminal()
    assert frames(text) == []
    assert len(rows(text)) == 2


def test_progress_rate_of_a_resumed_pass_counts_fresh_batches():
    bar = ProgressBar("epoch 1/1 train", 100, 0.0)
    bar.done_before = 50
    # 10 fresh batches in 20 s; the 40 that are left take 80 s.
    assert bar._format_details(60, ["loss 1"], 20.0, 70) == (
        "60/100 2.0 s/batch eta 01:20 loss 1"
    )
    assert format_duration(3 * 3600 + 62) == "3:01:02"


def test_table_never_breaks_a_number_and_keeps_the_width_it_has():
    table = EpochTable()
    names = ["loss", "a_rather_long_name_of_a_metric", "accuracy"]
    values = {split: dict.fromkeys(names, "-1.234e-05") for split in ("train", "clean")}
    wide = table.format({"epoch": "1/2"}, values, 200, is_best=True)
    assert [line.split(" | ")[1].split() for line in wide] == [
        ["train"],
        names,
        ["-1.234e-05"] * 3,
    ]
    assert wide[-1].endswith(" *")
    assert len(table.format({"epoch": "2/2"}, values, 200, is_best=False)) == 1
    for width in (24, 40, 80):
        found = table.format({"epoch": "2/2"}, values, width, is_best=False)
        assert all(len(line) <= width for line in found)
        assert "\n".join(found).count("-1.234e-05") == 6


def test_table_gets_a_heading_again_when_a_metric_appears():
    table = EpochTable()
    first = {"train": {"loss": "1"}}
    assert len(table.format({"epoch": "1"}, first, 80, is_best=False)) == 3
    second = {"train": {"loss": "1"}, "valid": {"loss": "2"}}
    assert len(table.format({"epoch": "2"}, second, 80, is_best=False)) == 3
    third = table.format({"epoch": "3"}, first, 80, is_best=False)
    assert third == ["    3 |        1 |"]


def test_table_keeps_its_columns_when_numbers_get_small_and_times_long():
    table = EpochTable()
    rows = []
    for took, loss in (("9.99 s", "0.1234"), ("59.99 s", "0.001234"), ("1:02:03", "1")):
        heads, values = {"epoch": "1/3", "time": took}, {"train": {"loss": loss}}
        rows += table.format(heads, values, 80, is_best=False)
    assert len(rows) == 5  # two of them are the heading
    assert len({row.index("|") for row in rows}) == len(set(map(len, rows[1:]))) == 1


def test_progress_marks_the_best_by_what_a_callback_monitors(capsys):
    values = iter([0.5, 0.7, 0.6])
    log = At("on_valid_end", lambda ctx: ctx.log_metric("score", next(values)))
    shown = lines(capsys, log, KeepBestModel("valid/score", "max"), epochs=3)
    found = [line for line in shown if line.startswith("epoch ")]
    assert [line.endswith("*") for line in found] == [True, True, False]
    assert "ended  3 epochs in T s, the best by valid/score" in shown


def test_progress_leaves_matrices_out(capsys):
    log = At("on_valid_end", lambda ctx: ctx.log_metric("table", [[1, 2], [3, 4]]))
    assert not [line for line in lines(capsys, log) if "table" in line]


def test_progress_after_a_resume_knows_the_best_of_before(tmp_path, capsys):
    values = {1: 3.0, 2: 1.0, 3: 2.0}
    log = At("on_valid_end", lambda ctx: ctx.log_metric("loss", values[ctx.epoch]))
    folder = tmp_path / "checkpoints"
    save = harness.callbacks.ModelCheckpoint(folder, keep_last=9)
    lines(capsys, log, save, epochs=2)
    resume = harness.callbacks.ResumeFromCheckpoint(folder)
    done = lines(capsys, log, save, resume, epochs=2)
    assert "from  checkpoint after epoch 2" in done
    assert "ended  nothing is left to train: all epochs are done" in done
    found = lines(capsys, log, save, resume, epochs=3)
    assert "ended  1 epoch in T s" in found
    assert [line[-1] for line in found if line.startswith("epoch 3/3")] == ["2"]


def test_progress_tells_where_a_run_is_and_what_to_type(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fitted = line_learner().fit(
        slope(2), 1, verbose=True, tracker={"delivery": False, "name": "mine"}
    )
    end = capsys.readouterr().err.splitlines()[-2:]
    assert end == [
        f"run   runs/{fitted.run_id}",
        f"next  harness runs show {fitted.run_id}",
    ]


def test_progress_shows_metrics_while_training_and_changes_none():
    learner = harness.setup(
        Line,
        loss=torch.nn.MSELoss(),
        optimizer=torch.optim.SGD,
        metrics={"error": torchmetrics.MeanSquaredError()},
    ).set_opt_hparams(lr=0.1)
    plain = learner.fit(slope(90), 2, slope(9), seed=1, tracker=False, verbose=False)
    texts: list[str] = []
    clock = Clock(0.25)

    def watch() -> None:
        set_clock = At(
            "on_fit_begin", lambda ctx: setattr(get_progress(ctx), "clock", clock)
        )
        options = {"dataloader_options": None, "callbacks": [set_clock], "seed": 1}
        found = learner.fit(slope(90), 2, slope(9), tracker=False, **options)
        assert found.records["metrics"] == plain.records["metrics"]

    texts = frames(in_terminal(watch, 140))
    assert any(re.search(r"eta 00:0\d fit 00:\d\d loss [\d.e+]+", t) for t in texts)
