"""The learning-rate range test."""

from __future__ import annotations

import random
import signal
from contextlib import nullcontext
from dataclasses import replace
from multiprocessing import active_children

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import harness
from harness.range_test import LRFinderResult, has_diverged
from harness.rng import seed_all
from tests.harness.fakes import At, Line, line_learner, slope


def test_lr_finder_rates_grow_evenly_on_a_log_scale():
    found = harness.lr_finder(
        line_learner(), slope(32), start_lr=1e-6, end_lr=1e-4, num_steps=5, seed=1
    )
    # Five rates, four equal factors: 10 ** 0.5 each.
    assert found.lrs == pytest.approx([1e-6 * 10 ** (n / 2) for n in range(5)])
    assert len(found.losses) == 5


def test_lr_finder_ends_when_the_loss_runs_away():
    found = harness.lr_finder(
        line_learner(), slope(32), start_lr=1e-4, end_lr=100.0, num_steps=50, seed=1
    )
    assert len(found.lrs) < 50
    assert not found.smoothed[-1] <= 4 * min(found.smoothed)
    assert found.smoothed[-2] <= 4 * min(found.smoothed)


def test_lr_finder_takes_all_steps_if_asked():
    options = {"start_lr": 1e-4, "end_lr": 100.0, "num_steps": 12, "seed": 1}
    found = harness.lr_finder(line_learner(), slope(32), stop_above=None, **options)
    assert len(found.lrs) == 12
    early = harness.lr_finder(line_learner(), slope(32), stop_above=1.5, **options)
    assert len(early.lrs) < 12


def test_lr_finder_rates_may_grow_by_the_same_amount():
    found = harness.lr_finder(
        line_learner(),
        slope(8),
        start_lr=1e-4,
        end_lr=5e-4,
        num_steps=5,
        log_spaced=False,
    )
    assert found.lrs == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 5e-4])


@pytest.mark.parametrize(
    ("means", "is_far"),
    [
        ([1.0, 0.5, 1.9], False),
        ([1.0, 0.5, 2.1], True),
        ([1.0, float("nan")], True),
        ([1.0, float("inf")], True),
        ([-1.0, -3.0], False),  # a likelihood that improves
        ([-1.0, -3.0, 5.9], False),
        ([-1.0, -3.0, 6.1], True),
        ([2.0, -0.01, 5.0], False),  # it has fallen by 2.01
        ([2.0, -0.01, 6.1], True),
    ],
)
def test_divergence_is_seen_in_losses_of_any_sign(means, is_far):
    assert has_diverged(means, 4.0) is is_far


def test_lr_finder_goes_on_from_a_result_and_passes_options_on(capsys):
    x, y = slope(8)
    fitted = line_learner().fit((x, y), 3, tracker=False, seed=0)
    before = fitted.model.w.item()
    seen = []
    found = harness.lr_finder(
        fitted,
        (x, y),
        num_steps=2,
        accelerator=harness.accelerator(device="cpu"),
        callbacks=[At("on_fit_begin", lambda ctx: seen.append(ctx.model.w.item()))],
        verbose=True,
    )
    assert seen == [before] == [fitted.model.w.item()]
    loss = fitted.evaluate((x, y), verbose=False)["loss"]
    assert found.losses[0] == pytest.approx(loss)
    assert capsys.readouterr().err


def test_smoothed_losses_are_the_corrected_mean():
    found = LRFinderResult(lrs=[1.0, 2.0, 3.0], losses=[4.0, 8.0, 2.0], smoothing=0.5)
    # Means from 0: 2, 5, 3.5; divided by 1/2, 3/4, 7/8.
    assert found.smoothed == pytest.approx([4.0, 20 / 3, 4.0])
    assert found.to_frame()["smoothed"].tolist() == found.smoothed
    raw = LRFinderResult(lrs=[1.0, 2.0], losses=[4.0, 8.0], smoothing=0.0)
    assert raw.smoothed == [4.0, 8.0]


def test_suggestion_looks_at_the_slope_by_the_logarithm_before_the_lowest_loss():
    rates, losses = [0.1, 1.0, 1.1, 1.2, 9.0], [9.0, 6.0, 5.0, 4.9, 0.0]
    found = LRFinderResult(lrs=rates, losses=losses, smoothing=0.0)
    assert (
        found.suggestion == 1.0
    )  # falls by 1 in log(1.1); from 1.2 on by 4.9 in log(7.5)
    rises = LRFinderResult(lrs=[0.1, 1.0], losses=[1.0, 2.0], smoothing=0.0)
    assert rises.suggestion == 0.1
    noisy = [9.0, 5.0, *[5.0] * 17, 4.0, 3.5]
    found = LRFinderResult(
        lrs=[10.0**n for n in range(21)], losses=noisy, smoothing=0.0
    )
    assert found.suggestion == 10.0**18


