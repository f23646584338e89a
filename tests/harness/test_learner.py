from __future__ import annotations

import os
import random
import subprocess
import sys
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.regression import MeanSquaredError

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import EarlyStopping, Metrics, Profile
from harness.metrics.sets import MetricSet
from tests.harness.fakes import At, Line, Net, line_learner, net_learner, points, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def equal_bits(model: nn.Module, other: nn.Module) -> bool:
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    return all(torch.equal(mine[name], theirs[name]) for name in mine)


# --- the same bits as a hand-written loop


def by_hand(make_optimizer, data, valid, epochs, seed, batch_size=8):
    """The plain loop: torch's DataLoader, dropout, validation after each epoch."""
    torch.manual_seed(seed)
    train = DataLoader(data, batch_size, shuffle=True, drop_last=True)
    loader = DataLoader(valid, batch_size)
    model = Net()
    opt = make_optimizer(model.parameters())
    loss_fn = nn.CrossEntropyLoss()
    for _ in range(epochs):
        model.train()
        for x, y in train:
            loss = loss_fn(model(x), y)
            opt.zero_grad()
            loss.backward()
            opt.step()
        model.eval()
        with torch.no_grad():
            for x, y in loader:
                loss_fn(model(x), y)
    return model


OPTIMIZERS = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fit_gives_the_bits_of_a_hand_written_loop(name):
    kind, options = OPTIMIZERS[name]
    data, valid = TensorDataset(*points(45)), TensorDataset(*points(13, seed=1))
    expected = by_hand(lambda params: kind(params, **options), data, valid, 3, seed=5)
    learner = net_learner(
        optimizer=kind, metrics=[MulticlassAccuracy(3)]
    ).set_opt_hparams(**options)
    fitted = learner.fit(
        data, 3, valid, seed=5, dataloader_options={"batch_size": 8}, **OFF
    )
    assert equal_bits(fitted.model, expected)


def test_fit_with_a_loader_of_ones_own_gives_the_same_bits():
    data, valid = TensorDataset(*points(45)), TensorDataset(*points(13, seed=1))
    sgd = torch.optim.SGD
    expected = by_hand(lambda params: sgd(params, lr=0.1), data, valid, 2, seed=5)
    train = DataLoader(data, 8, shuffle=True, drop_last=True)
    fitted = net_learner().fit(train, 2, DataLoader(valid, 8), seed=5, **OFF)
    assert equal_bits(fitted.model, expected)


class Rows(Dataset):
    """A data set that draws random numbers itself, as augmentation does."""

    def __init__(self):
        self.x, self.y = points(20)

    def __len__(self):
        return 20

    def __getitem__(self, place):
        return self.x[place] + torch.randn(2) * 0.1, self.y[place]


def test_fit_with_random_augmentation_gives_the_bits_of_a_hand_written_loop():
    valid = TensorDataset(*points(4))
    sgd = torch.optim.SGD
    expected = by_hand(lambda params: sgd(params, lr=0.1), Rows(), valid, 2, seed=3)
    options = {"batch_size": 8}
    fitted = net_learner().fit(
        Rows(), 2, valid, seed=3, dataloader_options=options, **OFF
    )
    assert equal_bits(fitted.model, expected)


class Gan(nn.Module):
    """A player that makes points and one that tells them from real ones."""

    ctx: Any

    def __init__(self):
        super().__init__()
        self.gen = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))
        self.disc = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1))

    def forward(self, x):
        return self.disc(self.gen(x))

    def loss(self, pred, target):
        if self.ctx.opt_name == "gen":
            return nn.functional.softplus(-pred).mean()
        real = self.disc(target)
        fake = nn.functional.softplus(pred).mean()
        return nn.functional.softplus(-real).mean() + fake

    def set_optimizers(self, lr=0.05):
        return {
            "gen": torch.optim.Adam(self.gen.parameters(), lr),
            "disc": torch.optim.Adam(self.disc.parameters(), lr),
        }


