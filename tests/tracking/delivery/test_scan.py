from __future__ import annotations

import math

import pytest

from tracking.delivery.scan import JournalScan
from tracking.store import get_rank_dir


@pytest.fixture
def scan_of():
    """Makes the scan of a run."""
    return lambda run: JournalScan(get_rank_dir(run.path, 0))


def test_rows_are_read_once_as_they_are_written(record, scan_of):
    run = record()
    scan = scan_of(run)
    assert scan.read().num_rows == 0
    assert scan.last_seq == -1
    run.log_curve(5)
    assert scan.count_unread() == 10
    rows = scan.read()
    assert rows["name"].to_pylist() == ["loss", "accuracy"] * 5
    assert scan.last_seq == run.run.position()
    assert scan.count_unread() == 0
    assert scan.read().num_rows == 0
    run.log_curve(1, first=5)
    assert scan.read()["index"].to_pylist() == [5, 5]


def test_folder_that_does_not_exist_has_no_rows(tmp_path):
    scan = JournalScan(tmp_path / "0")
    scan.read_all()
    assert scan.last_seq == -1
    assert scan.properties().params == {}


def test_keys_follow_the_order_of_the_journal(record, scan_of):
    run = record()
    run.run.log("metrics", "train", {"a/b": 1.0})
    run.run.log("metrics", "train/a", {"b": 2.0})
    run.run.log("metrics", "train", "a word")
    scan = scan_of(run)
    scan.read_all()
    first, second = scan.keys.by_series.values()
    assert first == "train/a/b"
    assert second.startswith("train/a/b-")


def test_properties_change_with_the_rows(record, scan_of):
    run = record(params={"lr": 0.1})
    run.run.set_tags({"a": 1})
    scan = scan_of(run)
    scan.read_all()
    before = scan.properties()
    assert (before.params, before.tags) == ({"lr": "0.1"}, {"a": "1"})
    assert scan.properties() is before
    run.run.set_tags({"a": 2})
    scan.read_all()
    assert scan.properties().tags == {"a": "2"}


def test_properties_after_a_rewind_are_those_before_it(record, scan_of):
    run = record()
    run.run.set_tags({"a": 1})
    position = run.run.position()
    run.run.set_tags({"a": 2, "b": 3})
    run.run.rewind(position)
    scan = scan_of(run)
    scan.read_all()
    assert scan.properties().tags == {"a": "1"}


def test_inexact_values_are_counted(record, scan_of):
    run = record()
    for value in (math.inf, -math.inf, 2**70, 2**53, math.nan):
        run.run.log("metrics", "train", {"x": value})
    scan = scan_of(run)
    scan.read_all()
    assert scan.properties().flags == {
        "infinite": {"train/x": 2},
        "large_int": {"train/x": 1},
    }


def test_second_scan_knows_the_control_rows_of_the_first(record, scan_of):
    run = record()
    run.log_curve(5)
    run.run.rewind(3)
    run.run.log("metrics", "train", {"loss": 1.0}, index=1, append=False)
    first = scan_of(run)
    first.read_all()
    second = JournalScan(first.rank_dir, first)
    assert len(second.tombstones.rewinds) == 1
    third = JournalScan(first.rank_dir, second)  # the second has read nothing
    third.read_all()
    assert len(third.tombstones.rewinds) == len(third.tombstones.overwrites) == 1
    run.run.rewind(2)
    third.read_all()
    assert len(third.tombstones.rewinds) == 2
