from __future__ import annotations

import pytest

from tracking.delivery.cursor import Cursor
from tracking.delivery.scan import JournalScan
from tracking.store import get_rank_dir


@pytest.fixture
def read_into():
    """Reads the rows of a run into a cursor; returns the scan."""

    def read(cursor, run):
        scan = JournalScan(get_rank_dir(run.path, 0))
        while (rows := scan.read()).num_rows:
            cursor.push(rows, scan)
        return scan

    return read


def next_seqs(cursor, max_rows):
    rows = cursor.peek(max_rows)
    assert rows is not None
    return rows["seq"].to_pylist()


def test_rows_are_taken_in_order_and_dropped_when_they_are_sent(record, read_into):
    run = record()
    run.log_curve(10)
    cursor = Cursor()
    read_into(cursor, run)
    assert (cursor.position, cursor.num_pending) == (-1, 20)
    assert next_seqs(cursor, 8) == list(range(8))
    cursor.advance(4)
    assert (cursor.position, cursor.num_pending) == (4, 15)
    assert next_seqs(cursor, 2) == [5, 6]
    cursor.advance(19)
    assert cursor.num_pending == 0
    assert cursor.peek(8) is None


def test_rows_that_mlflow_has_are_not_sent_again(record, read_into):
    run = record()
    run.log_curve(10)
    cursor = Cursor(position=12)
    read_into(cursor, run)
    assert cursor.num_pending == 7
    assert next_seqs(cursor, 100) == list(range(13, 20))


def test_cursor_over_two_blocks_of_the_journal(record, read_into):
    run = record()
    run.log_curve(10_000)
    cursor = Cursor()
    read_into(cursor, run)
    assert cursor.num_pending == 20_000
    seen = []
    while (rows := cursor.peek(3000)) is not None:
        seen += rows["seq"].to_pylist()
        cursor.advance(seen[-1])
    assert seen == sorted(set(seen))
    assert len(seen) == 20_000


@pytest.mark.parametrize("position", [-1, 19])
def test_sent_places_are_known_by_the_bounds_of_their_index(
    record, read_into, position
):
    run = record()
    run.log_curve(10, first=5)
    run.run.log("notes", "", 1.0)
    cursor = Cursor(position)
    read_into(cursor, run)
    is_sent = position == 19
    assert cursor.may_have_sent(("metrics", "train", 5, 1)) == is_sent
    assert cursor.may_have_sent(("metrics", "train", None, 1)) == is_sent
    assert not cursor.may_have_sent(("metrics", "train", 15, 1))
    assert not cursor.may_have_sent(("metrics", "valid", 5, 1))
    cursor.note_places(cursor.peek(100))
    assert cursor.may_have_sent(("metrics", "train", 14, 1)) == (
        position == -1 or is_sent
    )
    assert cursor.may_have_sent(("notes", "", None, 1))
    assert not cursor.may_have_sent(("notes", "", 3, 1))


def test_thinned_points_are_the_same_in_one_go_and_in_several(record, read_into):
    run = record()
    run.log_curve(500)
    whole, split = Cursor(per_key=400), Cursor(per_key=400)
    scan = read_into(whole, run)
    read_into(split, run)
    wanted = whole.next_points(whole.peek(1000), scan.keys)["seq"].to_pylist()
    found = []
    while (rows := split.peek(90)) is not None:
        found += split.next_points(rows, scan.keys)["seq"].to_pylist()
        split.advance(rows["seq"][-1].as_py())
    assert found == wanted
    assert 400 <= len(wanted) < 420  # two series, of each the first 200
    assert whole.is_thinned
    assert whole.list_thinned() == ["train/loss", "train/accuracy"]


def test_thinning_continues_after_the_points_that_mlflow_has(record, read_into):
    run = record()
    run.log_curve(500)
    whole, later = Cursor(per_key=400), Cursor(position=599, per_key=400)
    scan = read_into(whole, run)
    read_into(later, run)
    wanted = whole.next_points(whole.peek(1000), scan.keys)["seq"].to_pylist()
    found = later.next_points(later.peek(1000), scan.keys)["seq"].to_pylist()
    assert found == [seq for seq in wanted if seq > 599]


def test_equal_points_get_the_same_times_after_a_restart(record, read_into):
    run = record()
    for _ in range(30):
        run.run.log_metric("loss", 0.5, set="train", index=1)
    whole, later = Cursor(), Cursor(position=19)
    scan = read_into(whole, run)
    read_into(later, run)
    wanted = whole.next_points(whole.peek(100), scan.keys)["time_ms"].to_pylist()
    found = later.next_points(later.peek(100), scan.keys)["time_ms"].to_pylist()
    assert len(set(wanted)) == 30
    assert found == wanted[20:]
