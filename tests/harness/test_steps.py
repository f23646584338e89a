from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import GradientClip, LRScheduler
from harness.errors import EarlyStop, SkipEpoch
from harness.steps import call_model
from tests.harness.event_lists import ACCUMULATED_BATCH, BATCH, VALID_BATCH
from tests.harness.fakes import At, Ear, Line, Tape, line_learner, slope

SGD = torch.optim.SGD


def fit(model, data=None, epochs=1, *callbacks, **options):
    """Fit untracked, in order, in batches of 2, with plain gradient descent."""
    data = slope(4) if data is None else data
    loader = {"batch_size": 2, "shuffle": False}
    options = {
        "accelerator": SingleDevice("cpu"),
        "dataloader_options": loader,
    } | options
    parts = {
        "optimizer": options.pop("optimizer", SGD),
        "loss": options.pop("loss", None),
    }
    learner = harness.setup(model, **parts)
    return learner.set_opt_hparams(lr=0.01).fit(
        data, epochs, callbacks=callbacks, tracker=False, verbose=False, **options
    )


def squared(model):
    return (model(model.ctx.input) - model.ctx.target).square().mean()


class Optimizes(Line):
    def step(self):
        self.ctx.pred = self(self.ctx.input)
        self.ctx.optimize(squared(self))


class OptimizesByName(Line):
    def step(self):
        with self.ctx.optimizing("opt"):
            self.ctx.optimize(squared(self))


class Returns(Line):
    def step(self):
        return squared(self)


class ReturnsOneElement(Line):
    def step(self):
        return squared(self).reshape(1, 1)


class StepsByAccelerator(Line):
    def step(self):
        loss = squared(self)
        self.ctx.loss["opt"] = loss.detach()
        if self.ctx.training:
            self.ctx.backward(loss)
            self.ctx.accelerator.step()
        return loss


class OptimizesAndReturns(Line):
    def step(self):
        loss = squared(self)
        self.ctx.optimize(loss)
        return loss


WAYS = [
    Optimizes,
    OptimizesByName,
    Returns,
    ReturnsOneElement,
    StepsByAccelerator,
    OptimizesAndReturns,
]


def train_by_hand(data, epochs, lr, max_norm, accumulate=1):
    """A plain loop: windows of batches of 2, clipped, the rate halved at each step."""
    model, losses = Line(), []
    opt = SGD(model.parameters(), lr)
    for _ in range(epochs):
        batches = list(zip(*(part.split(2) for part in data), strict=True))
        for start in range(0, len(batches), accumulate):
            window = batches[start : start + accumulate]
            for x, y in window:
                loss = (model(x) - y).square().mean()
                losses.append(loss.item())
                (loss / len(window) if accumulate > 1 else loss).backward()
            nn.utils.clip_grad_norm_(list(model.parameters()), max_norm)
            opt.step()
            opt.zero_grad()
            opt.param_groups[0]["lr"] /= 2
    return model, losses


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_own_step_equals_a_plain_loop_with_clipping_schedule_and_windows(
    way, accumulate
):
    data = slope(6)
    wanted, losses = train_by_hand(data, 2, 0.01, 0.5, accumulate)
    half = LRScheduler(
        torch.optim.lr_scheduler.StepLR,
        step_size=1,
        gamma=0.5,
        call_on="on_train_batch_after_step",
    )
    accelerator = SingleDevice("cpu", accumulate=accumulate)
    fitted = fit(way, data, 2, GradientClip(0.5), half, accelerator=accelerator)
    assert (fitted.model.w, fitted.model.b) == (wanted.w, wanted.b)
    found = [metrics["loss"] for metrics in fitted.records["metrics"]["train"]]
    assert found == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3], abs=1e-12)


@pytest.mark.parametrize("way", [Optimizes, Returns], ids=lambda way: way.__name__)
@pytest.mark.filterwarnings("ignore:.*step. expected the events of a step")
def test_own_step_that_optimizes_fires_the_events_of_the_default_one(way):
    tape = Tape()
    accelerator = SingleDevice("cpu", accumulate=2)
    fit(way, slope(4), 1, tape, valid_data=slope(2), accelerator=accelerator)
    batches = [*ACCUMULATED_BATCH, *BATCH]
    wanted = [event for event in batches if not event.endswith("after_pred")]
    assert [event for event in tape.events if "train_batch" in event] == wanted
    wanted = [event for event in VALID_BATCH if not event.endswith("after_pred")]
    assert [event for event in tape.events if "valid_batch" in event] == wanted


