"""The learning-rate range test."""

from __future__ import annotations

import pytest
import torch

import harness
from harness.range_test import LRFinderResult
from tests.harness.fakes import line_learner, slope


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
    assert found.losses[-1] > 4 * min(found.losses) or not torch.isfinite(
        torch.tensor(found.losses[-1])
    )


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