def test_lr_finder_first_loss_is_that_of_the_untrained_model():
    x, y = slope(32)
    found = harness.lr_finder(line_learner(), (x, y), num_steps=2, seed=1)
    # The line starts at y = 0, so its squared error is the mean of y ** 2.
    assert found.losses[0] == pytest.approx(torch.mean(y**2).item(), rel=1e-6)


def test_lr_finder_suggestion_is_where_the_loss_falls_fastest(tmp_path):
    found = LRFinderResult(lrs=[1e-3, 1e-2, 1e-1, 1.0], losses=[2.0, 1.9, 0.5, 3.0])
    assert found.suggestion == 1e-2
    assert found.to_frame()["loss"].tolist() == found.losses
    found.plot(tmp_path / "lr.png")
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (1.0, 0.1), (-1.0, 1.0)])
def test_lr_finder_rates_out_of_order_are_told(start, end):
    with pytest.raises(ValueError, match="expected 0 < start_lr < end_lr"):
        harness.lr_finder(line_learner(), slope(32), start_lr=start, end_lr=end)


class OwnStep(Line):
    """Steps by the optimizer itself: no step event fires."""

    def step(self):
        ctx = self.ctx
        loss = nn.functional.mse_loss(self(ctx.input), ctx.target)
        ctx.loss = {"opt": loss.detach()}
        if ctx.training:
            loss.backward()
            ctx.opt.step()
            ctx.opt.zero_grad()


class Optimizing(Line):
    def step(self):
        ctx = self.ctx
        ctx.optimize(nn.functional.mse_loss(self(ctx.input), ctx.target))


class Returning(Line):
    def step(self):
        return nn.functional.mse_loss(self(self.ctx.input), self.ctx.target)


def plain_sweep(x, y, num_steps, start_lr, end_lr):
    """The range test as a plain loop over one batch: rates and losses before smoothing."""
    model, found = Line(), []
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(num_steps):
        rate = start_lr * (end_lr / start_lr) ** (step / (num_steps - 1))
        opt.param_groups[0]["lr"] = rate
        loss = nn.functional.mse_loss(model(x), y)
        found.append((rate, loss.item()))
        opt.zero_grad()
        loss.backward()
        opt.step()
    return zip(*found, strict=True)