class Wgan(nn.Module):
    """Two named optimizers; one of them steps several times in a batch."""

    def __init__(self):
        super().__init__()
        self.critic, self.gen = Line(1.0, 0.5), Line(0.5, 0.25)

    def set_optimizers(self, lr):
        assert self.ctx.opt_hparams == {"lr": lr}
        return {
            name: SGD(getattr(self, name).parameters(), lr)
            for name in ("critic", "gen")
        }

    def losses(self, x):
        made = self.gen(x)
        return {
            "critic": lambda: (
                (self.critic(self.gen(x)) - self.critic(x)).square().mean()
            ),
            "gen": lambda: self.critic(made).square().mean(),
        }

    def step(self):
        ctx = self.ctx
        with ctx.optimizing("critic"):
            for _ in range(3):
                ctx.optimize(self.losses(ctx.input)["critic"]())
        with ctx.optimizing("gen"):
            ctx.optimize(self.losses(ctx.input)["gen"]())


def test_own_step_of_several_optimizers_equals_a_plain_loop():
    data, wanted = slope(4), Wgan()
    opts = {n: SGD(getattr(wanted, n).parameters(), 0.01) for n in ("critic", "gen")}
    for x in data[0].split(2):
        for name in ("critic", "critic", "critic", "gen"):
            wanted.zero_grad()
            wanted.losses(x)[name]().backward()
            opts[name].step()
    seen = []
    note = At(
        "on_train_batch_after_step",
        lambda ctx: seen.append((ctx.opt_name, ctx.steps[ctx.opt_name])),
    )
    fitted = fit(Wgan, data, 1, note, optimizer=None)
    found = fitted.model.state_dict()
    assert found == wanted.state_dict()
    assert seen == [
        *(("critic", step) for step in (1, 2, 3)),
        ("gen", 1),
        *(("critic", step) for step in (4, 5, 6)),
        ("gen", 2),
    ]
    assert set(fitted.records["metrics"]["train"][0]["loss"]) == {"critic", "gen"}
    assert set(fitted.evaluate(data).records["metrics"]["valid"][0]["loss"]) == {
        "critic",
        "gen",
    }


def test_optimizing_inside_another_one_returns_to_it():
    class Nested(Wgan):
        def step(self):
            ctx = self.ctx
            with ctx.optimizing("critic"):
                with ctx.optimizing("gen"):
                    ctx.optimize(self.losses(ctx.input)["gen"]())
                assert ctx.opt_name == "critic"
                assert not self.gen.w.requires_grad
                ctx.optimize(self.losses(ctx.input)["critic"]())
            assert self.gen.w.requires_grad
            assert self.critic.w.requires_grad

    assert fit(Nested, optimizer=None).records["metrics"]["train"]


@pytest.mark.parametrize(
    ("step", "match"),
    [
        (lambda ctx: ctx.optimizing("genn"), "got 'genn'. Did you mean 'gen'"),
        (lambda ctx: ctx.optimizing(), "got None. Choose from"),
        (lambda ctx: ctx.optimize(torch.zeros(())), "expected 'with ctx.optimizing"),
    ],
)
def test_optimizer_that_is_not_named_is_refused(step, match):
    class Wrong(Wgan):
        def step(self):
            step(self.ctx)

    with pytest.raises(ValueError, match=match):
        fit(Wrong, optimizer=None)


# --- losses


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("is_own", [True, False])
def test_loss_of_one_element_is_averaged_over_rows_whatever_its_shape(shape, is_own):
    class Own(Line):
        def step(self):
            loss = squared(self).reshape(shape)
            self.ctx.loss = loss.detach()
            if self.ctx.training:
                self.ctx.backward(loss)
                self.ctx.accelerator.step()

    class Default(Line):
        def loss(self, pred, target):
            return (pred - target).square().mean().reshape(shape)

    # Targets 0, 2 and 4, predictions 0: (0 + 4) / 2 over two rows, 16 over one.
    fitted = fit(
        Own if is_own else Default,
        slope(3),
        valid_data=slope(3),
        dataloader_options={"batch_size": 2, "shuffle": False, "drop_last": False},
        optimizer=lambda params, lr: SGD(params, lr=0.0),
    )
    (train,), (valid,) = fitted.records["metrics"].values()
    assert (train["loss"], valid["loss"]) == pytest.approx((20 / 3, 20 / 3))


