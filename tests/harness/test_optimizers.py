"""What ``setup(optimizer=...)`` understands, and optimizers with modes of their own."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import harness
from tests.harness.exact import Case, X, Y, differences, sgd
from tests.harness.exact import fit as fit_case
from tests.harness.fakes import Line, line_learner, slope

OFF = {"tracker": False, "verbose": False, "seed": 0}


def fit(optimizer, **options):
    learner = harness.setup(Line, loss=nn.MSELoss(), optimizer=optimizer)
    return learner.set_opt_hparams(**options).fit(slope(8), 2, **OFF)


# ------------------------------------------------------------------ functions, partials


def by_model(model, lr):
    return {"w": SGD([model.w], lr), "b": SGD([model.b], 10 * lr)}


def by_parameters(anything, rate):
    return SGD(anything, lr=rate)


def test_functions_make_optimizers_of_parameters_or_of_the_model():
    wanted = line_learner().fit(slope(8), 2, **OFF)
    found = fit(by_parameters, rate=0.01)
    assert torch.equal(found.model.w, wanted.model.w)
    named = fit(by_model, lr=0.01)
    assert named.records["metrics"]["train"][0]["loss"].keys() == {"w", "b"}


def test_parts_of_the_losses_of_two_optimizers_are_logged_by_optimizer():
    def parts(pred, target):
        error = nn.functional.mse_loss(pred, target)
        return {"near": error, "far": 2 * error}

    learner = harness.setup(Line, loss=parts, optimizer=by_model)
    fitted = learner.set_opt_hparams(lr=0.01).fit(slope(8), 1, **OFF)
    row = fitted.records["metrics"]["train"][0]
    for name in ("w", "b"):
        assert row["far"][name] == pytest.approx(2 * row["near"][name])
        assert row["loss"][name] == pytest.approx(3 * row["near"][name])


def test_function_that_expects_the_model_is_told_how_to_get_it():
    with pytest.raises(TypeError, match=r"one of parameters\(\)\. Call .*'model'"):
        fit(lambda net: SGD(net.parameters(), 0.1))
    with pytest.raises(AttributeError, match="nothing"):
        fit(lambda params: SGD(list(params).nothing))  # type: ignore[attr-defined]


def test_partial_is_its_class_with_options_that_are_recorded_and_can_be_changed():
    learner = harness.setup(
        Line, loss=nn.MSELoss(), optimizer=partial(SGD, lr=0.5, momentum=0.9)
    ).set_opt_hparams(lr=0.01)
    assert learner.optimizer is SGD
    fitted = learner.fit(slope(8), 2, **OFF)
    assert fitted.opt_hparams == {"lr": 0.01, "momentum": 0.9}
    with pytest.raises(TypeError, match=r"argument of SGD, got 'learning_rate'"):
        learner.set_opt_hparams(learning_rate=1).fit(slope(8), 1, **OFF)


# --------------------------------------------------------------------------- modes


class TwoPoints(SGD):
    """Trains at one point, evaluates at another: the mean of the points so far."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        self.param_groups[0]["is_training"] = False

    def _swap(self, is_training):
        group = self.param_groups[0]
        if group["is_training"] == is_training:
            return
        group["is_training"] = is_training
        for param in group["params"]:
            state = self.state[param]
            if "other" in state:
                other = state["other"].clone()
                state["other"].copy_(param.detach())
                param.data.copy_(other)

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    @torch.no_grad()
    def step(self):
        group = self.param_groups[0]
        assert group["is_training"]
        super().step()
        for param in group["params"]:
            state = self.state[param]
            other = state.setdefault("other", param.detach().clone())
            other.lerp_(param, 0.5)


