from __future__ import annotations

import numpy as np
import pytest

from tracking.delivery.thinning import mask_early, mask_final


@pytest.mark.parametrize("per_key", [2, 3, 10, 100, 1000, 10_000])
@pytest.mark.parametrize("length", [1, 2, 99, 100, 101, 1000, 10_001, 300_000])
def test_number_is_never_exceeded_and_both_ends_are_kept(per_key, length):
    ordinals = np.arange(length)
    sent = mask_final(ordinals, length, per_key)
    assert sent.sum() <= max(per_key, min(length, 2))
    assert sent[0]
    assert sent[-1]
    if length <= per_key:
        assert sent.all()
    # What was sent while the length was not known is part of it.
    assert not (mask_early(ordinals, per_key) & ~sent).any()


def test_long_series_is_spread_evenly():
    sent = np.flatnonzero(mask_final(np.arange(100_000), 100_000, 1000))
    assert len(sent) > 600
    assert np.diff(sent).max() <= 256


def test_points_sent_at_once_grow_with_the_doublings_only():
    counts = [mask_early(np.arange(n), 3200).sum() for n in (100, 200, 400, 800)]
    assert counts == [100, 150, 200, 250]
