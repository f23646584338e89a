from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from torch import nn

import harness
from harness.callbacks import CSVLogger
from tests.harness.fakes import At, Line, line_learner, slope
from tests.harness.test_loop import Pair

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_holds_one_line_for_each_metric_and_epoch(tmp_path):
    path = tmp_path / "logs" / "fit.csv"
    fitted = line_learner().fit(
        slope(4), 3, slope(2), callbacks=[CSVLogger(path)], **OFF
    )
    rows = read(path)
    assert list(rows[0]) == ["epoch", "set", "metric", "value"]
    found = [(int(r["epoch"]), r["set"], r["metric"], float(r["value"])) for r in rows]
    metrics = fitted.records["metrics"]
    assert found == [
        (epoch, split, "loss", metrics[split][epoch - 1]["loss"])
        for epoch in (1, 2, 3)
        for split in ("train", "valid")
    ]


def test_csv_is_written_epoch_by_epoch(tmp_path):
    path = tmp_path / "fit.csv"
    lengths = []
    look = At("on_epoch_end", lambda _: lengths.append(len(read(path))), weight=70)
    line_learner().fit(slope(4), 3, callbacks=[CSVLogger(path), look], **OFF)
    assert lengths == [1, 2, 3]


def test_csv_names_nested_metrics_and_those_that_begin_later(tmp_path):
    path = tmp_path / "fit.csv"

    def log(ctx):
        if ctx.epoch == 2:
            ctx.log_metric("mine, quoted", 1e-300)

    callbacks = [CSVLogger(path), At("on_train_end", log)]
    harness.setup(Pair).fit(slope(2), 2, callbacks=callbacks, **OFF)
    names = [(row["epoch"], row["metric"]) for row in read(path)]
    assert names == [
        ("1", "loss/a"),
        ("1", "loss/b"),
        ("2", "loss/a"),
        ("2", "loss/b"),
        ("2", "mine, quoted"),
    ]
    assert float(read(path)[-1]["value"]) == 1e-300


def test_csv_of_an_earlier_fit_is_replaced(tmp_path):
    path = tmp_path / "fit.csv"
    callback = CSVLogger(path)
    for _ in range(2):
        line_learner().fit(slope(4), 2, callbacks=[callback], **OFF)
    assert [row["epoch"] for row in read(path)] == ["1", "2"]


def test_csv_of_a_fit_that_goes_on_holds_the_epochs_before(tmp_path):
    path = tmp_path / "fit.csv"
    records = {"metrics": {"train": [{"loss": 5.0}], "valid": []}}

    def go_on(ctx):
        # As a resume does: records are put back after on_fit_begin.
        if ctx.epoch == 1:
            ctx.unsafe_set_records(records)
            raise harness.SkipEpoch

    callbacks = [CSVLogger(path), At("on_epoch_begin", go_on)]
    line_learner().fit(slope(4), 2, callbacks=callbacks, **OFF)
    assert [row["epoch"] for row in read(path)] == ["1", "2"]
    assert read(path)[0]["value"] == "5.0"


def test_csv_passes_over_values_that_are_no_numbers(tmp_path):
    path = tmp_path / "fit.csv"

    def log(ctx):
        ctx.log_metric("matrix", [[1, 2], [3, 4]])
        ctx.log_metric("kind", "good")

    callbacks = [CSVLogger(path), At("on_train_end", log)]
    line_learner().fit(slope(2), 1, callbacks=callbacks, **OFF)
    found = {row["metric"]: row["value"] for row in read(path)}
    assert found["matrix"] == "[[1, 2], [3, 4]]"
    assert found["kind"] == "good"
    assert float(found["loss"]) == 2.0  # x = 0, 1 at w = b = 0: (0 + 4) / 2


def test_csv_logger_knows_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    line_learner().fit(slope(4), 1, callbacks=[CSVLogger("~/log.csv")], **OFF)
    assert (tmp_path / "log.csv").read_text().startswith("epoch,set,metric,value")


class StepsOnce(Line):
    """Steps in its third batch, which is in the second epoch."""

    def step(self):
        self.calls = getattr(self, "calls", 0) + self.ctx.training
        loss = nn.functional.mse_loss(self(self.ctx.input), self.ctx.target)
        if self.ctx.training and self.calls == 3:
            self.ctx.optimize(loss)
        else:
            self.ctx.loss = loss.detach()


def test_csv_of_a_fit_by_steps_has_what_replaced_a_value(tmp_path):
    path = tmp_path / "fit.csv"
    learner = harness.setup(StepsOnce, optimizer=torch.optim.SGD)
    with pytest.warns(UserWarning, match="expected an optimizer step in epoch 1"):
        fitted = learner.set_opt_hparams(lr=0.1).fit(
            slope(4),
            2,
            slope(2),
            valid_every="3 steps",
            callbacks=[CSVLogger(path)],
            dataloader_options={"batch_size": 2},
            **OFF,
        )
    frame = fitted.get_metrics()
    assert [float(row["value"]) for row in read(path)] == frame["value"].tolist()
    assert len(frame) == 2
