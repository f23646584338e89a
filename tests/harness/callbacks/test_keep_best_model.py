from __future__ import annotations

from typing import Any

import pytest

from harness.callbacks import KeepBestModel
from tests.harness.fakes import At, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def weights(values, callback):
    """Weights after each epoch, and those of the fit, while the metric takes these values."""
    after = []

    def log(ctx):
        ctx.log("metrics", "valid", {"watched": values[ctx.epoch - 1]}, index=ctx.epoch)
        after.append(ctx.model.w.item())

    callbacks = [callback, At("on_train_end", log)]
    fitted = line_learner().fit(slope(4), len(values), callbacks=callbacks, **OFF)
    assert len(set(after)) == len(after)
    return after, fitted.model.w.item()


@pytest.mark.parametrize(
    ("values", "mode", "best"),
    [([3, 1, 2], "min", 2), ([3, 1, 2], "max", 1), ([1, 1, 1], "min", 1)],
)
def test_keep_best_ends_with_the_weights_of_the_best_epoch(values, mode, best):
    after, kept = weights(values, KeepBestModel("valid/watched", mode))
    assert kept == after[best - 1]


def test_keep_best_begins_anew_with_each_fit():
    callback = KeepBestModel("valid/watched")
    weights([0, 5], callback)
    after, kept = weights([9, 8, 10], callback)
    assert kept == after[1]
