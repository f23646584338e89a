from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import EMA, EarlyStopping, KeepBestModel, ModelCheckpoint
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import (
    VALID,
    Case,
    Net,
    TwoParts,
    X,
    Y,
    adam,
    loader,
    same_bits,
    sgd,
)
from tests.harness.fakes import At, Tape, line_learner, slope
from tests.harness.test_loop import Pair

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def fit(*callbacks: Any, learner: Any = None, accumulate: int = 1, **options: Any):
    """A short fit of the net of the exact resumes."""
    options = {"epochs": 2, "valid_data": VALID, "seed": 3} | OFF | options
    return (learner or sgd()).fit(
        (X, Y),
        callbacks=callbacks,
        accelerator=SingleDevice("cpu", accumulate=accumulate),
        dataloader_options={"batch_size": 4, "shuffle": False, "drop_last": False},
        **options,
    )


def near(loss: float) -> Any:
    """The loss, also in batches of another size."""
    return pytest.approx(loss, rel=1e-5)


def same(one: nn.Module, two: Any) -> bool:
    found = two.state_dict()
    return all(same_bits(v, found[n]) for n, v in one.state_dict().items())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ema_gives_the_bits_of_torchs(accumulate):
    torch.manual_seed(3)
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    torch.manual_seed(3)
    model.load_state_dict(Net().state_dict())  # the fit builds its model once
    for _ in range(2):
        for n, (x, y) in enumerate(loader(), start=1):
            loss = nn.functional.cross_entropy(model(x), y) / accumulate
            loss.backward()
            if n % accumulate == 0:
                opt.step()
                opt.zero_grad()
                averaged.update_parameters(model)
    ema = EMA(0.9)
    fitted = fit(ema, accumulate=accumulate, valid_data=None)
    assert same(averaged.module, fitted.model)
    assert ema.counts == {"opt": 12 // accumulate}


def test_ema_leaves_training_as_it_is():
    losses = [fit(*own).records["metrics"]["train"] for own in ([], [EMA(0.5)])]
    assert losses[0] == losses[1]
    plain, kept = fit(), fit(EMA(0.5, in_result=False))
    assert same(plain.model, kept.model)


def test_ema_is_what_is_validated_and_returned():
    fitted = fit(EMA(0.9))
    loss = fitted.evaluate(VALID, verbose=False)["loss"]
    assert loss == near(fitted.records["metrics"]["valid"][-1]["loss"])
    assert loss != near(fit().records["metrics"]["valid"][-1]["loss"])
    raw = fit(EMA(0.9, in_valid=False, in_result=False))
    assert raw.records["metrics"]["valid"] == fit().records["metrics"]["valid"]


def test_ema_serves_a_fitted_model_in_predict_and_evaluate():
    ema = EMA(0.9, in_result=False)
    fitted, averaged = fit(ema), fit(EMA(0.9))
    before = fitted.predict(X, verbose=False)
    wanted = averaged.predict(X, verbose=False)
    # Buffers are those of training in both.
    assert torch.equal(fitted.predict(X, callbacks=[ema], verbose=False), wanted)
    assert torch.equal(fitted.predict(X, verbose=False), before)
    found = fitted.evaluate(VALID, callbacks=[ema], verbose=False)["loss"]
    assert found == averaged.evaluate(VALID, verbose=False)["loss"]
    assert torch.equal(fitted.predict(X, verbose=False), before)
    ema.copy_to(fitted.model)
    assert same(fitted.model, averaged.model)
    with pytest.raises(ValueError, match=r"EMA.copy_to\(Linear\): expected a weight"):
        ema.copy_to(nn.Linear(2, 2))


def test_ema_with_keep_best_returns_the_validated_weights_of_the_best_epoch():
    values = [2.0, 1.0, 9.0]

    def log(ctx):
        ctx.log("metrics", "valid", {"watched": values[ctx.epoch - 1]}, index=ctx.epoch)

    best = [EMA(0.5), KeepBestModel("valid/watched", "min"), At("on_valid_end", log)]
    fitted = fit(*best, epochs=3)
    assert fitted.best_epoch == 2
    loss = fitted.evaluate(VALID, verbose=False)["loss"]
    assert loss == near(fitted.records["metrics"]["valid"][1]["loss"])


def test_ema_with_everything_that_picks_the_best_agrees_on_the_averages(tmp_path):
    values = [2.0, 1.0, 9.0, 8.0]

    def log(ctx):
        ctx.log("metrics", "valid", {"watched": values[ctx.epoch - 1]}, index=ctx.epoch)

    watch = {"monitor": "valid/watched", "mode": "min"}
    best = ModelCheckpoint(tmp_path, keep_last=0, keep_best=1, **watch)
    others = [KeepBestModel(**watch), EarlyStopping(patience=2, **watch), best]
    fitted = fit(*others, EMA(0.5), At("on_valid_end", log), epochs=9)
    valid = fitted.records["metrics"]["valid"]
    assert (len(valid), fitted.best_epoch) == (4, 2)
    assert fitted.evaluate(VALID, verbose=False)["loss"] == near(valid[1]["loss"])
    other = fit(EMA(0.5), epochs=1)
    assert other.load_weights(tmp_path).is_complete
    assert same(other.model, fitted.model)
    fit(others[-1], EMA(0.5, in_valid=False), At("on_valid_end", log), epochs=2)
    trained = fit(epochs=2)
    other.load_weights(tmp_path)
    assert same(other.model, trained.model)


def test_ema_by_hand():
    # One row (1, 2), rate 0.01: w = b = 0.04 after a step (gradient -4), then the error is
    # 2 - 0.08 = 1.92 and w = 0.0784. Decay 0.75: 0.75 * 0.04 + 0.25 * 0.0784 = 0.0496.
    data = (torch.ones(1), torch.full((1,), 2.0))
    fitted = line_learner().fit(data, 2, callbacks=[EMA(0.75)], **OFF)
    assert fitted.model.w.item() == pytest.approx(0.0496)
    # With a warm-up, the second update keeps (1 + 1) / (10 + 1).
    fitted = line_learner().fit(data, 2, callbacks=[EMA(0.75, warmup=True)], **OFF)
    assert fitted.model.w.item() == pytest.approx((2 * 0.04 + 9 * 0.0784) / 11)
    # Only the second step updates: a copy.
    fitted = line_learner().fit(data, 2, callbacks=[EMA(0.75, every=2)], **OFF)
    assert fitted.model.w.item() == pytest.approx(0.0784)


def test_ema_of_one_of_two_optimizers_leaves_the_other():
    def weights(*own):
        learner = harness.setup(Pair).set_opt_hparams(lr=1e-3)
        return learner.fit(slope(4), 3, callbacks=own, seed=1, **OFF).model.state_dict()

    plain, one, both = weights(), weights(EMA(0.5, opt_name="a")), weights(EMA(0.5))
    two = weights(EMA(0.5, opt_name="a"), EMA(0.5, opt_name="b", in_valid=False))
    changed = {name for name in plain if not same_bits(plain[name], one[name])}
    assert changed == {"a.w", "a.b"}
    for name in plain:
        assert same_bits(one[name], (both if name in changed else plain)[name])
        assert same_bits(two[name], both[name])


def test_ema_of_low_precision_keeps_small_changes():
    def narrow():
        return nn.Linear(2, 1).bfloat16()

    x, y = torch.ones(4, 2).bfloat16(), torch.zeros(4, 1).bfloat16()
    learner = harness.setup(narrow, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    ema = EMA(0.999)
    learner.set_opt_hparams(lr=0.1).fit((x, y), 4, callbacks=[ema], **OFF)
    assert {value.dtype for value in ema.averages.values()} == {torch.float32}


def two_parts() -> harness.Learner:
    return harness.setup(TwoParts, loss=nn.CrossEntropyLoss())


CASES = {
    "two-optimizers": Case(
        learner=two_parts, accumulate=2, callbacks=lambda folder: [EMA(0.8)]
    ),
    "keep-best": Case(
        learner=adam, callbacks=lambda folder: [EMA(0.8, warmup=True), KeepBestModel()]
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ema_resumes_exactly(name, tmp_path):
    stops = [("on_train_batch_end", 5), ("on_valid_batch_end", 5)]
    check_exact(CASES[name], tmp_path, stops)


@pytest.mark.parametrize(
    ("callbacks", "match"),
    [
        ([EMA(opt_name="opr")], r"EMA\(opt_name\): .*Did you mean 'opt'"),
        ([EMA(), EMA(in_result=False)], r"expected one EMA in validation, got 2"),
        (
            [EMA(), EMA(in_valid=False)],
            r"EMA: expected one average of the same weights",
        ),
    ],
)
def test_ema_that_cannot_work_is_refused_before_training(callbacks, match):
    tape = Tape()
    with pytest.raises(ValueError, match=match):
        fit(*callbacks, tape)
    assert tape.events == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"decay": 1.5}, r"EMA\(decay\): expected a number from 0 to 1, got 1.5"),
        ({"decay": "a"}, r"EMA\(decay\): expected a number, got 'a'"),
        ({"every": 0}, r"EMA\(every\): expected at least 1, got 0"),
    ],
)
def test_ema_options_are_checked(options, match):
    with pytest.raises((ValueError, TypeError), match=match):
        EMA(**options)


def test_ema_of_an_epoch_that_ended_early_in_validation_is_taken_out():
    def leave(ctx):
        if ctx.epoch == 1:
            raise harness.SkipEpoch

    left = At("on_valid_batch_end", leave)
    assert same(fit(left).model, fit(EMA(0.5, in_result=False), left).model)