@pytest.mark.parametrize("accumulate", [1, 2])
def test_fit_of_two_players_gives_the_bits_of_a_hand_written_loop(accumulate):
    x, y = torch.randn(8, 2), torch.randn(8, 2)
    torch.manual_seed(7)
    model = Gan()
    opts = model.set_optimizers()
    held: dict[str, list[Any]] = {"gen": [], "disc": []}
    for start in (0, 2, 4, 6, 0, 2, 4, 6):
        a, b = x[start : start + 2], y[start : start + 2]
        for name, opt in opts.items():
            pred = model(a)
            loss = nn.functional.softplus(-pred).mean()
            if name == "disc":
                real = nn.functional.softplus(-model.disc(b)).mean()
                loss = real + nn.functional.softplus(pred).mean()
            params = [p for group in opt.param_groups for p in group["params"]]
            held[name].append(torch.autograd.grad(loss / accumulate, params))
            if len(held[name]) == accumulate:
                for param, *grads in zip(params, *held[name], strict=True):
                    param.grad = sum(grads[1:], start=grads[0])
                opt.step()
                held[name].clear()
    fitted = harness.setup(Gan).fit(
        (x, y),
        2,
        seed=7,
        dataloader_options={"batch_size": 2, "shuffle": False},
        accelerator=SingleDevice("cpu", accumulate=accumulate),
        **OFF,
    )
    assert equal_bits(fitted.model, model)
    assert set(fitted.records["metrics"]["train"][0]["loss"]) == {"gen", "disc"}


def test_fit_of_two_players_leaves_every_parameter_trainable():
    fitted = harness.setup(Gan).fit((torch.ones(4, 2), torch.ones(4, 2)), 1, **OFF)
    assert all(param.requires_grad for param in fitted.model.parameters())


def test_fit_of_two_players_keeps_what_was_frozen_frozen():
    class Partly(Gan):
        def __init__(self):
            super().__init__()
            self.disc[0].weight.requires_grad_(False)

    data = (torch.ones(4, 2), torch.ones(4, 2))
    fitted = harness.setup(Partly).fit(data, 1, **OFF)
    asking = [param.requires_grad for param in fitted.model.disc.parameters()]
    assert asking == [False, True, True, True]


# --- seeds


def test_fit_with_a_seed_gives_the_same_bits_again():
    data = points(40)
    first, again, other = (
        net_learner().fit(data, 2, 0.2, seed=seed, **OFF).model for seed in (1, 1, 2)
    )
    assert equal_bits(first, again)
    assert not equal_bits(first, other)


def test_fit_with_a_seed_sets_all_generators():
    drawn = []

    def draw(ctx):
        drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))

    for seed in (3, np.int64(3)):
        callback = At("on_fit_begin", draw)
        line_learner().fit(slope(2), 1, callbacks=[callback], seed=seed, **OFF)
    assert drawn[0] == drawn[1]


def test_fit_without_a_seed_goes_on_with_the_callers_generators():
    data = points(40)
    torch.manual_seed(4)
    first = net_learner().fit(data, 1, **OFF).model
    again = net_learner().fit(data, 1, seed=4, **OFF).model
    assert equal_bits(first, again)


def test_fit_gives_the_same_bits_tracked_or_not(tmp_path):
    data = points(40)
    learner = net_learner(metrics=[MulticlassAccuracy(3)])
    tracker = {"runs_dir": tmp_path, "delivery": False}
    off = learner.fit(data, 2, 0.2, seed=1, **OFF)
    on = learner.fit(data, 2, 0.2, seed=1, tracker=tracker, verbose=False)
    assert equal_bits(on.model, off.model)
    assert on.records["metrics"] == off.records["metrics"]
    assert (off.run_id, off.run_path) == (None, None)
    assert on.run_path == tmp_path / on.run_id


# --- the model's own ways


def one_step(learner, **options):
    """Weights after one step on the row x = 1, y = 2, from w = b = 0."""
    data = (torch.ones(1), torch.full((1,), 2.0))
    fitted = learner.fit(data, 1, **OFF | options)
    return fitted.model.w.item(), fitted.model.b.item()


# d (w + b - 2)^2 / dw = 2 (0 - 2) = -4; lr 0.01 gives 0.04.
SQUARED = pytest.approx((0.04, 0.04))
# d |w + b - 2| / dw = -1; lr 0.01 gives 0.01.
ABSOLUTE = pytest.approx((0.01, 0.01))


