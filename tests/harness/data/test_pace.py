"""How long a fit trains, how often it validates, how many batches it takes."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import EarlyStopping, KeepBestModel, LRScheduler
from harness.data.pace import limit_loader
from tests.harness.fakes import At, Line, Tape, line_learner, net_learner, points, slope

STEPS = torch.optim.lr_scheduler.StepLR
SETS = {"clean": slope(4), "shifted": slope(6)}


class Endless(IterableDataset[Any]):
    """Points of the line, without an end."""

    def __iter__(self) -> Any:
        x = 0.0
        while True:
            x = (x + 1) % 7
            yield torch.tensor(x), torch.tensor(2 * x)


class Used(IterableDataset[Any]):
    """A stream that can be read once."""

    def __init__(self) -> None:
        self.rows = iter([(torch.tensor(1.0), torch.tensor(2.0))] * 4)

    def __iter__(self) -> Any:
        return self.rows


def fit(data: Any = None, learner: Any = None, **options: Any) -> harness.Fitted:
    """Fit a line, in batches of 2 of 12 rows."""
    size = None if isinstance(data, DataLoader) else {"batch_size": 2}
    options = {"seed": 1, "tracker": False, "dataloader_options": size} | options
    learner = learner or line_learner()
    data = slope(12) if data is None else data
    return learner.fit(data, verbose=False, **options)


def places(fitted: harness.Fitted, split: str, name: str = "loss") -> list[int]:
    """Indices at which a metric was recorded."""
    frame = fitted.get_metrics()
    chosen = (frame["set"] == split) & (frame["metric"] == name)
    return list(frame[chosen][fitted.unit])


def seen(event: str, look: Any) -> tuple[At, list[Any]]:
    """A callback that looks at the context at an event, and what it saw."""
    found: list[Any] = []
    return At(event, lambda ctx: found.append(look(ctx))), found


# ----------------------------------------------------------------------- max_steps


@pytest.mark.parametrize(
    ("options", "steps", "epochs"),
    [
        ({"max_steps": 8}, 8, 2),
        ({"max_steps": 8, "epochs": 1}, 6, 1),
        ({"max_steps": 6}, 6, 1),
        ({"max_steps": 8, "epochs": (1, 5)}, 8, 2),
        ({"max_steps": 3, "accelerator": SingleDevice("cpu", accumulate=4)}, 3, 2),
        ({"data": DataLoader(Endless(), 2), "max_steps": 7}, 7, 1),
    ],
)
def test_max_steps_ends_the_fit_and_closes_the_epoch(
    options: dict[str, Any], steps: int, epochs: int
) -> None:
    tape = Tape()
    end, counts = seen("on_fit_end", lambda ctx: (ctx.step, ctx.epoch, ctx.index))
    fitted = fit(valid_data=slope(4), callbacks=[tape, end], **options)
    assert counts == [(steps, epochs, epochs)]
    assert tape.events.count("on_train_batch_after_step") == steps
    last = ["on_train_end", "on_valid_begin", "on_valid_end", "on_epoch_end"]
    ends = [event for event in tape.events if event in last]
    assert ends == last * epochs
    assert tape.events[-2:] == ["on_epoch_end", "on_fit_end"]
    assert places(fitted, "train") == places(fitted, "valid") == [*range(1, epochs + 1)]


def test_max_steps_trains_as_a_plain_loop_does() -> None:
    x, y = slope(12)
    fitted = fit(DataLoader([*zip(x, y, strict=True)], 5), max_steps=4)
    line = Line()
    opt = torch.optim.SGD(line.parameters(), lr=0.01)
    for rows in ([0, 5], [5, 10], [10, 12], [0, 5]):
        opt.zero_grad()
        at = slice(*rows)
        nn.functional.mse_loss(line(x[at]), y[at]).backward()
        opt.step()
    for name, value in fitted.model.state_dict().items():
        assert torch.equal(value, line.state_dict()[name])
    # The open epoch has seen five rows.
    assert len(fitted.records["metrics"]["train"]) == 2


class TwoPaces(Line):
    """A critic that steps three times a batch, and a generator that steps once."""

    def set_optimizers(self, lr: float = 0.01) -> dict[str, Any]:
        return {
            "critic": torch.optim.SGD([self.w], lr=lr),
            "gen": torch.optim.SGD([self.b], lr=lr),
        }

    def step(self) -> None:
        ctx = self.ctx
        for name in ["critic"] * (3 if ctx.training else 1) + ["gen"]:
            with ctx.optimizing(name):
                ctx.pred = self(ctx.input)
                ctx.optimize(nn.functional.mse_loss(ctx.pred, ctx.target))


def test_steps_of_several_optimizers_are_those_of_the_busiest() -> None:
    end, counts = seen("on_fit_end", lambda ctx: (dict(ctx.steps), ctx.total_steps))
    fitted = fit(
        learner=harness.setup(TwoPaces),
        max_steps=8,
        valid_every="5 steps",
        valid_data=slope(4),
        callbacks=[end],
    )
    # A batch is finished: 9 steps of the critic, and 5 are passed in the second batch.
    assert counts == [({"critic": 9, "gen": 3}, 8)]
    assert places(fitted, "valid", "loss/critic") == [6, 9]


@pytest.mark.filterwarnings("ignore:Idle.step. expected an optimizer step")
@pytest.mark.parametrize("data", [DataLoader(Used(), 2), None])
def test_fit_of_steps_that_never_come_is_ended(data: Any) -> None:
    class Idle(Line):
        def step(self) -> None:
            self.ctx.pred = self(self.ctx.input)

    learner = None
    if data is None:
        learner = harness.setup(Idle, optimizer=torch.optim.SGD)
    msg = "expected optimizer steps, got none in 3 epochs"
    with pytest.raises(ValueError, match=msg):
        fit(data, learner, max_steps=100)


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"epochs": 3}, 18),
        ({"epochs": 3, "max_steps": 8}, 8),
        ({"epochs": 1, "max_steps": 8}, 6),
        ({"max_steps": 8}, 8),
        ({"data": DataLoader(Endless(), 2), "max_steps": 3}, 3),
        ({"data": DataLoader(Endless(), 2), "max_steps": 3, "epochs": 9}, None),
        ({"epochs": 2, "limit_batches": 4}, 8),
    ],
)
def test_total_steps_are_known_where_they_can_be(
    options: dict[str, Any], total: int | None
) -> None:
    begin, totals = seen("on_fit_begin", lambda ctx: ctx.total_steps)
    fit(callbacks=[begin], **options)
    assert totals == [total]


@pytest.mark.parametrize(
    ("call_on", "options", "calls"),
    [
        ("on_train_batch_after_step", {"max_steps": 8}, 8),
        ("on_train_batch_after_step", {"max_steps": 8, "epochs": 1}, 6),
        ("on_train_batch_end", {"max_steps": 8}, 8),
        ("on_epoch_end", {"max_steps": 8}, 2),
        ("on_train_batch_end", {"limit_batches": 2, "epochs": 3}, 6),
        ("on_valid_batch_end", {"limit_batches": 2, "epochs": 3}, 12),
        ("on_valid_end", {"epochs": 3}, 3),
        (
            "on_train_batch_begin",
            {"max_steps": 3, "accelerator": SingleDevice("cpu", accumulate=4)},
            10,
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_auto_counts_the_steps_of_the_scheduler(
    call_on: str, options: dict[str, Any], calls: int
) -> None:
    called, sizes = [], []

    def make(opt: Any, size: Any) -> Any:
        sizes.append(size)
        scheduler = STEPS(opt, size)
        step = scheduler.step
        scheduler.step = lambda: (called.append(1), step())  # type: ignore[assignment, func-returns-value, misc]
        return scheduler

    schedule = LRScheduler(make, call_on=call_on, size="auto")
    fit(valid_data=SETS, callbacks=[schedule], **options)
    assert (sizes, len(called)) == ([calls], calls)


# ---------------------------------------------------------------------- valid_every


def test_validation_by_steps_divides_the_training_of_an_epoch() -> None:
    tape = Tape()
    fit(epochs=2, valid_data=slope(2), valid_every="4 steps", callbacks=[tape])
    kept = ("on_epoch_begin", "on_epoch_end", "on_fit_end")
    kept += ("on_train_begin", "on_train_batch_end", "on_train_end")  # type: ignore[assignment]
    kept += ("on_valid_begin", "on_valid_end")  # type: ignore[assignment]
    batch, end = ["on_train_batch_end"], ["on_train_end"]
    valid = ["on_valid_begin", "on_valid_end"]
    assert [event for event in tape.events if event in kept] == [
        *("on_epoch_begin", "on_train_begin", *batch * 4, *end, *valid),
        *("on_train_begin", *batch * 2, *end, "on_epoch_end"),
        *("on_epoch_begin", "on_train_begin", *batch * 2, *end, *valid),
        *("on_train_begin", *batch * 4, *end, *valid, "on_epoch_end"),
        "on_fit_end",
    ]


@pytest.mark.parametrize(
    ("options", "unit", "validated"),
    [
        ({"valid_every": 2, "epochs": 5}, "epoch", [2, 4, 5]),
        ({"valid_every": "2 epochs", "epochs": 4}, "epoch", [2, 4]),
        ({"valid_every": "1 Step", "max_steps": 3}, "step", [1, 2, 3]),
        ({"valid_every": "4steps", "epochs": 2}, "step", [4, 8, 12]),
        ({"valid_every": "5 steps", "max_steps": 8}, "step", [5, 8]),
        (
            {
                "data": DataLoader(Endless(), 2),
                "valid_every": "10 steps",
                "max_steps": 25,
            },
            "step",
            [10, 20, 25],
        ),
    ],
)
def test_validation_comes_as_often_as_asked(
    options: dict[str, Any], unit: str, validated: list[int]
) -> None:
    fitted = fit(valid_data=SETS, **options)
    assert fitted.unit == unit
    assert places(fitted, "clean") == places(fitted, "shifted") == validated
    assert set(places(fitted, "train")) >= (set(validated) if unit == "step" else set())


def test_training_metrics_are_of_the_rows_since_the_last_validation() -> None:
    x, y = slope(8)
    data = DataLoader([*zip(x, y, strict=True)], 2)
    fitted = fit(
        data,
        line_learner().set_opt_hparams(lr=0.0),
        epochs=1,
        valid_data=(x, y),
        valid_every="3 steps",
    )
    # The line is 0 everywhere, so that losses are means of the squared targets.
    frame = fitted.get_metrics()
    found = {(s, at): value for s, _, at, value in frame.itertuples(index=False)}
    squares = (y**2).tolist()
    assert found == {
        ("train", 3): pytest.approx(sum(squares[:6]) / 6),
        ("train", 4): pytest.approx(sum(squares[6:]) / 2),
        ("valid", 3): pytest.approx(sum(squares) / 8),
        ("valid", 4): pytest.approx(sum(squares) / 8),
    }


def test_training_does_not_depend_on_how_often_it_is_validated() -> None:
    data = points(22)
    valid = DataLoader(TensorDataset(*data), 4, shuffle=True)
    train = DataLoader(TensorDataset(*data), 4, shuffle=True)
    options: dict[str, Any] = {
        "learner": net_learner(),
        "epochs": 3,
        "accelerator": SingleDevice("cpu", accumulate=2),
    }
    alone = fit(train, **options).model.state_dict()
    for every in ("1 step", "4 steps", 2):
        fitted = fit(train, valid_data=valid, valid_every=every, **options)
        for name, value in fitted.model.state_dict().items():
            assert torch.equal(value, alone[name]), every


class Slow(Line):
    """Two optimizers of which one steps at each batch, and one at every second."""

    def set_optimizers(self) -> dict[str, Any]:
        return {
            "fast": torch.optim.SGD([self.w], lr=0.01),
            "slow": torch.optim.SGD([self.b], lr=0.01),
        }

    def step(self) -> None:
        ctx = self.ctx
        for name in ("fast", "fast", "slow") if ctx.training else ("fast", "slow"):
            with ctx.optimizing(name):
                ctx.pred = self(ctx.input)
                ctx.optimize(nn.functional.mse_loss(ctx.pred, ctx.target))


def test_open_window_survives_a_validation_by_steps() -> None:
    fits = [
        fit(
            learner=harness.setup(Slow),
            epochs=2,
            accelerator=SingleDevice("cpu", accumulate=2),
            **options,
        )
        for options in ({}, {"valid_data": slope(4), "valid_every": "1 step"})
    ]
    one, two = (fitted.model.state_dict() for fitted in fits)
    assert one["b"] != 0
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_modes_are_those_of_training_after_a_validation_by_steps() -> None:
    look, modes = seen("on_train_batch_begin", lambda ctx: ctx.model.training)
    other, valid = seen("on_valid_batch_begin", lambda ctx: ctx.model.training)
    fit(epochs=1, valid_data=slope(2), valid_every="2 steps", callbacks=[look, other])
    assert all(modes)
    assert not any(valid)


@pytest.mark.parametrize(
    ("options", "step", "epoch"),
    [({"valid_every": "2 steps"}, 6, 1), ({"valid_every": 2}, 18, 3)],
)
def test_early_stopping_counts_validations(
    options: dict[str, Any], step: int, epoch: int
) -> None:
    stop = EarlyStopping("shifted/loss", patience=2, baseline=-1.0)
    end, counts = seen("on_fit_end", lambda ctx: (ctx.step, ctx.epoch))
    if options["valid_every"] == 2:
        options = options | {"epochs": 3}  # validated at epochs 2 and 3
    else:
        options = options | {"epochs": 9}
        stop = EarlyStopping("shifted/loss", patience=3, baseline=-1.0)
    fit(valid_data=SETS, callbacks=[stop, end], **options)
    assert counts == [(step, epoch)]
    assert stop.waited == stop.patience


def test_early_stopping_by_steps_respects_min_epochs() -> None:
    stop = EarlyStopping("shifted/loss", patience=1, baseline=-1.0)
    end, steps = seen("on_fit_end", lambda ctx: ctx.step)
    fit(epochs=(1, 5), valid_data=SETS, valid_every="2 steps", callbacks=[stop, end])
    assert steps == [6]


def test_best_model_by_steps_is_that_of_its_step() -> None:
    grow = At(
        "on_train_batch_end",
        lambda ctx: ctx.model.w.fill_([9.0, 5.0, 2.0, 7.0, 8.0, 9.0][ctx.iter - 1]),
    )
    learner = line_learner().set_opt_hparams(lr=0.0)
    fitted = fit(
        learner=learner,
        epochs=1,
        valid_data=slope(4),
        valid_every="1 step",
        callbacks=[KeepBestModel(), grow],
    )
    assert fitted.model.w.item() == 2.0
    assert (fitted.best_step, fitted.best_epoch) == (3, 1)
    assert "6 steps, weights of step 3" in str(fitted)


def test_plateau_steps_after_each_validation_and_others_after_each_epoch() -> None:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    by_metric = LRScheduler(plateau, patience=0, threshold=1e9, factor=0.5)
    by_epoch = LRScheduler(STEPS, step_size=1)
    for schedule, last in ((by_metric, 2), (by_epoch, 1)):
        end, counts = seen(
            "on_fit_end", lambda ctx, own=schedule: own.scheduler.last_epoch
        )
        fitted = fit(
            epochs=1,
            valid_data=slope(2),
            valid_every="3 steps",
            callbacks=[schedule, end],
        )
        assert counts == [last]
        rates = [(n + 1) for n, own in enumerate(fitted.records["lr"]["train"]) if own]
        assert rates == [3, 6]


# -------------------------------------------------------------------- limit_batches


@pytest.mark.parametrize(
    ("limits", "batches"),
    [
        (2, (2, 2, 2)),
        (100, (6, 2, 3)),
        (0.5, (3, 1, 1)),
        ({"train": 4}, (4, 2, 3)),
        ({"valid": 1}, (6, 1, 1)),
        ({"valid": 1, "shifted": 2, "train": 1.0}, (6, 1, 2)),
    ],
)
def test_limits_end_each_pass(limits: Any, batches: tuple[int, ...]) -> None:
    fitted = fit(epochs=2, valid_data=SETS, limit_batches=limits)
    profile = fitted.records["profile"]
    found = [
        {epoch["batches"] for epoch in profile[name]}
        for name in ("train", "clean", "shifted")
    ]
    assert found == [{count} for count in batches]


@pytest.mark.parametrize("data", [None, DataLoader(Endless(), 2)])
def test_limited_pass_has_a_short_last_window(data: Any) -> None:
    look, steps = seen("on_train_end", lambda ctx: ctx.step)
    accelerator = SingleDevice("cpu", accumulate=2)
    fit(data, epochs=2, limit_batches=3, accelerator=accelerator, callbacks=[look])
    assert steps == [2, 4]


def test_limited_pass_trains_on_the_same_first_batches() -> None:
    data = points(22)
    whole, some = [], []
    for found, limits in ((whole, None), (some, {"train": 3})):
        look = At("on_train_batch_begin", lambda ctx, f=found: f.append(ctx.input))
        fit(data, net_learner(), epochs=1, limit_batches=limits, callbacks=[look])
    assert len(some) == 3
    assert all(torch.equal(a, b) for a, b in zip(some, whole, strict=False))


# ------------------------------------------------------- metrics every so many epochs


def constant(pred: Any, target: Any) -> float:
    return 1.0


def test_metric_is_computed_in_some_epochs_only() -> None:
    calls: list[int] = []

    def costly(pred: Any, target: Any) -> float:
        calls.append(len(pred))
        return 2.0

    metrics = harness.MetricSet({"a": constant, "b": costly}, every={"b": 2})
    stop = EarlyStopping("valid/b", mode="max", patience=2)
    learner = line_learner(metrics=metrics)
    end, epochs = seen("on_fit_end", lambda ctx: ctx.epoch)
    fitted = fit(learner=learner, epochs=9, valid_data=slope(4), callbacks=[stop, end])
    assert epochs == [6]  # the values of epochs 4 and 6 are no improvement
    assert places(fitted, "valid", "b") == places(fitted, "train", "b") == [2, 4, 6]
    assert places(fitted, "valid", "a") == [*range(1, 7)]
    assert len(calls) == 3 * (6 + 2)
    assert fitted.evaluate(slope(4))["b"] == 2.0


def test_metric_of_some_validations_by_steps() -> None:
    metrics = harness.MetricSet({"a": constant}, every={"a": 2})
    fitted = fit(
        learner=line_learner(metrics=metrics),
        epochs=1,
        valid_data=slope(2),
        valid_every="1 step",
    )
    assert places(fitted, "valid", "a") == places(fitted, "train", "a") == [2, 4, 6]
    assert not math.isnan(fitted.get_metrics()["value"].sum())


def test_limited_loader_can_be_copied():
    loader = limit_loader(DataLoader(TensorDataset(torch.arange(8.0)), 2), 3, "train")
    assert len(copy.copy(loader)) == len(list(copy.deepcopy(loader))) == 3
