from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

import harness
import tracking
from harness.accelerators.single import SingleDevice
from harness.callbacks import GradientClip
from tests.harness.fakes import Net, line_learner, net_learner, points, slope
from tests.harness.test_loop import Pair

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


@pytest.mark.parametrize(
    ("max_norm", "norm_type"), [(0.05, 2.0), (0.01, 1.0), (0.02, math.inf), (1e6, 2.0)]
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_clip_gives_the_bits_of_torchs(max_norm, norm_type, accumulate):
    x, y = points(16)
    torch.manual_seed(2)
    model = Net(drop=0.0)
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for place, start in enumerate(range(0, 16, 4), start=1):
        pred = model(x[start : start + 4])
        loss = nn.functional.cross_entropy(pred, y[start : start + 4])
        (loss / accumulate).backward()
        if place % accumulate == 0:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm, norm_type)
            opt.step()
            opt.zero_grad()
    fitted = (
        net_learner()
        .set_hparams(drop=0.0)
        .fit(
            (x, y),
            1,
            callbacks=[GradientClip(max_norm, norm_type)],
            seed=2,
            dataloader_options={"batch_size": 4, "shuffle": False},
            accelerator=SingleDevice("cpu", accumulate=accumulate),
            **OFF,
        )
    )
    found, expected = fitted.model.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_clip_bounds_the_step():
    # x = 1, y = 2: gradient (-4, -4), norm 4 sqrt(2), clipped to norm 1: 1 / sqrt(2) each.
    data = (torch.ones(1), torch.full((1,), 2.0))
    fitted = line_learner().fit(data, 1, callbacks=[GradientClip(1.0)], **OFF)
    assert fitted.model.w.item() == pytest.approx(0.01 / math.sqrt(2), rel=1e-5)


def test_clip_takes_each_named_optimizer_by_itself():
    # Each half has gradient (-4, -4) at its turn (the second after the first has moved).
    data = (torch.ones(1), torch.full((1,), 2.0))
    fitted = harness.setup(Pair).fit(data, 1, callbacks=[GradientClip(1.0)], **OFF)
    for half in (fitted.model.a, fitted.model.b):
        assert half.w.item() == pytest.approx(0.01 / math.sqrt(2), rel=1e-5)


@pytest.mark.parametrize("max_norm", [0, -1, math.nan])
def test_clip_norm_must_be_above_zero(max_norm):
    with pytest.raises(ValueError, match=r"\(max_norm\): expected more than 0, got"):
        GradientClip(max_norm)


def test_clip_by_default_is_to_norm_one():
    callback = GradientClip()
    assert (callback.max_norm, callback.norm_type) == (1.0, 2.0)
    line_learner().fit(slope(2), 1, callbacks=[callback], **OFF)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"max_norm": "a"}, TypeError),
        ({"max_norm": None}, TypeError),
        ({"norm_type": "inf"}, TypeError),
        ({"norm_type": 0}, ValueError),
    ],
)
def test_clip_refuses_what_is_no_norm(options, error):
    with pytest.raises(error, match=rf"GradientClip\({next(iter(options))}\)"):
        GradientClip(**options)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_clip_records_the_norm_before_it(accumulate):
    # x = 1, y = 2: the gradient is -2 (2 - w - b) in both directions, clipped to 1, so w + b
    # grows by 0.01 sqrt(2) each step.
    data = (torch.ones(4), torch.full((4,), 2.0))
    norms = [2 * math.sqrt(2) * (2 - step * 0.01 * math.sqrt(2)) for step in range(4)]
    fitted = line_learner().fit(
        data,
        1,
        callbacks=[GradientClip(1.0)],
        dataloader_options={"batch_size": 1},
        accelerator=SingleDevice("cpu", accumulate=accumulate),
        **OFF,
    )
    found = fitted.records["metrics"]["train"][0]["grad_norm"]
    expected = norms[: 4 // accumulate]
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-5)


def test_clip_records_the_norms_of_named_optimizers_by_name():
    learner = harness.setup(Pair).set_opt_hparams(lr=0.0)
    fit = learner.fit(slope(2), 1, callbacks=[GradientClip(1.0)], **OFF)
    # Both halves: x = 0, 1, y = 0, 2: the gradients are (-2, -2).
    norms = fit.records["metrics"]["train"][0]["grad_norm"]
    assert norms == pytest.approx({"a": math.sqrt(8), "b": math.sqrt(8)})
    off = learner.fit(slope(2), 1, callbacks=[GradientClip(1.0, record=False)], **OFF)
    assert set(off.records["metrics"]["train"][0]) == {"loss"}


def test_clip_records_each_step_in_the_run(tmp_path):
    tracker = {"runs_dir": tmp_path, "delivery": False}
    fitted = line_learner().fit(
        slope(8),
        1,
        callbacks=[GradientClip(1.0)],
        dataloader_options={"batch_size": 2},
        tracker=tracker,
        verbose=False,
    )
    rows = tracking.open(fitted.run_path).records(what="steps").to_pylist()
    assert [(row["name"], row["step"]) for row in rows] == [
        ("grad_norm", step) for step in (1, 2, 3, 4)
    ]
