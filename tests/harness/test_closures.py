"""Optimizers that evaluate the loss several times in a step: LBFGS and the like."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import LBFGS

import harness
from harness.accelerators.base import needs_closure
from harness.accelerators.single import SingleDevice
from harness.callbacks import EMA, GradientClip
from harness.errors import EarlyStop, SkipEpoch
from tests.harness.exact import Case, differences
from tests.harness.exact import fit as fit_case
from tests.harness.fakes import Ear, Line, Tape, fit_context, slope

OPTIONS = {"line_search_fn": "strong_wolfe", "max_iter": 4}
X = torch.linspace(-1, 1, 12).reshape(-1, 1)
DATA = (X, X.square())


class Curve(nn.Sequential):
    """A small network, whose weights are drawn under the seed of the fit."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1))

    def error(self):
        self.ctx.pred = self(self.ctx.input)
        self.ctx.log_metric("calls", 1.0)
        return (self.ctx.pred - self.ctx.target).square().mean()


class OptimizesFunction(Curve):
    def step(self):
        self.ctx.optimize(self.error)


class ReturnsLoss(Curve):
    def step(self):
        return self.error()


class OptimizesTensor(Curve):
    def step(self):
        self.ctx.optimize(self.error())


def fit(model=Curve, *callbacks, optimizer=LBFGS, epochs=2, options=OPTIONS, **more):
    loss = None if hasattr(model, "step") else nn.MSELoss()
    learner = harness.setup(model, loss=loss, optimizer=optimizer)
    return learner.set_opt_hparams(**options).fit(
        DATA,
        epochs,
        callbacks=callbacks,
        dataloader_options={"batch_size": 6, "shuffle": False},
        seed=1,
        verbose=False,
        **{"tracker": False, "accelerator": SingleDevice("cpu")} | more,
    )


def train_by_hand(make_optimizer, epochs=2, max_norm=None):
    """A plain loop; the mean over each epoch of the losses before the steps."""
    torch.manual_seed(1)
    model, means = Curve(), []
    opt = make_optimizer(model.parameters())
    for _ in range(epochs):
        losses = []
        for x, y in zip(X.split(6), DATA[1].split(6), strict=True):

            def closure(x=x, y=y, found=losses, own=[]):  # noqa: B006  per batch
                opt.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                found.append(loss.item())
                if max_norm is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), max_norm)
                return loss

            start = len(losses)
            opt.step(closure)
            del losses[start + 1 :]
        means.append(sum(losses) / len(losses))
    return list(model.parameters()), means


def losses_of(fitted):
    return [row["loss"] for row in fitted.records["metrics"]["train"]]


def is_same(model, params):
    return all(map(torch.equal, model.parameters(), params))


@pytest.mark.parametrize("model", [Curve, OptimizesFunction, ReturnsLoss])
def test_lbfgs_equals_a_plain_loop_and_records_the_first_evaluations(model):
    params, means = train_by_hand(lambda own: LBFGS(own, **OPTIONS))
    fitted = fit(model)
    assert is_same(fitted.model, params)
    assert losses_of(fitted) == pytest.approx(means)


def test_gradients_of_every_evaluation_are_clipped_and_the_first_norm_is_recorded():
    params, _ = train_by_hand(lambda own: LBFGS(own, **OPTIONS), max_norm=0.1)
    seen = []

    class Norms(harness.Callback):
        weight = -1  # before GradientClip

        def on_train_batch_before_step(self):
            grads = [param.grad for param in self.ctx.model.parameters()]
            seen.append(
                (self.ctx.iter, self.ctx.is_repeated, nn.utils.get_total_norm(grads))  # type: ignore[attr-defined]
            )

    fitted = fit(Curve, GradientClip(0.1), Norms(), epochs=1)
    again = fit(Curve, GradientClip(0.1))
    assert is_same(again.model, params)
    first = [float(norm) for _, is_repeated, norm in seen if not is_repeated]
    assert len(first) == 2 < len(seen)
    recorded = fitted.records["metrics"]["train"][0]["grad_norm"]
    assert recorded == pytest.approx(sum(first) / 2)


