from __future__ import annotations

import numpy as np
import pytest

from tracking.delivery.thinning import (
    count_early,
    mask_doublings,
    mask_early,
    mask_final,
)


@pytest.mark.parametrize("per_key", [2, 3, 10, 34, 65, 100, 1000, 10_000])
def test_number_is_never_exceeded_and_both_ends_are_kept(per_key):
    for length in (1, 2, 99, 100, 101, 1000, 10_001, 1_500_000):
        ordinals = np.arange(length)
        sent = mask_final(ordinals, length, per_key)
        assert sent.sum() <= max(per_key, min(length, 2)), length
        assert sent[0]
        assert sent[-1]
        if length <= per_key:
            assert sent.all()
        # What was sent while the length was not known is part of it.
        early = mask_early(ordinals, per_key)
        assert not (early & ~sent).any(), length
        assert early.sum() == count_early(length, per_key), length


def test_long_series_is_spread_evenly():
    sent = np.flatnonzero(mask_final(np.arange(1_000_000), 1_000_000, 10_000))
    assert len(sent) > 7000
    assert np.diff(sent).max() <= 512


def test_each_series_is_thinned_by_its_own_length():
    lengths = np.array([50, 400, 3000])
    ordinals = np.concatenate([np.arange(length) for length in lengths])
    sent = mask_final(ordinals, np.repeat(lengths, lengths), 100)
    alone = [mask_final(np.arange(n), n, 100) for n in lengths.tolist()]
    assert sent.tolist() == np.concatenate(alone).tolist()


def test_half_of_the_points_are_sent_at_once_and_then_few():
    counts = [count_early(n, 3200) for n in (1600, 3200, 6400, 12_800)]
    assert counts == [1600, 1650, 1700, 1750]


def test_first_items_are_sent_and_then_fewer_with_each_doubling():
    counts = [mask_doublings(np.arange(n), 100, 2).sum() for n in (100, 200, 400, 800)]
    assert counts == [100, 150, 200, 250]
