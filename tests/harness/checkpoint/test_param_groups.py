from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, ExponentialLR, LambdaLR

import harness
from harness.callbacks import LRScheduler, ModelCheckpoint, ResumeFromCheckpoint
from harness.errors import CheckpointError
from tests.harness.stops import Line, fit, fit_with_stop, sgd


class Two(nn.Module):
    """A body that is frozen at first."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.body.requires_grad_(False)

    def forward(self, x):
        return self.head(self.body(x))

    def set_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9)


class Unfreeze(harness.Callback):
    """Adds a group in the second epoch."""

    def on_epoch_begin(self) -> None:
        if self.ctx.epoch == 2:
            body = self.ctx.model.body.requires_grad_(True)
            group = {"params": [*body.parameters()], "lr": 0.01}
            self.ctx.opt.add_param_group(group)


class Regroup(harness.Callback):
    """Moves a parameter to a new group, and back in another order."""

    def on_train_batch_end(self) -> None:
        opt = self.ctx.opt
        if self.ctx.step == 2:
            moved = opt.param_groups[0]["params"].pop()
            opt.add_param_group({"params": [moved], "lr": 0.5})
        if self.ctx.step == 4:
            last = opt.param_groups.pop()
            opt.param_groups[0]["params"].insert(0, last["params"][0])


class Drop(harness.Callback):
    """Stops to step a parameter, and steps it again later."""

    def on_train_batch_end(self) -> None:
        params = self.ctx.opt.param_groups[0]["params"]
        if self.ctx.step == 2:
            self.dropped = params.pop()
        if self.ctx.step == 5:
            params.append(self.ctx.model.fc.bias)


CHANGES: dict[str, tuple[Any, Any]] = {
    "added": (lambda: harness.setup(Two, loss=nn.MSELoss()), Unfreeze),
    "regrouped": (sgd, Regroup),
    "no longer stepped": (sgd, Drop),
}


@pytest.mark.parametrize("name", CHANGES)
def test_resume_after_a_change_of_groups_equals_the_unbroken_fit(
    name: str, tmp_path: Path
) -> None:
    make, change = CHANGES[name]
    whole = fit(make(), [change()])
    for stop in (2, 3, 4):
        folder = tmp_path / str(stop)
        resumed, _ = fit_with_stop(make, stop, folder, lambda: [change()])
        for key, value in whole.model.state_dict().items():
            assert torch.equal(value, resumed.model.state_dict()[key]), (stop, key)


def test_added_group_is_restored_where_no_callback_adds_it(tmp_path):
    make = CHANGES["added"][0]
    whole = fit(make(), [Unfreeze()], epochs=4)
    fit(make(), [Unfreeze(), ModelCheckpoint(tmp_path)], epochs=2)
    resume = ResumeFromCheckpoint(tmp_path, strict=True)
    resumed = fit(make(), [resume], epochs=4)
    assert torch.equal(whole.model.body.weight, resumed.model.body.weight)


def part_of(*names: str, split: bool = False) -> type[Line]:
    class Part(Line):
        def set_optimizers(self):
            params = [dict(self.named_parameters())[name] for name in names]
            groups = [{"params": [p]} for p in params] if split else params
            return torch.optim.SGD(groups, lr=0.1, momentum=0.9)

    return Part


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (part_of("fc.weight"), r"\['fc.bias'\] in one of both only"),
        (part_of("fc.weight", "fc.bias", split=True), "got other groups of them"),
    ],
)
def test_learner_with_other_groups_is_refused(model, match, tmp_path):
    first = harness.setup(part_of("fc.weight", "fc.bias"), loss=nn.MSELoss())
    fit(first, [ModelCheckpoint(tmp_path)], epochs=1)
    with pytest.raises(CheckpointError, match=match):
        fit(harness.setup(model, loss=nn.MSELoss()), [ResumeFromCheckpoint(tmp_path)])


def test_learner_with_parameters_in_another_order_resumes_exactly(tmp_path):
    one, two = part_of("fc.weight", "fc.bias"), part_of("fc.bias", "fc.weight")
    one.__qualname__ = two.__qualname__ = "Part"
    learners = [harness.setup(model, loss=nn.MSELoss()) for model in (one, two)]
    whole = fit(learners[0])
    fit(learners[0], [ModelCheckpoint(tmp_path)], epochs=1)
    resumed = fit(learners[1], [ResumeFromCheckpoint(tmp_path, strict=True)])
    assert torch.equal(whole.model.fc.bias, resumed.model.fc.bias)


class Rates(harness.Callback):
    """Keeps the rate of each batch."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self) -> None:
        self.seen.append(self.ctx.opt.param_groups[0]["lr"])