def test_each_evaluation_fires_its_events_and_the_step_ends_once():
    tape = Tape()
    fit(Curve, tape, epochs=1, options={"max_iter": 2})
    evaluation = [
        "on_train_batch_after_pred",
        "on_train_batch_after_loss",
        "on_train_batch_before_backward",
        "on_train_batch_before_step",
    ]
    step = ["on_train_batch_begin", *evaluation, *evaluation]
    step += ["on_train_batch_after_step", "on_train_batch_end"]
    found = [event for event in tape.events if event.startswith("on_train_batch_")]
    assert found == 2 * step


def test_values_logged_in_a_step_are_recorded_once():
    model, run = OptimizesFunction(), Ear()
    ctx = fit_context(
        model=model, optimizers=LBFGS(model.parameters(), **OPTIONS), loss_fn=None
    )
    ctx.run, ctx.batch, ctx.loss, ctx.batch_values = run, DATA, {}, []
    ctx.backward = lambda loss: ctx.accelerator.backward(loss, ctx.opt_name)
    model.step()
    assert len(run.steps) == len(ctx.batch_values) == 1
    assert torch.equal(ctx.loss["opt"], ctx.loss_grad.detach())


@pytest.mark.parametrize("signal", [EarlyStop, SkipEpoch])
def test_signal_inside_a_step_waits_until_it_is_done(signal):
    seen = []

    class Raises(harness.Callback):
        def on_train_batch_after_pred(self):
            seen.append(self.ctx.is_repeated)  # type: ignore[attr-defined]
            if len(seen) == 2:
                raise signal

        def on_train_batch_after_step(self):
            seen.append("step")

    fit(Curve, Raises(), epochs=1, options={"max_iter": 3})
    assert seen == [False, True, True, "step"]
    # An epoch that is left leaves an optimizer that can go on.
    fit(Curve, Raises(), epochs=2, options={"max_iter": 3})
    assert len(seen) > 8 or signal is EarlyStop


class Unlucky(Exception):
    pass


def test_handled_exception_inside_a_step_leaves_an_optimizer_that_can_go_on():
    class Raises(harness.Callback):
        count = 0

        def on_fit_begin(self):
            self.ctx.epoch_handlers[Unlucky] = lambda _: None

        def on_train_batch_after_pred(self):
            self.count += 1
            if self.count == 2:
                raise Unlucky

    fitted = fit(Curve, Raises(), epochs=3)
    assert len(fitted.records["metrics"]["train"]) == 3


class Sharpness(torch.optim.SGD):
    """Sharpness-aware minimization: the gradient of the step is taken at a worse point."""

    @torch.no_grad()
    def step(self, closure):
        params = [param for group in self.param_groups for param in group["params"]]
        scale = 0.05 / nn.utils.get_total_norm([param.grad for param in params])
        moves = [param.grad * scale for param in params]
        for param, move in zip(params, moves, strict=True):
            param.data.add_(move)
        closure()
        for param, move in zip(params, moves, strict=True):
            param.data.sub_(move)
        return super().step()


def test_optimizer_that_needs_a_closure_and_does_not_say_so_has_a_hint():
    class Silent(Sharpness):
        def step(self, closure=None):
            assert closure is not None
            return super().step(closure)

    learner = harness.setup(Curve, loss=nn.MSELoss(), optimizer=Silent)
    with pytest.raises(AssertionError) as caught:
        learner.set_opt_hparams(lr=0.1).fit(DATA, 1, tracker=False)
    assert any(
        "Silent.step was called without" in one for one in caught.value.__notes__
    )


def test_error_of_a_step_that_is_not_about_a_closure_has_no_hint_of_one():
    class Fails(torch.optim.SGD):
        def step(self, closure=None):
            raise TypeError("a wrong type")

    learner = harness.setup(Curve, loss=nn.MSELoss(), optimizer=Fails)
    with pytest.raises(TypeError) as caught:
        learner.set_opt_hparams(lr=0.1).fit(DATA, 1, tracker=False)
    assert not any("closure" in one for one in caught.value.__notes__)