@pytest.mark.parametrize("model", [Line, OwnStep, Optimizing, Returning])
def test_lr_finder_equals_a_plain_loop_with_any_step(model):
    x, y = slope(8)  # one batch, so each step reads the data again
    learner = harness.setup(model, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    found = harness.lr_finder(
        learner.set_opt_hparams(lr=5.0), (x, y), start_lr=1e-5, end_lr=1e-2, num_steps=6
    )
    rates, losses = plain_sweep(x, y, 6, 1e-5, 1e-2)
    assert found.lrs == pytest.approx(list(rates), rel=1e-12)
    assert found.losses == pytest.approx(list(losses), rel=1e-5)


class TwoOptimizers(Line):
    def set_optimizers(self):
        return {
            "w": torch.optim.SGD([self.w], lr=1.0),
            "b": torch.optim.Adam([self.b], lr=torch.tensor(1.0), capturable=False),
        }


def test_lr_finder_gives_every_optimizer_the_rate_and_adds_their_losses():
    x, y = slope(8)
    learner = harness.setup(TwoOptimizers, loss=nn.MSELoss())
    found = harness.lr_finder(learner, (x, y), start_lr=1e-6, end_lr=1e-3, num_steps=4)
    assert len(found.lrs) == 4
    # The loss before any step is mean(y ** 2); one small step of "w" hardly changes it.
    assert found.losses[0] == pytest.approx(2 * torch.mean(y**2).item(), rel=1e-3)


class OwnScheduler(Line):
    """Keeps a schedule of its own, which must not change the rates of the test."""

    def set_optimizers(self):
        opt = torch.optim.SGD(self.parameters(), lr=1.0)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        return opt

    def step(self):
        ctx = self.ctx
        ctx.optimize(nn.functional.mse_loss(self(ctx.input), ctx.target))
        self.rates = [*getattr(self, "rates", []), ctx.opt.param_groups[0]["lr"]]
        if ctx.training:
            self.schedule.step()


def test_lr_finder_sets_the_rate_beside_a_schedule_of_the_model():
    models = []

    def make():
        models.append(OwnScheduler())
        return models[-1]

    found = harness.lr_finder(harness.setup(make), slope(8), num_steps=5)
    assert models[-1].rates == pytest.approx(found.lrs)


def test_lr_finder_loss_of_a_step_is_the_mean_of_its_batches():
    x, y = torch.ones(4), torch.tensor([1.0, 3.0, 1.0, 3.0])
    found = harness.lr_finder(
        harness.setup(ByHand, optimizer=torch.optim.SGD).set_opt_hparams(lr=0.1),
        (x, y),
        num_steps=3,
        dataloader_options={"batch_size": 1, "shuffle": False},
    )
    # The line is 0 at first: (1 ** 2 + 3 ** 2) / 2.
    assert found.losses[0] == pytest.approx(5.0)
    assert len(found.lrs) == 3


class ByHand(Line):
    """Accumulates two batches by hand."""

    def step(self):
        ctx = self.ctx
        loss = nn.functional.mse_loss(self(ctx.input), ctx.target)
        ctx.loss = loss.detach()
        loss.backward()
        if ctx.iter % 2 == 0:
            ctx.opt.step()
            ctx.opt.zero_grad()


class Draws(Dataset):
    """Draws from every global generator and one of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(3)
        self.dice = random.Random(3)

    def __len__(self):
        return 8

    def __getitem__(self, row):
        x = torch.rand((), generator=self.generator) + self.dice.random()
        return x, torch.rand(()) + random.random() + np.random.rand()


def draw_all(data, loader):
    return (
        torch.rand(()).item(),
        random.random(),
        np.random.rand(),
        torch.rand((), generator=data.generator).item(),
        data.dice.random(),
        next(iter(loader))[1].tolist(),
    )


@pytest.mark.parametrize("how", ["finishes", "fails", "diverges"])
def test_lr_finder_leaves_every_random_generator(how):
    seed_all(7)
    data = Draws()
    loader = DataLoader(
        data, 2, shuffle=True, generator=torch.Generator().manual_seed(4)
    )
    expected = None
    for is_tried in (False, True):
        seed_all(7)
        data.generator.manual_seed(3)
        data.dice.seed(3)
        loader.generator.manual_seed(4)
        if is_tried:
            learner = line_learner(
                loss=nn.MSELoss() if how != "fails" else lambda pred, target: 1 / 0
            )
            with pytest.raises(ZeroDivisionError) if how == "fails" else nullcontext():
                end_lr = 1e30 if how == "diverges" else 1.0
                harness.lr_finder(learner, loader, num_steps=30, end_lr=end_lr, seed=5)
        drawn = draw_all(data, loader)
        expected = expected or drawn
    assert drawn == expected


def test_lr_finder_leaves_a_generator_of_the_options():
    generator = torch.Generator().manual_seed(4)
    before = generator.get_state()
    harness.lr_finder(
        line_learner(),
        slope(32),
        num_steps=3,
        dataloader_options={"generator": generator, "batch_size": 4},
    )
    assert torch.equal(generator.get_state(), before)


def test_lr_finder_leaves_no_workers_that_would_change_a_later_fit():
    def fit(is_tried):
        loader = DataLoader(
            TensorDataset(*slope(8)), 4, True, num_workers=1, persistent_workers=True
        )
        seed_all(7)
        if is_tried:
            before = {*active_children()}
            harness.lr_finder(line_learner(), loader, num_steps=3)
            assert loader._iterator is None
            assert {*active_children()} <= before
        return line_learner().fit(loader, 2, tracker=False, verbose=False).model

    assert torch.equal(fit(False).w, fit(True).w)


def test_lr_finder_leaves_the_learner():
    learner = line_learner(metrics={"mae": nn.functional.l1_loss})
    before = replace(learner)
    harness.lr_finder(learner, slope(8), num_steps=3)
    assert learner == before


class Nothing(Line):
    def step(self):
        self(self.ctx.input)


class StepsWithoutLoss(Line):
    def step(self):
        self(self.ctx.input).sum().backward()
        self.ctx.opt.step()


@pytest.mark.parametrize(
    ("model", "match"),
    [
        (Nothing, "expected an optimizer step in epoch 1, got none"),
        (StepsWithoutLoss, "expected StepsWithoutLoss.step to record a loss"),
    ],
)
@pytest.mark.filterwarnings("ignore:Nothing.step")
def test_lr_finder_of_a_step_that_does_nothing_is_told(model, match):
    learner = harness.setup(model, optimizer=torch.optim.SGD).set_opt_hparams(lr=0.1)
    with pytest.raises(ValueError, match=match):
        harness.lr_finder(learner, slope(8))


def test_lr_finder_is_interrupted_by_ctrl_c():
    class Interrupted(Line):
        def forward(self, x):
            signal.raise_signal(signal.SIGINT)
            return super().forward(x)

    learner = harness.setup(Interrupted, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.raises(KeyboardInterrupt):
        harness.lr_finder(learner, slope(8))


@pytest.mark.parametrize(
    ("options", "kind", "match"),
    [
        ({"smoothing": 1}, ValueError, r"lr_finder\(smoothing\): expected less than 1"),
        ({"stop_above": 1}, ValueError, r"lr_finder\(stop_above\): expected more"),
        ({"num_steps": 0}, ValueError, r"lr_finder\(num_steps\): expected at least 1"),
        ({"num_steps": 2.5}, TypeError, "expected a whole number, got 2.5"),
        ({"start_lr": "a"}, TypeError, r"lr_finder\(start_lr\): expected a number"),
        ({"end_lr": None}, TypeError, r"lr_finder\(end_lr\): expected a number"),
    ],
)
def test_lr_finder_wrong_options_are_told(options, kind, match):
    with pytest.raises(kind, match=match):
        harness.lr_finder(line_learner(), slope(8), **options)
