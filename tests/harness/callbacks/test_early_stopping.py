from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torchmetrics import Metric

from harness.callbacks import CSVLogger, EarlyStopping, LRScheduler
from harness.metrics.sets import MetricSet
from tests.harness.fakes import At, Tape, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def epochs_run(values, *callbacks, max_epochs=None, min_epochs=0, name="valid/watched"):
    """Epochs that a fit runs while the watched metric takes these values."""
    split, metric = name.split("/")

    def log(ctx):
        ctx.log("metrics", split, {metric: values[ctx.epoch - 1]}, index=ctx.epoch)

    fitted = line_learner().fit(
        slope(2),
        (min_epochs, max_epochs or len(values)),
        callbacks=[At("on_train_end", log), *callbacks],
        **OFF,
    )
    return len(fitted.records["metrics"]["train"])


def stopping(**options):
    return EarlyStopping("valid/watched", **{"mode": "min"} | options)


@pytest.mark.parametrize(
    ("values", "options", "epochs"),
    [
        ([3, 2, 1, 0], {}, 4),
        ([3, 2, 2, 0], {}, 3),  # equal is not better
        ([3, 2, 4, 1, 5], {"patience": 2}, 5),
        ([3, 2, 4, 4, 1], {"patience": 2}, 4),
        ([3, 4, 2, 4, 4, 4], {"patience": 3}, 6),  # better in between begins anew
        ([1, 2, 3, 3], {"mode": "max"}, 4),
        ([1, 2, 1, 3], {"mode": "max"}, 3),
        ([3, -2, 1, -1, 0], {"mode": "zero"}, 4),
        ([3, -2, -2.5, -1, 2], {"mode": "zero", "patience": 2}, 5),
        ([3, 2.9, 0.1], {"mode": "zero", "min_delta": 0.15}, 2),
        ([3, -2, 1], {"mode": "zero", "baseline": 1.5}, 1),
        ([3, 2, 2, 0], {"patience": 0}, 3),  # as in Keras
        ([3, 2, 1], {"patience": 0}, 3),
        ([3, 2.9, 2.8, 1], {"min_delta": 0.15}, 2),
        ([3, 2.9, 2.8, 1], {"min_delta": 0.15, "patience": 2}, 4),  # 3 - 2.8 > 0.15
        ([3, 2, 1], {"baseline": 1.5}, 1),
        ([3, 2, 1, 0], {"baseline": 1.5, "patience": 3}, 4),
        ([3, 1, 1.2], {"baseline": 1.5, "patience": 2}, 3),
        ([math.nan, math.nan, 1], {"patience": 2}, 2),
        ([math.nan, 1, 2], {"patience": 2}, 3),
    ],
)
def test_early_stopping_counts_epochs_without_improvement(values, options, epochs):
    assert epochs_run(values, stopping(**options)) == epochs


def test_early_stopping_never_ends_before_min_epochs():
    assert epochs_run([1, 2, 3, 4, 5, 6], stopping(), min_epochs=4) == 4


def test_early_stopping_fires_its_event_before_the_end():
    tape = Tape()
    epochs_run([1, 2, 3], stopping(), tape)
    assert tape.events[-3:] == ["on_epoch_end", "on_early_stopping", "on_fit_end"]


def test_early_stopping_lets_the_other_callbacks_end_the_epoch(tmp_path):
    late = []
    callback = At("on_epoch_end", lambda ctx: late.append(ctx.epoch), weight=999)
    logger = CSVLogger(tmp_path / "log.csv")
    assert epochs_run([1, 2, 3], stopping(), callback, logger) == 2
    assert late == [1, 2]
    assert "\n2,train,loss," in (tmp_path / "log.csv").read_text()


def test_early_stopping_watches_validation_loss_by_default():
    learner = line_learner().set_opt_hparams(lr=0.0)
    fitted = learner.fit(slope(2), 5, slope(2), callbacks=[EarlyStopping()], **OFF)
    assert len(fitted.records["metrics"]["valid"]) == 2


def test_early_stopping_watches_one_optimizers_loss():
    values = [{"gen": 3, "disc": 1}, {"gen": 2, "disc": 1}, {"gen": 1, "disc": 1}]
    gen, disc = (
        EarlyStopping(f"valid/watched/{n}", mode="min") for n in ("gen", "disc")
    )
    assert epochs_run(values, gen) == 3
    assert epochs_run(values, disc) == 2


def test_early_stopping_begins_anew_with_each_fit():
    callback = stopping(patience=2)
    assert epochs_run([1, 2, 3, 4], callback) == 3
    assert epochs_run([9, 8, 7, 6], callback) == 4


def test_early_stopping_going_on_from_its_own_end_trains_no_more():
    first = stopping(patience=2)
    epochs_run([1, 2, 3], first)
    second = stopping(patience=2)
    # As a resume does: the state is put back after on_fit_begin.
    put_back = At(
        "on_fit_begin", lambda _: second.load_state_dict(first.state_dict()), weight=99
    )
    assert epochs_run([1, 2, 3], second, put_back) == 0


def test_early_stopping_metric_that_was_not_logged_is_told():
    with pytest.raises(
        ValueError,
        match=r"EarlyStopping\(monitor='valid/acc'\): expected a logged metric, got "
        r"'valid/acc'. Logged so far: train/loss, valid/watched",
    ):
        epochs_run([1, 2], EarlyStopping("valid/acc", mode="max"))


