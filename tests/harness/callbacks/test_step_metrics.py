from __future__ import annotations

from typing import Any

import pytest
import torch

import harness
import tracking
from harness.accelerators.single import SingleDevice
from harness.callbacks import StepMetrics
from tests.harness.fakes import At, line_learner, slope
from tests.harness.test_loop import Pair


def recorded(tmp_path, learner, callback, *others, **options):
    """Rows of the per-step series: name, step, epoch, value."""
    options = {"dataloader_options": {"batch_size": 1, "shuffle": False}} | options
    fitted = learner.fit(
        slope(4),
        2,
        callbacks=[callback, *others],
        tracker={"runs_dir": tmp_path, "delivery": False},
        verbose=False,
        **options,
    )
    assert "steps" not in fitted.records
    table = tracking.open(fitted.run_path).records(what="steps")
    assert set(table["set"].to_pylist()) == {"train"}
    assert set(table["index"].to_pylist()) == {None}
    columns: Any = [
        table[name].to_pylist() for name in ("name", "step", "epoch", "value")
    ]
    return list(zip(*columns, strict=True))


def test_step_metrics_record_loss_and_rate_of_each_step(tmp_path):
    losses = []
    note = At(
        "on_train_batch_after_step", lambda ctx: losses.append(float(ctx.loss["opt"]))
    )
    rows = recorded(tmp_path, line_learner(), StepMetrics(), note)
    expected = []
    for step, loss in enumerate(losses, start=1):
        epoch = 1 if step <= 4 else 2
        expected += [("loss", step, epoch, loss), ("lr", step, epoch, 0.01)]
    assert sorted(rows) == sorted(expected)
    assert len(losses) == 8


def test_rate_that_is_a_tensor_is_recorded_as_it_was_in_the_step(tmp_path):
    halve = At(
        "on_train_batch_end", lambda ctx: ctx.opt.param_groups[0]["lr"].mul_(0.5)
    )
    learner = line_learner().set_opt_hparams(lr=torch.tensor(0.5))
    rows = recorded(tmp_path, learner, StepMetrics(), halve)
    rates = [value for name, _, _, value in sorted(rows) if name == "lr"]
    assert rates == [0.5**step for step in range(1, 9)]


def test_step_metrics_every_few_steps(tmp_path):
    rows = recorded(tmp_path, line_learner(), StepMetrics(every=3))
    assert sorted({step for _, step, _, _ in rows}) == [3, 6]


def test_step_metrics_count_optimizer_steps_not_batches(tmp_path):
    rows = recorded(
        tmp_path,
        line_learner(),
        StepMetrics(),
        accelerator=SingleDevice("cpu", accumulate=2),
    )
    assert sorted({step for _, step, _, _ in rows}) == [1, 2, 3, 4]


def test_step_metrics_of_named_optimizers_are_kept_apart(tmp_path):
    rows = recorded(tmp_path, harness.setup(Pair), StepMetrics(every=4))
    names = sorted((name, step) for name, step, _, _ in rows)
    assert names == [
        (f"{what}/{opt}", step)
        for what in ("loss", "lr")
        for opt in ("a", "b")
        for step in (4, 8)
    ]


@pytest.mark.parametrize("every", [0, -2])
def test_step_metrics_every_below_one_is_refused(every):
    with pytest.raises(ValueError, match=r"\(every\): expected at least 1, got"):
        StepMetrics(every)