def test_own_optimizer_that_moves_before_its_closure_sees_the_loss_there():
    torch.manual_seed(1)
    model = Curve()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for x, y in zip(X.split(6), DATA[1].split(6), strict=True):
        nn.functional.mse_loss(model(x), y).backward()
        grads = [param.grad for param in model.parameters()]
        scale = 0.05 / nn.utils.get_total_norm(grads)
        moves = [grad * scale for grad in grads]
        torch._foreach_add_([p.data for p in model.parameters()], moves)
        opt.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        torch._foreach_sub_([p.data for p in model.parameters()], moves)
        opt.step()
        opt.zero_grad()
    fitted = fit(Curve, optimizer=Sharpness, options={"lr": 0.1}, epochs=1)
    assert is_same(fitted.model, model.parameters())


class AdamThenLBFGS(Curve):
    """Two optimizers of the same weights, one after the other."""

    def set_optimizers(self):
        params = list(self.parameters())
        return {"adam": torch.optim.Adam(params, 0.01), "lbfgs": LBFGS(params)}

    def step(self):
        with self.ctx.optimizing("adam" if self.ctx.epoch == 1 else "lbfgs"):
            self.ctx.optimize(self.error)


def test_two_optimizers_share_the_weights_one_after_the_other():
    callbacks = [EMA(0.5)]
    fitted = fit(AdamThenLBFGS, *callbacks, optimizer=None, options={})
    torch.manual_seed(1)
    model = Curve()
    adam, lbfgs = AdamThenLBFGS.set_optimizers(model).values()
    for opt in (adam, lbfgs):
        for x, y in zip(X.split(6), DATA[1].split(6), strict=True):

            def closure(x=x, y=y, opt=opt):
                opt.zero_grad()
                loss = nn.functional.mse_loss(model(x), y)
                loss.backward()
                return loss

            opt.step(closure)
    assert callbacks[0].counts == {"adam": 2, "lbfgs": 4}
    trained = fit(AdamThenLBFGS, optimizer=None, options={})
    assert is_same(trained.model, model.parameters())
    assert not is_same(fitted.model, model.parameters())


def test_evaluations_of_an_optimizer_leave_the_gradients_of_the_others():
    def both(model):
        return {"w": LBFGS([model.w], max_iter=3), "b": torch.optim.SGD([model.b], 0.1)}

    learner = harness.setup(Line, loss=nn.MSELoss(), optimizer=both)
    fitted = learner.fit(slope(8), 2, tracker=False, verbose=False)
    model = Line()
    opts, (x, y) = both(model), slope(8)

    def closure():
        (model.w.grad,) = torch.autograd.grad(nn.MSELoss()(model(x), y), [model.w])
        return nn.MSELoss()(model(x), y)

    for _ in range(2):
        opts["w"].step(closure)
        (model.b.grad,) = torch.autograd.grad(nn.MSELoss()(model(x), y), [model.b])
        opts["b"].step()
    torch.testing.assert_close(fitted.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("event", ["on_train_batch_end", "on_valid_batch_end"])
def test_lbfgs_resumes_bit_for_bit(tmp_path: Path, event):
    case = Case(
        learner=lambda: harness.setup(
            Curve, loss=nn.MSELoss(), optimizer=LBFGS
        ).set_opt_hparams(**OPTIONS),
        data=lambda: DATA,
        valid=DATA,
        epochs=3,
        options={"batch_size": 4},
    )
    whole = fit_case(case, tmp_path / "whole")
    assert fit_case(case, tmp_path / "parts", (event, 4))["signum"]
    assert differences(whole, fit_case(case, tmp_path / "parts")) == []


# ------------------------------------------------------------------------ refusals


def test_computed_loss_is_refused_in_an_own_step():
    with pytest.raises(
        TypeError,
        match=r"expected a function that returns the loss, which LBFGS evaluates several",
    ):
        fit(OptimizesTensor)


@pytest.mark.parametrize("option", [{"accumulate": 2}, {"precision": "fp16"}])
def test_accumulated_and_scaled_gradients_are_refused(option):
    with pytest.raises(
        ValueError, match=r"accelerator: expected accumulate=1 and no 'fp16' with 'opt'"
    ):
        fit(accelerator=SingleDevice("cpu", **option))


@pytest.mark.parametrize(
    ("optimizer", "needed"), [(LBFGS, True), (torch.optim.SGD, False)]
)
def test_schedule_that_replaces_the_step_changes_no_need(optimizer, needed):
    opt = optimizer([nn.Parameter(X.clone())])
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    assert needs_closure(schedule.optimizer) is needed
