from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.callbacks import OverfitBatches
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import Augmented, Case, loader
from tests.harness.fakes import At, line_learner, slope

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


@pytest.mark.parametrize("batches", [1, 3, 9])
def test_overfit_trains_on_the_same_batches_in_every_epoch(batches):
    seen = []
    note = At("on_train_batch_begin", lambda ctx: seen.append(ctx.input.tolist()))
    own = [OverfitBatches(batches), note]
    options = {"batch_size": 2}
    line_learner().fit(
        slope(8), 3, callbacks=own, dataloader_options=options, seed=1, **OFF
    )
    found = min(batches, 4)
    assert len(seen) == 3 * found
    assert seen[:found] == seen[found : 2 * found] == seen[2 * found :]
    first = []
    note = At("on_train_batch_begin", lambda ctx: first.append(ctx.input.tolist()))
    line_learner().fit(
        slope(8), 1, callbacks=[note], dataloader_options=options, seed=1, **OFF
    )
    assert seen[:found] == first[:found]


def test_overfit_learns_its_batch_and_keeps_validation():
    own = [OverfitBatches()]
    data, valid = slope(4), (torch.tensor([1.0, 9.0]), torch.tensor([7.0, 7.0]))
    learner = line_learner().set_opt_hparams(lr=0.1)
    fitted = learner.fit(data, 60, valid, callbacks=own, **OFF)
    assert fitted.records["metrics"]["train"][-1]["loss"] < 1e-2
    assert fitted.records["metrics"]["valid"][-1]["loss"] > 10
    assert fitted.records["profile"]["valid"][0]["batches"] == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_overfit_resumes_exactly(accumulate, tmp_path):
    case = Case(
        data=lambda: loader(Augmented(), shuffle=True),
        options=None,
        accumulate=accumulate,
        callbacks=lambda folder: [OverfitBatches(3)],
    )
    check_exact(case, tmp_path, [("on_train_batch_end", 4), ("on_valid_batch_end", 2)])


def test_overfit_options_are_checked():
    with pytest.raises(
        ValueError, match=r"OverfitBatches\(batches\): expected at least 1"
    ):
        OverfitBatches(0)