@pytest.mark.parametrize("is_own", [True, False])
def test_loss_in_parts_is_summed_and_logged_by_name(is_own):
    def parts(pred, target):
        error = pred - target
        return {
            "mse": error.square().mean(),
            "l1": error.abs().mean().reshape(1),
            "c": 2.0,
        }

    class Own(Line):
        def step(self):
            self.ctx.pred = self(self.ctx.input)
            return parts(self.ctx.pred, self.ctx.target)

    class Default(Line):
        def loss(self, pred, target):
            return parts(pred, target)

    # Errors 0, 2 and 4: squares 20 / 3, absolute 2.
    options = {"batch_size": 2, "shuffle": False, "drop_last": False}
    fitted = fit(
        Own if is_own else Default,
        slope(3),
        valid_data=slope(3),
        dataloader_options=options,
        optimizer=lambda params, lr: SGD(params, lr=0.0),
    )
    wanted = {"loss": 20 / 3 + 4, "mse": 20 / 3, "l1": 2.0, "c": 2.0}
    for split in ("train", "valid"):
        assert fitted.records["metrics"][split][0] == pytest.approx(wanted)


def test_loss_of_a_step_that_steps_by_itself_is_recorded():
    class ByHand(Line):
        def step(self):
            self.ctx.pred = self(self.ctx.input)
            loss = nn.functional.mse_loss(self.ctx.pred, self.ctx.target)
            if self.ctx.training:
                self.ctx.opt.zero_grad()
                loss.backward()
                self.ctx.opt.step()
            return loss

    class Default(Line):
        def loss(self, pred, target):
            return nn.functional.mse_loss(pred, target)

    by_hand, wanted = (fit(model, slope(3)) for model in (ByHand, Default))
    assert by_hand.records["metrics"] == wanted.records["metrics"]


WRONG = {
    "vector": (
        lambda error: error.square(),
        ValueError,
        r"one element, got shape \(2,\)",
    ),
    "empty": (lambda error: error[:0], ValueError, r"one element, got shape \(0,\)"),
    "number": (lambda error: 1.5, TypeError, "one element, got 1.5"),
    "tuple": (
        lambda error: (error.mean(), error),
        TypeError,
        r"one element, got tuple of \(float32 \(\), float32 \(2,\)\)",
    ),
    "nothing": (lambda error: {}, ValueError, r"names other than 'loss', got \[\]"),
    "total": (
        lambda error: {"loss": error.mean(), "a": error.mean()},
        ValueError,
        "names other than 'loss', got",
    ),
    "total beside predictions": (
        lambda error: {"loss": error.mean(), "preds": error},
        ValueError,
        "names other than 'loss', got",
    ),
    "part": (lambda error: {"a": error}, ValueError, r"loss\['a'\]: expected a tensor"),
    "no graph": (lambda error: torch.ones(()), ValueError, "loss with gradients"),
}


@pytest.mark.parametrize("name", WRONG)
def test_loss_of_a_wrong_kind_is_refused_at_the_first_batch(name):
    wrong, kind, match = WRONG[name]

    class Wrong(Line):
        def loss(self, pred, target):
            return wrong(pred - target)

    tape = Tape()
    with pytest.raises(kind, match=match):
        fit(Wrong, slope(4), 1, tape)
    assert "on_train_batch_end" not in tape.events


@pytest.mark.parametrize("loss", [torch.ones(2), "a"])
def test_loss_of_a_wrong_kind_set_by_an_own_step_is_refused(loss):
    class Wrong(Line):
        def step(self):
            self.ctx.loss = {"opt": loss}

    with pytest.raises((TypeError, ValueError), match=r"ctx\.loss: expected a tensor"):
        fit(Wrong)


# --- what is told