@pytest.mark.parametrize(
    ("monitor", "match"),
    [
        (
            "loss",
            "expected '<set>/<metric>', got 'loss'. Write for example 'valid/loss'",
        ),
        ("valid/loss", "expected validation data, got none. Pass valid_data"),
        ("valid/loss/gen", "expected validation data, got none"),
    ],
)
def test_early_stopping_monitor_that_cannot_be_logged_is_refused(monitor, match):
    tape = Tape()
    with pytest.raises(ValueError, match=match):
        line_learner().fit(slope(2), 1, callbacks=[EarlyStopping(monitor), tape], **OFF)
    assert tape.events == []


@pytest.mark.parametrize("patience", [-1, -2])
def test_early_stopping_patience_below_zero_is_refused(patience):
    with pytest.raises(ValueError, match=r"\(patience\): expected at least 0, got"):
        EarlyStopping(patience=patience)


def test_early_stopping_mode_is_checked():
    with pytest.raises(
        ValueError,
        match=r"EarlyStopping\(mode\): expected 'auto', 'min', 'max' or 'zero', got",
    ):
        EarlyStopping(mode="least")  # type: ignore[arg-type]


def test_early_stopping_negative_min_delta_is_refused():
    with pytest.raises(
        ValueError, match=r"\(min_delta\): expected at least 0, got -0\.1"
    ):
        EarlyStopping(min_delta=-0.1)


def test_early_stopping_state_goes_round():
    first, second = stopping(patience=3), stopping(patience=3)
    epochs_run([1, 2], first)
    second.load_state_dict(first.state_dict())
    assert (second.best, second.waited) == (1, 1)


# --- which direction is better


class Rising(Metric):
    """1 in the first epoch, 2 in the second, and so on."""

    higher_is_better: bool | None = True
    computed = 0

    def update(self, pred, target):
        pass

    def compute(self):
        type(self).computed += 1
        return torch.tensor(float(type(self).computed))


class Falling(Rising):
    higher_is_better = False


class Unknown(Rising):
    higher_is_better = None


def fit_with(metric, *callbacks, epochs=4, valid_data=None):
    type(metric).computed = 0
    learner = line_learner(metrics=MetricSet(train={"m": metric}))
    fitted = learner.fit(slope(2), epochs, valid_data, callbacks=callbacks, **OFF)
    return len(fitted.records["metrics"]["train"])


@pytest.mark.parametrize(("metric", "epochs"), [(Rising, 4), (Falling, 2)])
def test_auto_mode_follows_higher_is_better(metric, epochs):
    assert fit_with(metric(), EarlyStopping("train/m")) == epochs


def test_one_callback_finds_the_direction_of_each_fit_anew():
    callback = EarlyStopping("train/m")
    assert fit_with(Rising(), callback) == 4
    assert fit_with(Falling(), callback) == 2


@pytest.mark.parametrize("metric", [Unknown(), lambda pred, target: 1.0])
def test_metric_without_direction_needs_a_mode(metric):
    learner = line_learner(metrics={"m": metric})
    tape = Tape()
    with pytest.raises(ValueError, match=r"'train/m' has no direction\. Pass mode="):
        learner.fit(slope(2), 2, callbacks=[EarlyStopping("train/m"), tape], **OFF)
    assert tape.events == []
    options = EarlyStopping("train/m", mode="max")
    learner.fit(slope(2), 2, callbacks=[options], **OFF)


def test_metric_that_only_a_callback_logs_is_watched_downwards_with_a_warning():
    with pytest.warns(UserWarning, match="'min' is used"):
        assert epochs_run([3, 2, 4], EarlyStopping("valid/watched")) == 3


@pytest.mark.parametrize(
    ("monitor", "near"),
    [
        ("val_loss", "valid/loss"),
        ("train/los", "train/loss"),
        ("val/loss", "valid/loss"),
        ("valid/accuracyy", "valid/accuracy"),
    ],
)
def test_mistyped_monitor_offers_the_nearest_name(monitor, near):
    learner = line_learner(metrics={"accuracy": lambda pred, target: 1.0})
    with pytest.raises(ValueError, match=f"Did you mean {near!r}"):
        learner.fit(slope(2), 1, callbacks=[EarlyStopping(monitor)], **OFF)


@pytest.mark.parametrize("monitor", ["valid/loss", "valid/m", "valid/loss/opt"])
def test_validation_metric_without_validation_data_is_refused(monitor):
    learner = line_learner(metrics={"m": Rising()})
    tape = Tape()
    with pytest.raises(ValueError, match="expected validation data, got none"):
        learner.fit(slope(2), 1, callbacks=[EarlyStopping(monitor), tape], **OFF)
    assert tape.events == []


def test_plateau_follows_the_direction_of_its_metric():
    plateau = LRScheduler(
        torch.optim.lr_scheduler.ReduceLROnPlateau, monitor="train/m", patience=0
    )
    fit_with(Rising(), plateau)
    assert plateau.scheduler.optimizer.param_groups[0]["lr"] == 0.01
    fit_with(Falling(), plateau)  # epochs 2 to 4 are no improvement
    assert plateau.scheduler.optimizer.param_groups[0]["lr"] == pytest.approx(1e-5)


def test_scheduler_by_name_is_refused():
    with pytest.raises(TypeError, match="expected a class, got 'cosine'"):
        LRScheduler("cosine")


@pytest.mark.parametrize(
    "options",
    [{"patience": None}, {"patience": "3"}, {"min_delta": "a"}, {"baseline": "a"}],
)
def test_option_that_is_no_number_is_refused(options):
    with pytest.raises(TypeError, match=rf"EarlyStopping\({next(iter(options))}\)"):
        EarlyStopping(**options)