SCHEDULES: dict[str, tuple[Any, list[float]]] = {
    "none": (list, [0.01, 0.01]),
    "exponential": (lambda: [LRScheduler(ExponentialLR, gamma=0.5)], [0.0025, 0.00125]),
    "lambda": (
        lambda: [LRScheduler(LambdaLR, lr_lambda=lambda epoch: 0.5**epoch)],
        [0.0025, 0.00125],
    ),
    "cosine": (
        lambda: [LRScheduler(CosineAnnealingLR, T_max=4)],
        [0.005, 0.01 * (1 - 2**-0.5) / 2],
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_rate_that_the_user_changes_is_used_and_told(name, tmp_path, capsys):
    schedule, expected = SCHEDULES[name]
    fit(sgd(lr=0.05), [*schedule(), ModelCheckpoint(tmp_path)], epochs=2)
    rates, resume = Rates(), ResumeFromCheckpoint(tmp_path)
    fit(sgd(lr=0.01), [*schedule(), rates, resume], epochs=4)
    assert rates.seen[::2] == pytest.approx(expected)
    strict = ResumeFromCheckpoint(tmp_path, strict=True)
    with pytest.raises(CheckpointError, match=r"lr \(opt, group 0\): saved 0.05, now"):
        fit(sgd(lr=0.01), [*schedule(), strict], epochs=4)


def test_option_that_only_training_changed_is_restored(tmp_path):
    class Change(harness.Callback):
        def on_epoch_begin(self) -> None:
            if self.ctx.epoch == 1:
                self.ctx.optimizers["opt"].param_groups[0]["momentum"] = 0.3

    make = lambda: [Change()]  # noqa: E731
    whole = fit(sgd(), make())
    resumed, _ = fit_with_stop(sgd, 3, tmp_path, make)
    assert torch.equal(whole.model.fc.weight, resumed.model.fc.weight)


def test_parameter_that_the_user_freezes_stays_frozen(tmp_path):
    class Frozen(Line):
        def __init__(self) -> None:
            super().__init__()
            self.fc.bias.requires_grad_(False)

    Frozen.__qualname__ = Line.__qualname__
    Frozen.__module__ = Line.__module__
    half = fit(sgd(), [ModelCheckpoint(tmp_path)], epochs=1)
    fitted = fit(sgd(Frozen), [ResumeFromCheckpoint(tmp_path)], epochs=3)
    assert torch.equal(half.model.fc.bias, fitted.model.fc.bias)
    assert not torch.equal(half.model.fc.weight, fitted.model.fc.weight)
    with pytest.raises(CheckpointError, match=r"fc.bias are frozen in one of the two"):
        fit(sgd(Frozen), [ResumeFromCheckpoint(tmp_path, strict=True)])


def test_scheduler_of_another_class_is_refused(tmp_path):
    fit(sgd(), [LRScheduler(ExponentialLR, gamma=0.5), ModelCheckpoint(tmp_path)])
    other = LRScheduler(CosineAnnealingLR, T_max=4)
    with pytest.raises(CheckpointError, match="state of CosineAnnealingLR, got that"):
        fit(sgd(), [other, ResumeFromCheckpoint(tmp_path)], epochs=5)
