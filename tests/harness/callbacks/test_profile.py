from __future__ import annotations

import re

from harness.accelerators.single import SingleDevice
from harness.callbacks import Profile
from tests.harness.fakes import At, line_learner, slope


def test_profile_logs_counts_and_times_of_each_split_and_epoch():
    fitted = line_learner().fit(
        slope(5),
        2,
        slope(3),
        dataloader_options={"batch_size": 2},
        accelerator=SingleDevice("cpu"),
        tracker=False,
        verbose=False,
    )
    profile = fitted.records["profile"]
    assert [item["batches"] for item in profile["train"]] == [2, 2]
    assert [item["batches"] for item in profile["valid"]] == [2, 2]
    for split, rows in (("train", 4), ("valid", 3)):
        for item in profile[split]:
            assert item["epoch_s"] > 0
            rate = item["samples_per_s"]
            assert abs(rate * item["epoch_s"] - rows) < 1e-6


def test_profile_logs_the_times_of_epochs_and_fit_and_fitted_shows_them():
    fitted = line_learner().fit(slope(4), 3, slope(4), tracker=False, verbose=False)
    profile = fitted.records["profile"]
    (fit_s,) = (item["fit_s"] for item in profile["fit"])
    epochs = [item["epoch_s"] for item in profile["epoch"]]
    for n, epoch_s in enumerate(epochs):
        parts = [profile[split][n]["epoch_s"] for split in ("train", "valid")]
        assert epoch_s >= sum(parts) > 0
    assert len(epochs) == 3
    assert fit_s >= sum(epochs)
    assert f", {fit_s:.2f} s ({sum(epochs) / 3:.3g} s an epoch)" in str(fitted)
    once = line_learner().fit(slope(4), 1, tracker=False, verbose=False)
    (head, *_) = str(once).splitlines()
    assert re.fullmatch(r"Fitted Line, 2 parameters, 1 epoch, [\d.]+ s", head)


def test_profile_counts_the_time_of_the_fit_before_a_resume():
    def pretend(ctx):
        profile = next(c for c in ctx.callbacks if isinstance(c, Profile))
        profile.load_state_dict({"fit_s": 100.0})

    note = At("on_epoch_begin", pretend)
    fitted = line_learner().fit(
        slope(4), 1, callbacks=[note], tracker=False, verbose=False
    )
    assert 100 < fitted.records["profile"]["fit"][0]["fit_s"] < 200