def test_own_step_that_steps_nothing_is_told_once():
    class Silent(Line):
        def step(self):
            self.ctx.pred = self(self.ctx.input)

    match = "Silent.step: expected an optimizer step in epoch 1, got none"
    with pytest.warns(UserWarning, match=match) as told:
        fit(Silent, slope(4), 3)
    assert len(told) == 1


def test_listener_whose_event_cannot_fire_is_told():
    class Plain(Line):
        def step(self):
            squared(self).backward()
            self.ctx.opt.step()
            self.ctx.opt.zero_grad()

    with pytest.warns(
        UserWarning, match="got none for GradientClip.on_train_batch_before_step"
    ):
        fit(Plain, slope(4), 2, GradientClip())


def test_compiled_model_has_its_context():
    def build():
        return torch.compile(Returns(), backend="eager")

    fitted = fit(build)
    assert fitted.records["metrics"]["train"][0]["loss"] > 0
    assert "ctx" not in vars(fitted.model)
    assert "ctx" not in vars(fitted.model._orig_mod)


# --- values logged in a batch


def test_log_metric_in_a_batch_gives_the_mean_over_rows_of_the_epoch():
    class Logs(Line):
        def loss(self, pred, target):
            self.ctx.log_metric("mean", target.mean())
            return (pred - target).square().mean()

    # Targets 0, 2, 4: means 1 of two rows and 4 of one.
    late = At("on_train_batch_end", lambda ctx: ctx.log_metric("late", float(ctx.iter)))
    options = {"batch_size": 2, "shuffle": False, "drop_last": False}
    fitted = fit(
        Logs, slope(3), 2, late, valid_data=slope(3), dataloader_options=options
    )
    for split in ("train", "valid"):
        assert [row["mean"] for row in fitted.records["metrics"][split]] == [2.0, 2.0]
    assert [row["late"] for row in fitted.records["metrics"]["train"]] == [4 / 3, 4 / 3]


def test_log_metric_in_a_batch_counts_the_rows_that_are_set_in_it():
    class Tokens(Line):
        def step(self):
            self.ctx.log_metric("tokens", self.ctx.input.mean())
            self.ctx.rows = int(self.ctx.input.sum())
            return squared(self)

    # Inputs 0 1 and 2 3: means 0.5 with 1 token, 2.5 with 5.
    fitted = fit(Tokens)
    assert fitted.records["metrics"]["train"][0]["tokens"] == pytest.approx(13 / 6)


def test_log_metric_in_a_batch_records_each_call_at_its_step():
    ear = Ear()
    note = At("on_train_batch_end", lambda ctx: ctx.log_metric("x", ctx.iter / 2))
    listen = At("on_fit_begin", lambda ctx: setattr(ctx, "run", ear))
    fit(Optimizes, slope(6), 2, listen, note)
    found = [(values["x"], step) for _, values, step, _ in ear.steps if "x" in values]
    assert found == [(n / 2, step) for step, n in enumerate([1, 2, 3, 1, 2, 3], 1)]
    epochs = [
        (said["value"]["x"], said["index"])
        for said in ear.heard
        if "x" in said["value"]
    ]
    assert epochs == [(1.0, 1), (1.0, 2)]


@pytest.mark.parametrize("value", ["text", torch.ones(2), None, [1.0]])
def test_log_metric_in_a_batch_refuses_what_has_no_mean(value):
    log = At("on_train_batch_end", lambda ctx: ctx.log_metric("x", value))
    with pytest.raises(
        (TypeError, ValueError), match=r"ctx.log_metric\('x'\): expected"
    ):
        fit(Optimizes, slope(4), 1, log)


# --- context, handlers, schedulers


def test_step_opt_is_the_default_one_unless_replaced():
    seen = []
    note = At("on_fit_begin", lambda ctx: seen.append(ctx.step_opt))
    fit(Optimizes, slope(4), 1, note)
    assert seen == [harness.accelerators.default_step_opt]


