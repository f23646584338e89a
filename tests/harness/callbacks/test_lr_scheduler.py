from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    StepLR,
)

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import LRScheduler
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import Case, adam
from tests.harness.fakes import At, Tape, line_learner, slope
from tests.harness.test_loop import Pair

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def rates(callback, *others, epochs=4, learner=None, **options):
    """Learning rate of each batch, two an epoch, and what was logged."""
    seen = []
    note = At(
        "on_train_batch_begin", lambda ctx: seen.append(ctx.opt.param_groups[0]["lr"])
    )
    learner = learner or line_learner().set_opt_hparams(lr=1e-3)
    options = {"dataloader_options": {"batch_size": 2}} | options
    fitted = learner.fit(
        slope(4), epochs, callbacks=[note, callback, *others], **OFF | options
    )
    return seen, fitted.records["lr"]["train"]


def by_torch(kind, steps, **options):
    """The rates that torch's scheduler gives by itself."""
    opt = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    scheduler = kind(opt, **options)
    found = []
    for _ in range(steps):
        found.append(opt.param_groups[0]["lr"])
        opt.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (StepLR, {"step_size": 2, "gamma": 0.5}),
        (CosineAnnealingLR, {"T_max": 4}),
        (LambdaLR, {"lr_lambda": lambda n: 1 / (n + 1)}),
    ],
)
def test_scheduler_steps_at_epoch_ends_as_torchs(kind, options):
    seen, logged = rates(LRScheduler(kind, **options))
    expected = by_torch(kind, 4, **options)
    assert seen == [rate for rate in expected for _ in range(2)]
    assert logged == [{"opt": rate} for rate in expected]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (StepLR, {"step_size": 3, "gamma": 0.5}),
        (OneCycleLR, {"max_lr": 0.01, "total_steps": 9, "cycle_momentum": False}),
    ],
)
def test_scheduler_steps_after_optimizer_steps_as_torchs(kind, options):
    event = "on_train_batch_after_step"
    seen, _ = rates(LRScheduler(kind, call_on=event, **options))
    assert seen == by_torch(kind, 8, **options)


def test_scheduler_counts_only_steps_that_were_made():
    event = "on_train_batch_after_step"
    callback = LRScheduler(StepLR, call_on=event, step_size=1, gamma=0.5)
    seen, _ = rates(callback, accelerator=SingleDevice("cpu", accumulate=2))
    assert seen == [1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4, 1.25e-4, 1.25e-4]


def plateau(values, monitor="valid/watched", **options):
    callback = LRScheduler(
        ReduceLROnPlateau, monitor=monitor, patience=0, factor=0.5, **options
    )

    def log(ctx):
        value = {"watched": values[ctx.epoch - 1]}
        ctx.log("metrics", "valid", value, index=ctx.epoch)

    seen, _ = rates(callback, At("on_train_end", log))
    return seen[::2]


def test_scheduler_on_a_plateau_is_given_the_metric():
    assert plateau([3.0, 2.0, 2.5, 1.0], mode="min") == [1e-3, 1e-3, 1e-3, 5e-4]
    assert plateau([3.0, 2.0, 2.5, 1.0], mode="max") == [1e-3, 1e-3, 5e-4, 2.5e-4]


def test_scheduler_on_a_plateau_of_something_unknown_is_told():
    with pytest.raises(
        ValueError,
        match=r"LRScheduler\(monitor='valid/acc'\): expected a logged metric",
    ):
        plateau([1.0] * 4, monitor="valid/acc", mode="max")


def test_scheduler_of_one_of_several_optimizers_leaves_the_others():
    seen = []
    note = At(
        "on_train_batch_end",
        lambda ctx: seen.append(
            [opt.param_groups[0]["lr"] for opt in ctx.optimizers.values()]
        ),
        weight=100,
    )
    callback = LRScheduler(
        StepLR,
        call_on="on_train_batch_after_step",
        opt_name="b",
        step_size=1,
        gamma=0.5,
    )
    learner = harness.setup(Pair).set_opt_hparams(lr=1e-3)
    options = {"batch_size": 2}
    fitted = learner.fit(
        slope(4), 1, callbacks=[note, callback], dataloader_options=options, **OFF
    )
    assert seen == [[1e-3, 5e-4], [1e-3, 2.5e-4]]
    assert fitted.records["lr"]["train"] == [{"b": 2.5e-4}]


