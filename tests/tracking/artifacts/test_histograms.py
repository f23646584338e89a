"""Histograms of values of any kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tracking.artifacts.histograms import make_histogram


def histogram(values, bins=4):
    return make_histogram(values, bins, "test")


def test_counts_are_of_bins_of_equal_width():
    found = histogram(torch.tensor([[0.0, 1.0], [1.0, 4.0]]))
    assert found["edges"] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert found["counts"] == [1, 2, 0, 1]
    assert (found["min"], found["max"], found["mean"]) == (0.0, 4.0, 1.5)
    assert found["std"] == pytest.approx(1.5)  # sqrt((1.5^2 + 2 0.5^2 + 2.5^2) / 4)
    assert found["num"] == 4


def test_integers_and_bools_of_a_small_range_get_a_bin_each():
    found = histogram([3, 5, 5, 6])
    assert found["edges"] == [2.5, 3.5, 4.5, 5.5, 6.5]
    assert found["counts"] == [1, 0, 2, 1]
    assert histogram([True, False, True])["counts"] == [1, 2]
    assert histogram(torch.tensor([0, 100]))["counts"] == [1, 0, 0, 1]


def test_nan_and_infinities_are_counted_apart():
    found = histogram([1.0, np.nan, np.inf, -np.inf, 1.0])
    assert (found["num"], found["num_nan"], found["num_inf"]) == (5, 1, 2)
    assert sum(found["counts"]) == 2
    nothing = histogram([np.nan])
    assert (nothing["counts"], nothing["mean"]) == ([], None)
    assert histogram([])["num"] == 0


@pytest.mark.parametrize(
    "values",
    [
        [1e308, -1e308, 1.7e308],
        torch.tensor([3e38, -3e38]),
        [0.0, 0.0],
        [5e-324, 0.0],
        torch.tensor([1.0, 1.0000001]),
        np.array([2**62, -(2**62)]),
        torch.ones(3, dtype=torch.float16),
        np.array(0.5),
    ],
)
def test_every_finite_value_is_in_a_bin(values):
    found = histogram(values, 64)
    assert sum(found["counts"]) == found["num"] == len(np.ravel(values))
    assert found["edges"] == sorted(found["edges"])
    assert np.isfinite([found["mean"], found["std"]]).all()


@pytest.mark.parametrize("bins", [0, 513, 2.5, True])
def test_bins_out_of_range_are_refused(bins):
    with pytest.raises(ValueError, match="bins from 1 to 512"):
        histogram([1.0], bins)