@pytest.mark.parametrize("signal", [SkipEpoch, EarlyStop])
def test_signal_ends_an_evaluation_and_a_prediction_quietly(signal):
    def stop(ctx):
        if ctx.iter == 2:
            raise signal

    fitted = line_learner().fit(slope(2), 1, tracker=False, verbose=False)
    options = {"dataloader_options": {"batch_size": 2}}
    events = ["on_valid_batch_end", "on_predict_batch_end"]
    calls = [At(event, stop) for event in events]
    records = fitted.evaluate(slope(6), callbacks=calls[:1], **options).records
    assert records["metrics"]["valid"] == []
    assert len(fitted.predict(slope(6)[0], callbacks=calls[1:], **options)) == 2


def test_handler_of_ones_own_ends_an_evaluation_quietly():
    handled = []

    def install(ctx):
        ctx.handlers[KeyError] = handled.append

    def fail(ctx):
        raise KeyError("x")

    fitted = line_learner().fit(slope(2), 1, tracker=False, verbose=False)
    calls = [At("on_valid_begin", install), At("on_valid_batch_end", fail)]
    fitted.evaluate(slope(2), callbacks=calls)
    assert [type(error) for error in handled] == [KeyError]


@pytest.mark.parametrize("event", ["on_train_batch_end", "on_valid_batch_end"])
def test_scheduler_at_a_batch_event_steps_for_each_of_several_optimizers(event):
    halves = [
        LRScheduler(
            torch.optim.lr_scheduler.StepLR,
            step_size=1,
            gamma=0.5,
            opt_name=name,
            call_on=event,
        )
        for name in ("critic", "gen")
    ]
    fitted = fit(Wgan, slope(4), 2, *halves, valid_data=slope(4), optimizer=None)
    rates = fitted.records["lr"]["train"]
    assert rates == [dict.fromkeys(("critic", "gen"), 0.01 / 2**n) for n in (2, 4)]


def wants_value(optimizer, seen):
    """A scheduler that keeps each value that it is given."""

    class Given(torch.optim.lr_scheduler.StepLR):
        def step(self, value):
            seen.append(value)

        def _initial_step(self):
            pass

    return Given(optimizer, 1)


@pytest.mark.parametrize("event", ["on_epoch_end", "on_train_batch_end"])
def test_scheduler_whose_step_wants_a_value_gets_its_monitor_or_the_loss(event):
    seen, losses = [], []
    note = At("on_train_batch_end", lambda ctx: losses.append(float(ctx.loss["opt"])))
    scheduler = LRScheduler(wants_value, call_on=event, monitor="train/loss", seen=seen)
    fitted = fit(Optimizes, slope(4), 2, note, scheduler)
    epochs = [row["loss"] for row in fitted.records["metrics"]["train"]]
    assert seen == (epochs if event == "on_epoch_end" else losses)


class Point(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


PACKED = pack_sequence([torch.ones(3), torch.ones(2)])


@pytest.mark.parametrize(
    "batch",
    [(Point(torch.ones(2), torch.ones(2)), None), (PACKED, torch.ones(2)), PACKED],
    ids=["named-tuple", "packed", "packed-alone"],
)
def test_default_step_passes_a_named_tuple_as_one_argument(batch):
    class Takes(Line):
        def forward(self, found):
            given.append(found)
            return found[0].sum() * self.w

    given = []
    whole = batch if batch is PACKED else batch[0]
    loader = DataLoader([batch], batch_size=None)
    fitted = fit(Takes, loader, loss=lambda pred, target: pred, dataloader_options=None)
    fitted.predict(loader)
    assert [type(item) for item in given] == [type(whole)] * 2
    assert all(item[0] is whole[0] for item in given)


def test_call_model_takes_a_forward_without_a_hash() -> None:
    class Forward:
        __hash__ = None  # type: ignore[assignment]

        def __eq__(self, other: object) -> bool:
            return False

        def __call__(self, x: Any) -> Any:
            return x

    model: Any = torch.nn.Module()
    model.forward = Forward()
    assert call_model(model, {"x": 3, "labels": 4}) == 3


def test_batch_with_fewer_items_than_the_loss_needs_is_refused():
    class Weighted(nn.Module):
        def forward(self, pred, target, weights):
            return (weights * (pred - target).square()).mean()

    data, rows = (*slope(4), torch.ones(4)), slope(4)
    with pytest.raises(
        TypeError, match=r"expected batches of 3 items for Weighted, got 2\."
    ):
        line_learner(loss=Weighted()).fit(data, 1, rows, tracker=False, verbose=False)