def test_scheduler_of_each_of_several_optimizers_logs_both():
    both = [LRScheduler(StepLR, opt_name=n, step_size=1, gamma=0.5) for n in ("a", "b")]
    learner = harness.setup(Pair).set_opt_hparams(lr=1e-3)
    fitted = learner.fit(slope(4), 2, callbacks=both, **OFF)
    assert fitted.records["lr"]["train"] == [
        {"a": 1e-3, "b": 1e-3},
        {"a": 5e-4, "b": 5e-4},
    ]


def test_scheduler_of_several_parameter_groups_logs_each_rate():
    def two_groups(params, lr):
        w, b = params
        groups = [{"params": [w]}, {"params": [b], "lr": 10 * lr}]
        return torch.optim.SGD(groups, lr=lr)

    learner = line_learner(optimizer=two_groups).set_opt_hparams(lr=1e-3)
    _, logged = rates(LRScheduler(StepLR, step_size=1, gamma=0.5), learner=learner)
    assert logged[1] == {"opt": {"0": 5e-4, "1": 5e-3}}


@pytest.mark.parametrize("name", [None, "c"])
def test_scheduler_without_a_known_optimizer_is_told_before_any_epoch(name):
    tape = Tape()
    callback = LRScheduler(StepLR, opt_name=name, step_size=1)
    learner = harness.setup(Pair).set_opt_hparams(lr=1e-3)
    with pytest.raises(
        ValueError,
        match=rf"LRScheduler\(opt_name\): .*got {name!r}. Choose from \['a', 'b'\]",
    ):
        learner.fit(slope(4), 1, callbacks=[callback, tape], **OFF)
    assert tape.events == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"monitor": "accuracy"}, "expected '<set>/<metric>', got 'accuracy'"),
        ({}, r"LRScheduler\(monitor='valid/loss'\): expected validation data"),
        (
            {"monitor": "train/loss", "call_on": "on_train_batch_after_step"},
            r"LRScheduler\(call_on\): expected an event after training",
        ),
    ],
)
def test_scheduler_on_a_plateau_that_cannot_work_is_refused_before_training(
    options, match
):
    tape = Tape()
    callback = LRScheduler(ReduceLROnPlateau, **options)
    with pytest.raises(ValueError, match=match):
        line_learner().fit(slope(4), 1, callbacks=[callback, tape], **OFF)
    assert tape.events == []


def test_scheduler_event_is_checked():
    with pytest.raises(
        ValueError, match=r"LRScheduler\(call_on\): .*Did you mean 'on_epoch_end'"
    ):
        LRScheduler(StepLR, call_on="on_epoch_ends", step_size=1)


def test_scheduler_begins_anew_with_each_fit():
    callback = LRScheduler(StepLR, step_size=1, gamma=0.5)
    assert rates(callback) == rates(callback)


def test_scheduler_state_goes_round():
    first, second = (LRScheduler(StepLR, step_size=1, gamma=0.5) for _ in range(2))
    rates(first, epochs=3)
    rates(second, epochs=1)
    second.load_state_dict(first.state_dict())
    assert second.scheduler.last_epoch == 3
    assert second.state_dict() == first.state_dict()


def seen_options(
    call_on="on_train_batch_after_step", accumulate=1, data=None, epochs=3
):
    """The options that a scheduler is built with."""
    given = []

    def build(opt, **options):
        given.append(options)
        return StepLR(opt, step_size=100)

    line_learner().fit(
        slope(10) if data is None else data,
        epochs,
        callbacks=[LRScheduler(build, call_on=call_on, total="auto", other=5)],
        accelerator=SingleDevice("cpu", accumulate=accumulate),
        dataloader_options={"batch_size": 2} if data is None else None,
        **OFF,
    )
    return given[0]


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 15),
        ({"accumulate": 2}, 9),
        ({"call_on": "on_train_batch_end"}, 15),
        ({"call_on": "on_epoch_end"}, 3),
        ({"call_on": "on_train_end", "epochs": (1, 4)}, 4),
    ],
)
def test_auto_is_how_often_the_scheduler_steps(options, total):
    assert seen_options(**options) == {"total": total, "other": 5}