class Duck:
    """As ``TwoPoints``, but no optimizer of torch's; its mode is no part of its state."""

    def __init__(self, params, lr):
        self.base, self.is_training = TwoPoints(params, lr), False
        self.base.param_groups[0]["is_training"] = True
        for name in ("zero_grad", "state_dict", "load_state_dict"):
            setattr(self, name, getattr(self.base, name))

    param_groups = property(lambda self: self.base.param_groups)
    state = property(lambda self: self.base.state)

    def _swap(self, is_training):
        self.base.param_groups[0]["is_training"] = self.is_training
        self.base._swap(is_training)
        self.base.param_groups[0]["is_training"] = True
        self.is_training = is_training

    def train(self):
        self._swap(True)

    def eval(self):
        self._swap(False)

    def step(self):
        assert self.is_training
        self.base.step()


@pytest.mark.parametrize("kind", [TwoPoints, Duck])
def test_optimizers_are_told_to_train_and_to_evaluate(kind):
    x, y = slope(8)
    model = Line()
    opt = kind(model.parameters(), 0.01)
    means = []
    for _ in range(2):
        opt.train()
        for rows in (slice(0, 4), slice(4, 8)):
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            opt.step()
            opt.zero_grad()
        opt.eval()
        means.append(nn.functional.mse_loss(model(x), y).item())
    learner = harness.setup(Line, loss=nn.MSELoss(), optimizer=kind)
    fitted = learner.set_opt_hparams(lr=0.01).fit(
        (x, y), 2, (x, y), dataloader_options={"batch_size": 4, "shuffle": False}, **OFF
    )
    assert torch.equal(fitted.model.w, model.w)
    found = [row["loss"] for row in fitted.records["metrics"]["valid"]]
    assert found == pytest.approx(means)
    assert fitted.evaluate((x, y))["loss"] == found[-1]


class EndsEarly(harness.Callback):
    def on_train_batch_end(self):
        if self.ctx.step == 3:
            raise harness.EarlyStop


def test_fit_that_ends_inside_an_epoch_returns_the_weights_of_evaluation():
    made = []
    learner = harness.setup(
        Line,
        loss=nn.MSELoss(),
        optimizer=lambda p: made.append(TwoPoints(p, 0.01)) or made[0],  # type: ignore[func-returns-value]
    )
    options = {"dataloader_options": {"batch_size": 4}, "callbacks": [EndsEarly()]}
    learner.fit(slope(8), 2, **OFF, **options)
    assert made[0].param_groups[0]["is_training"] is False


@pytest.mark.parametrize("kind", [TwoPoints, Duck])
@pytest.mark.parametrize(
    "stop", [("on_train_batch_end", 8), ("on_valid_batch_end", 2), ("on_epoch_end", 1)]
)
def test_optimizer_with_modes_resumes_bit_for_bit(tmp_path: Path, kind, stop):
    learner = sgd()
    learner = harness.setup(learner.module, loss=learner.loss, optimizer=kind)
    case = Case(learner=lambda: learner.set_opt_hparams(lr=0.05), data=lambda: (X, Y))
    whole = fit_case(case, tmp_path / "whole")
    fit_case(case, tmp_path / "parts", stop)
    assert differences(whole, fit_case(case, tmp_path / "parts")) == []


# ------------------------------------------------------------------------ refusals

REFUSED = {
    "instance": (
        lambda: Adam(Line().parameters(), lr=0.5, betas=(0.5, 0.9)),
        r"got an instance of Adam\. Each fit .* Pass torch\.optim\.Adam, and "
        r"set_opt_hparams\(lr=0\.5, betas=\(0\.5, 0\.9\)\)",
    ),
    "own instance": (
        lambda: Duck(Line().parameters(), 0.1),
        r"got an instance of Duck\. .* Pass Duck, and set_opt_hparams\(\)",
    ),
    "instances": (
        lambda: {"a": Adam(Line().parameters())},
        r"got a dict\. For several optimizers, pass a function of the model",
    ),
    "name": (lambda: "adamw", r"got 'adamw'\. Pass for example torch\.optim\.AdamW"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_class_or_function_is_refused(name):
    make, match = REFUSED[name]
    with pytest.raises(
        TypeError, match=r"setup\(optimizer\): expected a class.*" + match
    ):
        harness.setup(Line, loss=nn.MSELoss(), optimizer=make())
