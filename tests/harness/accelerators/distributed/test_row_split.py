"""The rows of each rank in a step."""

from __future__ import annotations

import pytest

from harness.accelerators.distributed.row_split import RankShare, RowSplit, ShareTracker


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_rows_of_a_step_are_divided_evenly_and_in_order(world_size: int) -> None:
    for total in range(1, 4 * world_size + 1):
        shares = [
            RowSplit(4, False, rank, world_size).assign(total)
            for rank in range(world_size)
        ]
        rows = [n for start, count in shares for n in range(start, start + count)]
        assert rows == list(range(total))
        counts = [count for _, count in shares]
        assert max(counts) - min(counts) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_no_rank_has_a_single_row_where_there_are_more(
    size: int, world_size: int
) -> None:
    for total in range(1, size * world_size + 1):
        shares = [
            RowSplit(size, False, rank, world_size, has_pairs=True).assign(total)
            for rank in range(world_size)
        ]
        rows = [n for start, count in shares for n in range(start, start + count)]
        assert rows == list(range(total))
        if size > 1 and total > 1:
            assert all(count != 1 for _, count in shares)


def test_weights_make_the_average_over_ranks_the_mean_over_samples() -> None:
    # Ranks with 3 and 1 samples: losses 1, 2, 6 and 7 have the mean 4.
    shares = [RankShare(0, 3, 4), RankShare(3, 1, 4)]
    means = [3.0, 7.0]
    weighted = [
        share.weight(2) * mean for share, mean in zip(shares, means, strict=True)
    ]
    assert sum(weighted) / 2 == 4.0


def test_batch_read_ahead_keeps_its_share() -> None:
    tracker = ShareTracker(num_recent=2)
    first, second = object(), object()
    assert tracker.record(first, RankShare(0, 2, 2), is_train=True) is first
    tracker.record(second, RankShare(2, 1, 2), is_train=True)
    tracker.select(first)
    assert tracker.present == RankShare(0, 2, 2)
    tracker.select(object())  # not from a divided loader: the present one stays
    assert tracker.present == RankShare(0, 2, 2)
    tracker.clear()
    assert tracker.present is None