def test_auto_of_an_unknown_length_is_refused_before_training():
    class Endless(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(zip(*slope(4), strict=True))

    loader = torch.utils.data.DataLoader(Endless(), batch_size=2)
    with pytest.raises(
        ValueError, match=r"LRScheduler\(total='auto'\): expected a known"
    ):
        seen_options(data=loader)
    assert seen_options(data=loader, call_on="on_epoch_end")["total"] == 3


def warm_up(opt, total_steps, steps=3):
    """Three steps of warm-up, then half a cosine."""
    schedulers = torch.optim.lr_scheduler
    first = schedulers.LinearLR(opt, 0.25, total_iters=steps)
    then = schedulers.CosineAnnealingLR(opt, total_steps - steps)
    return schedulers.SequentialLR(opt, [first, then], [steps])


def test_warm_up_by_torchs_schedulers_follows_the_formula():
    seen = []
    note = At(
        "on_train_batch_begin", lambda ctx: seen.append(ctx.opt.param_groups[0]["lr"])
    )
    callback = LRScheduler(
        warm_up, call_on="on_train_batch_after_step", total_steps="auto"
    )
    line_learner().fit(
        slope(10),
        2,
        callbacks=[note, callback],
        dataloader_options={"batch_size": 2},
        **OFF,
    )
    rise = [0.01 * (0.25 + 0.75 * step / 3) for step in range(3)]
    fall = [0.005 * (1 + math.cos(math.pi * step / 7)) for step in range(7)]
    assert seen == pytest.approx(rise + fall)


def test_warm_up_resumes_exactly(tmp_path):
    def callbacks(folder):
        return [
            LRScheduler(
                warm_up, call_on="on_train_batch_after_step", total_steps="auto"
            )
        ]

    case = Case(learner=adam, accumulate=2, callbacks=callbacks)
    check_exact(case, tmp_path, [("on_train_batch_end", k) for k in (5, 9)])


class OwnSchedule:
    """A scheduler of no library: it names its optimizer otherwise and has no state_dict."""

    def __init__(self, opt, factor=0.5):
        self.opt, self.factor, self.calls = opt, factor, 0

    def step(self):
        self.calls += 1
        for group in self.opt.param_groups:
            group["lr"] *= self.factor ** (self.calls % 2)


class OfCount:
    """A scheduler that is told a count, as those of timm."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, num_updates):
        self.optimizer.param_groups[0]["lr"] = 1 / num_updates


def test_scheduler_of_no_library_steps_and_resumes_exactly(tmp_path):
    at_steps = {"call_on": "on_train_batch_after_step"}
    case = Case(
        learner=adam, callbacks=lambda _: [LRScheduler(OwnSchedule, **at_steps)]
    )
    check_exact(case, tmp_path, [("on_train_batch_end", k) for k in (3, 8)])


def test_scheduler_whose_step_takes_a_count_gets_steps_or_epochs():
    seen, _ = rates(LRScheduler(OfCount), epochs=3)
    assert seen == [1e-3, 1e-3, 1, 1, 1 / 2, 1 / 2]
    seen, _ = rates(LRScheduler(OfCount, call_on="on_train_batch_after_step"), epochs=2)
    assert seen == [1e-3, 1, 1 / 2, 1 / 3]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ExponentialLR, {"gamma": 0.5}),
        (OneCycleLR, {"max_lr": 0.2, "total_steps": 9, "cycle_momentum": False}),
    ],
)
def test_scheduler_that_is_new_at_a_resume_begins_there(kind, options, tmp_path):
    data = {"dataloader_options": {"batch_size": 2}}
    learner = line_learner().set_opt_hparams(lr=1e-3)
    saver = harness.callbacks.ModelCheckpoint(tmp_path)
    learner.fit(slope(4), 1, callbacks=[saver], **data, **OFF)
    resume = harness.callbacks.ResumeFromCheckpoint(tmp_path)
    schedule = LRScheduler(kind, call_on="on_train_batch_after_step", **options)
    seen, _ = rates(schedule, resume, epochs=3)
    # The saved rate holds until the scheduler's first step.
    assert seen == [1e-3, *by_torch(kind, 4, **options)[1:]]