class OwnLoss(Line):
    def loss(self, pred, target):
        return (pred - target).abs().mean()


def test_loss_of_the_model_is_used():
    learner = harness.setup(OwnLoss, optimizer=torch.optim.SGD)
    assert one_step(learner.set_opt_hparams(lr=0.01)) == ABSOLUTE


def test_loss_given_to_setup_goes_before_the_models():
    learner = harness.setup(OwnLoss, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    assert one_step(learner.set_opt_hparams(lr=0.01)) == SQUARED


def test_loss_may_be_a_module_of_the_class():
    class WithLoss(Line):
        loss = nn.L1Loss()

    learner = harness.setup(WithLoss, optimizer=torch.optim.SGD)
    assert one_step(learner.set_opt_hparams(lr=0.01)) == ABSOLUTE


def test_loss_of_the_model_sees_the_context():
    class Scaled(Line):
        def loss(self, pred, target):
            return (pred - target).square().mean() * self.ctx.hparams["w"]

    learner = harness.setup(Scaled, optimizer=torch.optim.SGD)
    learner = learner.set_opt_hparams(lr=0.01).set_hparams(w=0.5)
    # w = 0.5: d 0.5 (0.5 + b - 2)^2 / dw = 0.5 * 2 * -1.5 = -1.5
    assert one_step(learner) == pytest.approx((0.515, 0.015))


def test_set_optimizers_of_the_model_gets_the_options():
    class OwnOptimizer(Line):
        def set_optimizers(self, lr, only_w=False):
            params = [self.w] if only_w else self.parameters()
            return torch.optim.SGD(params, lr=lr)

    learner = harness.setup(OwnOptimizer, loss=nn.MSELoss())
    assert one_step(learner.set_opt_hparams(lr=0.01)) == SQUARED
    learner = learner.set_opt_hparams(lr=0.01).set_opt_hparams(only_w=True)
    assert one_step(learner) == pytest.approx((0.04, 0.0))


def test_optimizer_given_to_setup_goes_before_the_models():
    class OwnOptimizer(Line):
        def set_optimizers(self, lr):
            raise AssertionError

    learner = harness.setup(OwnOptimizer, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    assert one_step(learner.set_opt_hparams(lr=0.01)) == SQUARED


def test_step_of_the_model_serves_training_and_validation():
    seen = []

    class OwnStep(Line):
        def step(self):
            ctx = self.ctx
            ctx.pred = self(ctx.input)
            loss = (ctx.pred - ctx.target).abs().mean()
            if ctx.training:
                ctx.opt.zero_grad()
                loss.backward()
                ctx.opt.step()
            ctx.loss = {"opt": loss.detach()}
            seen.append((ctx.training, ctx.step, torch.is_grad_enabled()))

    learner = harness.setup(OwnStep, optimizer=torch.optim.SGD)
    learner = learner.set_opt_hparams(lr=0.01)
    data = (torch.ones(1), torch.full((1,), 2.0))
    fitted = learner.fit(data, 1, data, **OFF)
    assert (fitted.model.w.item(), fitted.model.b.item()) == ABSOLUTE
    assert seen == [(True, 1, True), (False, 1, False)]
    assert fitted.records["metrics"]["train"][0]["loss"] == 2.0
    assert fitted.records["metrics"]["valid"][0]["loss"] == pytest.approx(1.98)


@pytest.mark.filterwarnings("ignore:.*step. expected an optimizer step")
def test_step_of_the_model_needs_no_loss():
    class OwnStep(Line):
        def step(self):
            self.ctx.pred = None

    fitted = harness.setup(OwnStep, optimizer=torch.optim.SGD).fit(slope(2), 1, **OFF)
    assert fitted.records["metrics"]["train"] == []


@pytest.mark.parametrize("way", ["setup", "model"])
def test_backward_of_ones_own_is_called_and_the_optimizer_steps(way):
    called = []

    def backward(loss):
        called.append(loss.item())
        (loss / 2).backward()

    class OwnBackward(Line):
        def backward(self, loss):
            backward(loss)

    model: Any = OwnBackward if way == "model" else Line
    learner = harness.setup(
        model,
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD,
        backward=backward if way == "setup" else None,
    )
    assert one_step(learner.set_opt_hparams(lr=0.01)) == pytest.approx((0.02, 0.02))
    assert called == [4.0]


def test_backward_of_ones_own_may_call_the_accelerators():
    class OwnBackward(Line):
        def backward(self, loss):
            self.ctx.accelerator.backward(loss, self.ctx.opt_name)

    learner = harness.setup(OwnBackward, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    assert one_step(learner.set_opt_hparams(lr=0.01)) == SQUARED


def test_backward_of_ones_own_counts_within_a_window():
    steps = []
    learner = line_learner(backward=lambda loss: loss.backward())
    note = At("on_train_batch_end", lambda ctx: steps.append(ctx.step))
    learner.fit(
        slope(4),
        1,
        callbacks=[note],
        dataloader_options={"batch_size": 1},
        accelerator=SingleDevice("cpu", accumulate=2),
        **OFF,
    )
    assert steps == [0, 1, 1, 2]


def test_predict_of_the_model_is_used():
    class OwnPredict(Line):
        def predict(self, x):
            return self(x) + 100

    learner = harness.setup(OwnPredict, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    fitted = learner.set_opt_hparams(lr=0.0).fit(slope(2), 1, **OFF)
    assert fitted.predict(torch.ones(3)).tolist() == [100.0, 100.0, 100.0]


def test_module_may_be_a_function():
    def make(w):
        return Line(w=w, b=1.0)

    learner = harness.setup(make, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    fitted = learner.set_hparams(w=3.0).set_opt_hparams(lr=0.0).fit(slope(2), 1, **OFF)
    assert fitted.predict(torch.ones(1)).item() == 4.0


@pytest.mark.parametrize("is_text_first", [True, False])
def test_averages_weight_batches_by_rows_whatever_comes_first(is_text_first):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, row):
            items = {"text": f"row {row}", "x": torch.full((1,), float(row))}
            return items if is_text_first else dict(reversed(items.items()))

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, text, x):
            return x + 0 * self.w

    learner = harness.setup(
        Mean,
        loss=lambda pred, target: pred.mean(),
        optimizer=torch.optim.SGD,
        metrics={"mean": lambda pred, target: pred.mean()},
    )
    loader = DataLoader(Rows(), batch_size=4)
    fitted = learner.fit(loader, 1, valid_data=loader, **OFF)
    assert fitted.records["metrics"]["valid"] == [{"loss": 2.0, "mean": 2.0}]


# --- epochs


def test_epochs_as_a_number_run_all():
    fitted = line_learner().fit(slope(2), 3, **OFF)
    assert len(fitted.records["metrics"]["train"]) == 3


def test_epochs_as_a_pair_hold_back_early_stopping():
    class Best(EarlyStopping):
        """Nothing is ever better."""

        def update_best(self):
            return False

    for pair, ran in (((0, 5), 1), ((3, 5), 3), ((5, 5), 5)):
        fitted = line_learner().fit(
            slope(2), pair, callbacks=[Best("train/loss")], **OFF
        )
        assert len(fitted.records["metrics"]["train"]) == ran


def test_fit_with_the_target_in_place_of_epochs_says_how_data_is_given():
    with pytest.raises(TypeError) as refused:
        line_learner().fit(torch.zeros(64, 1), torch.zeros(64, 1))
    (told,) = str(refused.value).splitlines()
    assert told.endswith("Data is one argument: fit((input, target), epochs).")
    assert len(told) < 160


def test_epochs_in_a_pair_of_three_are_refused():
    with pytest.raises(ValueError, match=r"epochs: expected a pair .*got \(1, 2, 3\)"):
        line_learner().fit(slope(2), (1, 2, 3), **OFF)  # type: ignore[arg-type]


def test_callbacks_that_are_no_list_are_refused():
    with pytest.raises(TypeError, match=r"callbacks: expected a list .*Write \["):
        line_learner().fit(slope(2), 1, callbacks=EarlyStopping(), **OFF)  # type: ignore[arg-type]


# --- forms of data


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*slope(4), strict=True))


class Plain(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, place):
        return slope(4)[0][place], slope(4)[1][place]


X, Y = slope(4)
IN_ORDER = {"batch_size": 2, "shuffle": False}


@pytest.mark.parametrize(
    ("data", "options"),
    [
        pytest.param((X, Y), IN_ORDER, id="tuple of tensors"),
        pytest.param([X, Y], IN_ORDER, id="list of tensors"),
        pytest.param((X.numpy(), Y.double().numpy()), IN_ORDER, id="arrays"),
        pytest.param(TensorDataset(X, Y), IN_ORDER, id="tensor data set"),
        pytest.param(Plain(), IN_ORDER, id="own data set"),
        pytest.param(Stream(), {"batch_size": 2}, id="stream"),
        pytest.param(DataLoader(Plain(), batch_size=2), None, id="loader"),
        pytest.param([(X[:2], Y[:2]), (X[2:], Y[2:])], None, id="list of batches"),
    ],
)
def test_fit_takes_data_in_every_form(data, options, request):
    if "batches" in request.node.callspec.id:
        data = DataLoader(data, batch_size=None)
    expected = line_learner().fit((X, Y), 2, dataloader_options=IN_ORDER, **OFF)
    fitted = line_learner().fit(data, 2, dataloader_options=options, **OFF)
    assert equal_bits(fitted.model, expected.model)
    valid = fitted.evaluate(data)["loss"]
    assert valid == pytest.approx(expected.evaluate((X, Y))["loss"], rel=1e-6)
    preds = fitted.predict(data)
    assert torch.allclose(preds, expected.predict((X, Y)))


def test_fit_of_one_tensor_has_no_target():
    class Auto(Line):
        def loss(self, pred, target):
            assert target is None
            return (pred - self.ctx.input).square().mean()

    learner = harness.setup(Auto, optimizer=torch.optim.SGD).set_opt_hparams(lr=0.01)
    fitted = learner.fit(torch.ones(4), 1, **OFF)
    # d (w + b - 1)^2 / dw = -2
    assert fitted.model.w.item() == pytest.approx(0.02)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, left, right):
        return left * self.w[0] + 2 * right * self.w[1]


@pytest.mark.parametrize("form", ["tuple", "list", "mapping"])
def test_fit_input_of_several_parts_reaches_forward_by_place_or_name(form):
    class Parts(Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, place):
            parts: Any = (torch.tensor(1.0), torch.tensor(3.0))
            if form == "list":
                parts = list(parts)
            if form == "mapping":
                parts = {"right": parts[1], "left": parts[0]}
            return parts, torch.tensor(1.0)

    learner = harness.setup(Two, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    fitted = learner.set_opt_hparams(lr=0.01).fit(Parts(), 1, **OFF)
    # d (w0 + 6 w1 - 1)^2 at 0: dw0 = -2, dw1 = -12
    assert fitted.model.w.tolist() == pytest.approx([0.02, 0.12])
    assert fitted.predict(Parts()).tolist() == pytest.approx([0.74, 0.74])


def test_fit_options_reach_training_and_validation():
    sizes = []

    def note(ctx):
        sizes.append((ctx.training, len(ctx.input)))

    line_learner().fit(
        slope(5),
        1,
        slope(3),
        callbacks=[At("on_train_batch_end", note), At("on_valid_batch_end", note)],
        dataloader_options={"batch_size": 2},
        **OFF,
    )
    assert sizes == [(True, 2), (True, 2), (False, 2), (False, 1)]


def test_fit_share_for_validation_is_drawn_by_the_seed():
    seen = []

    def note(ctx):
        seen.append(sorted(ctx.input.tolist()))

    for seed in (1, 1, 2):
        callback = At("on_valid_batch_end", note)
        line_learner().fit(slope(30), 1, 0.3, callbacks=[callback], seed=seed, **OFF)
    assert [len(rows) for rows in seen] == [9, 9, 9]
    assert seen[0] == seen[1] != seen[2]


# --- a learner never changes


def test_learner_set_hparams_gives_another():
    learner = line_learner()
    other = learner.set_hparams(w=1.0).set_hparams(b=2.0)
    assert learner.hparams == {}
    assert other.hparams == {"w": 1.0, "b": 2.0}
    assert (other.build_model().w.item(), other.build_model().b.item()) == (1.0, 2.0)


def test_learner_set_opt_hparams_gives_another():
    learner = line_learner()
    other = learner.set_opt_hparams(momentum=0.5)
    assert learner.opt_hparams == {"lr": 0.01}
    assert other.opt_hparams == {"lr": 0.01, "momentum": 0.5}


def test_learner_fields_cannot_be_set():
    with pytest.raises(AttributeError):
        line_learner().loss = None  # type: ignore[misc]


def test_learner_hparams_cannot_be_changed_in_place():
    learner = line_learner()
    with pytest.raises(TypeError):
        learner.opt_hparams["lr"] = 1.0  # type: ignore[index]


def test_learner_fits_a_fresh_model_each_time():
    learner = line_learner()
    first, second = (learner.fit(slope(4), 2, seed=0, **OFF) for _ in range(2))
    assert first.model is not second.model
    assert first.records["metrics"] == second.records["metrics"]


def test_learner_leaves_the_users_metrics_alone():
    metric = MeanSquaredError()
    line_learner(metrics=[metric]).fit(slope(4), 1, **OFF)
    assert metric.total == 0


# --- what fit gives


def test_fitted_model_is_the_users_own_in_evaluation_mode_and_free():
    fitted = net_learner().fit(points(8), 1, **OFF)
    assert type(fitted.model) is Net
    assert not fitted.model.training
    with pytest.raises(AttributeError):
        _ = fitted.model.ctx


def test_fitted_tells_what_it_was_built_from():
    learner = line_learner().set_hparams(w=2.0)
    fitted = learner.fit(slope(2), 1, **OFF)
    assert fitted.hparams == {"w": 2.0}
    assert fitted.opt_hparams == {"lr": 0.01}
    assert fitted.learner is learner


def test_fitted_optimizer_counts_no_more_once_fit_is_over():
    kept = []
    take = At("on_fit_begin", lambda ctx: kept.extend([ctx.opt, ctx.accelerator]))
    line_learner().fit(slope(2), 1, callbacks=[take], **OFF)
    opt, accelerator = kept
    opt.step()
    assert accelerator.steps == {"opt": 1}


def test_fit_records_metrics_of_both_splits():
    # One batch of x = 0, 1 a epoch, from w = b = 0, lr 0: (0 + 4) / 2 = 2
    learner = line_learner(metrics=[MeanSquaredError()]).set_opt_hparams(lr=0.0)
    fitted = learner.fit(slope(2), 2, slope(3), **OFF)
    # x = 0, 1, 2: (0 + 4 + 16) / 3
    train = {"loss": 2.0, "mean_squared_error": 2.0}
    valid = {"loss": pytest.approx(20 / 3), "mean_squared_error": pytest.approx(20 / 3)}
    assert fitted.records["metrics"] == {
        "train": [train, train],
        "valid": [valid, valid],
    }


# --- evaluate, predict


def test_evaluate_gives_losses_and_metrics_by_hand():
    # w = 1, b = 0 on x = 0, 1, 2, targets twice that: (0 + 1 + 4) / 3
    learner = line_learner(metrics=[MeanSquaredError()]).set_hparams(w=1.0)
    fitted = learner.set_opt_hparams(lr=0.0).fit(slope(2), 1, **OFF)
    found = fitted.evaluate(slope(3), dataloader_options={"batch_size": 2})
    assert found["loss"] == pytest.approx(5 / 3)
    assert found["mean_squared_error"] == pytest.approx(5 / 3)
    assert found.get_metrics()["metric"].tolist() == ["loss", "mean_squared_error"]
    assert "mean_squared_error" in str(found)


def test_evaluate_leaves_weights_and_mode():
    fitted = net_learner().fit(points(8), 1, **OFF)
    before = {name: t.clone() for name, t in fitted.model.state_dict().items()}
    fitted.evaluate(points(8))
    after = fitted.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not fitted.model.training
    with pytest.raises(AttributeError):
        _ = fitted.model.ctx


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_a_failing_pass_gives_the_model_back(call):
    fitted = net_learner().fit(points(8), 1, **OFF)
    event = "on_valid_end" if call == "evaluate" else "on_predict_end"
    with pytest.raises(ZeroDivisionError):
        getattr(fitted, call)(points(8), callbacks=[At(event, lambda _: 1 / 0)])
    with pytest.raises(AttributeError):
        _ = fitted.model.ctx


def test_evaluate_leaves_the_records_of_the_fit():
    fitted = line_learner().fit(slope(2), 1, slope(2), **OFF)
    before = [dict(item) for item in fitted.records["metrics"]["valid"]]
    fitted.evaluate(slope(9))
    assert fitted.records["metrics"]["valid"] == before


def test_evaluate_takes_other_metrics():
    fitted = line_learner(metrics=[MeanSquaredError()]).fit(slope(2), 1, **OFF)
    found = fitted.evaluate(slope(3), metrics={"rows": lambda pred, target: len(pred)})
    assert set(found.records["metrics"]["valid"][0]) == {"loss", "rows"}


def test_evaluate_uses_the_metrics_of_validation():
    metrics = harness.MetricSet(
        train={"one": MeanSquaredError()}, valid={"two": MeanSquaredError()}
    )
    fitted = line_learner(metrics=metrics).fit(slope(2), 1, slope(2), **OFF)
    assert set(fitted.records["metrics"]["train"][0]) == {"loss", "one"}
    assert set(fitted.evaluate(slope(2)).records["metrics"]["valid"][0]) == {
        "loss",
        "two",
    }


def test_evaluate_keeps_losses_by_name():
    fitted = harness.setup(Gan).fit((torch.ones(4, 2), torch.ones(4, 2)), 1, **OFF)
    found = fitted.evaluate((torch.ones(4, 2), torch.ones(4, 2)))
    assert set(found["loss"]) == {"gen", "disc"}


def test_evaluate_logs_only_what_can_be_recorded():
    fitted = line_learner().fit(slope(2), 1, **OFF)
    wrong = At("on_valid_end", lambda ctx: ctx.log("notes", "valid", {"a": object()}))
    with pytest.raises(TypeError, match=r"value\['a'\]"):
        fitted.evaluate(slope(2), callbacks=[wrong])


def test_evaluate_callbacks_are_checked():
    fitted = line_learner().fit(slope(2), 1, **OFF)
    with pytest.raises(TypeError, match="expected an instance, got the class"):
        fitted.evaluate(slope(2), callbacks=[EarlyStopping])


def test_predict_gives_every_row_in_order():
    learner = line_learner().set_hparams(w=2.0, b=1.0).set_opt_hparams(lr=0.0)
    fitted = learner.fit(slope(2), 1, **OFF)
    preds = fitted.predict(torch.arange(70.0))
    assert preds.tolist() == [2.0 * n + 1 for n in range(70)]
    assert not preds.requires_grad


def test_predict_takes_options_of_the_loader():
    sizes = []
    fitted = line_learner().fit(slope(2), 1, **OFF)
    note = At("on_predict_batch_end", lambda ctx: sizes.append(len(ctx.pred)))
    options = {"batch_size": 3, "shuffle": True}
    with pytest.warns(UserWarning, match="no options about the order of rows"):
        fitted.predict(slope(7)[0], callbacks=[note], dataloader_options=options)
    assert sizes == [3, 3, 1]


def test_predict_may_be_changed_by_a_callback():
    learner = line_learner().set_hparams(w=1.0).set_opt_hparams(lr=0.0)
    fitted = learner.fit(slope(2), 1, **OFF)

    def round_up(ctx):
        ctx.pred = ctx.pred + 10

    callback = At("on_predict_batch_end", round_up)
    assert fitted.predict(torch.arange(2.0), callbacks=[callback]).tolist() == [10, 11]


Pair = namedtuple("Pair", "left right")

OUTPUTS: dict[str, Any] = {
    "tuple": (lambda x: (x, 2 * x), lambda x: (x, 2 * x)),
    "named tuple": (lambda x: Pair(x, 2 * x), lambda x: Pair(x, 2 * x)),
    "dict": (lambda x: {"a": x, "b": (2 * x,)}, lambda x: {"a": x, "b": (2 * x,)}),
    "scalar": (lambda x: x.sum(), lambda x: [x[:2].sum(), x[2:].sum()]),
    "text": (lambda x: "hello", lambda x: ["hello", "hello"]),
    "list": (lambda x: [x], lambda x: [[x[:2]], [x[2:]]]),
}


@pytest.mark.filterwarnings("ignore:.*step. expected an optimizer step")
@pytest.mark.parametrize("name", OUTPUTS)
def test_predict_joins_what_the_model_gives(name):
    give, expected = OUTPUTS[name]

    class Giving(Line):
        def forward(self, x):
            return give(x)

        def step(self):
            self.ctx.pred = self(self.ctx.input)

    fitted = harness.setup(Giving, optimizer=torch.optim.SGD).fit(slope(3), 1, **OFF)
    x = torch.arange(3.0)
    found = fitted.predict(x, dataloader_options={"batch_size": 2})
    assert type(found) is type(expected(x))
    assert str(found) == str(expected(x))


@pytest.mark.parametrize("name", ["tensor", "dict", "array"])
def test_predict_keeps_outputs_by_value(name):
    forms = {"tensor": lambda y: y, "dict": lambda y: {"y": y}, "array": Tensor.numpy}

    class Reuses(Line):
        """A model that writes each output into the same memory."""

        def predict(self, x):
            self.room = getattr(self, "room", torch.zeros(2))
            return forms[name](self.room.copy_(x))

    learner = harness.setup(Reuses, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    fitted = learner.set_opt_hparams(lr=0.0).fit(slope(2), 1, **OFF)
    found = fitted.predict(torch.arange(6.0), dataloader_options={"batch_size": 2})
    found = found["y"] if name == "dict" else found
    values = [
        float(y) for batch in found for y in (batch if name == "array" else [batch])
    ]
    assert values == [0, 1, 2, 3, 4, 5]


def test_predict_switches_dropout_off():
    fitted = net_learner().fit(points(8), 1, **OFF)
    x = points(8)[0]
    fitted.model.train()
    assert torch.equal(fitted.predict(x), fitted.predict(x))


def test_predict_of_a_ready_loader_warns_about_options():
    fitted = line_learner().fit(slope(2), 1, **OFF)
    with pytest.warns(UserWarning, match="data is a DataLoader"):
        fitted.predict(DataLoader(Plain()), dataloader_options={"batch_size": 2})


# --- callbacks that replace a default


class QuietProfile(Profile):
    pass


@pytest.mark.parametrize("kind", [Profile, QuietProfile])
def test_callback_of_a_defaults_class_replaces_the_default(kind):
    own, given = kind(), []
    fitted = line_learner().fit(
        slope(4),
        2,
        callbacks=[own, At("on_fit_begin", lambda ctx: given.extend(ctx.callbacks))],
        **OFF,
    )
    assert [item for item in given if isinstance(item, Profile)] == [own]
    assert all(isinstance(item, dict) for item in fitted.records["profile"]["train"])


def test_metrics_callback_replaces_the_default_in_evaluate():
    fitted = line_learner().fit(slope(4), 1, **OFF)
    own = Metrics(MetricSet({"bias": lambda pred, target: (pred - target).mean()}))
    found = fitted.evaluate(slope(4), callbacks=[own], verbose=False)
    assert set(found.records["metrics"]["valid"][0]) == {"loss", "bias"}


@pytest.mark.slow
def test_setup_and_a_fit_import_only_what_they_use(tmp_path, root):
    script = """
import sys, torch, harness
heavy = ("torchmetrics", "pandas", "scipy", "matplotlib", "mlflow", "rich")
learner = harness.setup(torch.nn.Linear, loss=torch.nn.MSELoss(), optimizer=torch.optim.SGD)
learner = learner.set_hparams(in_features=2, out_features=1).set_opt_hparams(lr=0.1)
print(*[name for name in (*heavy, "pyarrow") if name in sys.modules])
learner.fit((torch.ones(4, 2), torch.ones(4, 1)), 1, tracker=False, verbose=False)
print(*[name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "\n\n"
