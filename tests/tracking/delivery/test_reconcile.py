"""Rewinds and overwrites of rows that MLflow already has."""

from __future__ import annotations

import math

import pyarrow as pa
import pytest

from tests.tracking.stores import get_run
from tracking.delivery.cursor import Cursor
from tracking.delivery.reconcile import (
    LONGEST_WAIT_S,
    QUIET_S,
    ExpectedPoints,
    Reconciler,
    StalePoints,
)
from tracking.delivery.scan import JournalScan
from tracking.mlflow_store.client import Point
from tracking.mlflow_store.points import points_table
from tracking.store import get_rank_dir


def test_rows_superseded_before_sending_are_never_sent(
    record, deliver, store, in_mlflow
):
    run = record()
    run.run.log_metric("loss", 3.0, set="valid", index=1)
    run.run.log("metrics", "valid", {"loss": 2.0}, index=1, append=False)
    position = run.run.position()
    run.run.log_metric("loss", 9.0, set="valid", index=2)
    run.run.rewind(position)
    run.run.log_metric("loss", 1.0, set="valid", index=2)
    run.run.finish()
    made = deliver(run.path, store)
    found = in_mlflow(store, made.state.mlflow_run_id)
    assert [point[1:3] for point in found] == [(1, 2.0), (2, 1.0)]
    assert made.num_sent == 2


@pytest.mark.parametrize("is_live", [True, False])
def test_equal_replay_after_a_rewind_is_not_sent_twice(
    record, make_worker, deliver, store, in_mlflow, is_live
):
    run = record()
    run.log_curve(20)
    position = run.run.position()
    run.log_curve(20, first=20)
    run.run.log("profile", "fit", {"epoch_s": 1.25}, index=1)
    run.run.finish("killed")
    first = deliver(run.path, store)
    before = in_mlflow(store, first.state.mlflow_run_id)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(20, first=20)
    again.run.log("profile", "fit", {"epoch_s": 1.5}, index=1)  # never the same twice
    again.log_curve(1, first=40)
    again.run.finish()
    second = deliver(run.path, store, is_sync=not is_live)
    assert second.state.mlflow_run_id == first.state.mlflow_run_id
    after = in_mlflow(store, first.state.mlflow_run_id)
    assert [p for p in after if p[1] != 40] == before
    assert len(after) == len(before) + 2


def test_differing_replay_gets_a_new_mlflow_run_without_a_zigzag(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(20)
    position = run.run.position()
    run.log_curve(20, first=20)
    run.run.finish("killed")
    first = deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(20, first=20, scale=2.0)
    again.run.finish()
    second = deliver(run.path, store)
    fresh = second.state.mlflow_run_id
    assert fresh != first.state.mlflow_run_id
    assert in_mlflow(store, fresh) == in_journal(run.path)
    old = client(store).get_run(first.state.mlflow_run_id)
    assert old.data.tags["luz.superseded_by"] == fresh
    assert old.info.run_name == f"{run.run.name} (superseded)"
    assert second.state.superseded == [first.state.mlflow_run_id]
    assert get_run(client, store, second.state).info.status == "FINISHED"
    third = deliver(run.path, store, is_sync=True)
    assert (third.num_sent, third.state.mlflow_run_id) == (0, fresh)


def test_rewound_run_that_ends_earlier_leaves_no_stale_points(
    record, deliver, store, in_mlflow, in_journal
):
    run = record()
    run.log_curve(5)
    position = run.run.position()
    run.log_curve(10, first=5)
    run.run.finish("killed")
    deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(2, first=5)
    again.run.finish()
    made = deliver(run.path, store)
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


def test_run_killed_in_its_replay_keeps_its_mlflow_run_until_it_is_synced(
    record, deliver, store, in_mlflow, in_journal
):
    run = record()
    run.log_curve(5)
    position = run.run.position()
    run.log_curve(10, first=5)
    run.run.finish("killed")
    first = deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(2, first=5)
    again.run.finish("killed")
    second = deliver(run.path, store)
    assert second.state.mlflow_run_id == first.state.mlflow_run_id
    synced = deliver(run.path, store, is_sync=True)
    assert synced.state.mlflow_run_id != first.state.mlflow_run_id
    assert in_mlflow(store, synced.state.mlflow_run_id) == in_journal(run.path)


@pytest.mark.parametrize(("value", "is_same_run"), [(3.0, True), (2.0, False)])
def test_overwrite_of_what_mlflow_has_ends_in_one_history(
    record, deliver, store, in_mlflow, in_journal, client, value, is_same_run
):
    run = record()
    run.run.log_metric("loss", 3.0, set="valid", index=1)
    run.run.finish("killed")
    first = deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.log("metrics", "valid", {"loss": value}, index=1, append=False)
    again.run.log_metric("loss", 1.0, set="valid", index=2)
    again.run.finish()
    second = deliver(run.path, store)
    is_same = second.state.mlflow_run_id == first.state.mlflow_run_id
    assert is_same == is_same_run
    found = in_mlflow(store, second.state.mlflow_run_id)
    wanted = [point[1:3] for point in in_journal(run.path)]
    assert [point[1:3] for point in found] == wanted == [(1, value), (2, 1.0)]
    assert second.state.behind == 0


def test_overwrite_in_a_live_run_waits_for_its_end(
    record, start_delivery, store, until, in_mlflow, in_journal
):
    run = record()
    run.run.log("metrics", "valid", {"loss": 3.0}, index=1, append=False)
    work = start_delivery(run.path, store)
    until(lambda: work.state.delivered >= 1)
    first = work.state.mlflow_run_id
    run.run.log("metrics", "valid", {"loss": 2.0}, index=1, append=False)
    run.run.log("metrics", "valid", {"loss": 9.0}, index=2, append=False)
    until(lambda: work.state.delivered >= run.run.position())
    assert [point[1:3] for point in in_mlflow(store, first)] == [(1, 3.0), (2, 9.0)]
    until(lambda: work.state.behind == 1)
    run.run.finish(wait_s=0)
    state = work.join()
    assert state.superseded == [first]
    assert in_mlflow(store, state.mlflow_run_id) == in_journal(run.path)


def test_rewind_in_a_live_run_gets_a_new_mlflow_run_at_the_first_difference(
    record, start_delivery, store, until, in_mlflow, in_journal
):
    run = record()
    run.log_curve(5)
    position = run.run.position()
    run.log_curve(5, first=5)
    work = start_delivery(run.path, store)
    until(lambda: work.state.delivered >= run.run.position())
    first = work.state.mlflow_run_id
    run.run.rewind(position)
    run.log_curve(2, first=5)
    until(lambda: work.state.delivered >= run.run.position())
    assert work.state.mlflow_run_id == first
    assert len(in_mlflow(store, first)) == 20
    run.log_curve(3, first=7, scale=2.0)
    until(lambda: work.state.mlflow_run_id != first)
    run.run.finish(wait_s=0)
    state = work.join()
    assert in_mlflow(store, state.mlflow_run_id) == in_journal(run.path)


# --------------------------------------------------------- when and what to compare


class Clock:
    now_s = 50.0

    def __call__(self):
        return self.now_s


class Half:
    """A run of which MLflow has all rows so far, and the parts that deliver it."""

    def __init__(self, recorded, **options):
        self.recorded = recorded
        self.clock = Clock()
        self.scan = JournalScan(get_rank_dir(recorded.path, 0))
        self.cursor = Cursor(recorded.run.position())
        self.reconciler = Reconciler(
            self.scan, self.cursor, clock=self.clock, **options
        )
        self.read()
        self.history = self.points()

    def read(self):
        """Read what was logged."""
        while (rows := self.scan.read()).num_rows:
            self.cursor.push(rows, self.scan)
            self.reconciler.check_control_rows()

    def points(self):
        """Points of all live rows."""
        expected = ExpectedPoints(self.scan, self.scan.last_seq, None, is_final=True)
        pages = [points for points, _ in expected.read_pages()]
        return pa.concat_tables(pages).unify_dictionaries()

    def pending(self):
        """Points of the rows that come next."""
        rows = []
        while (some := self.cursor.peek(100)) is not None:
            rows.append(points_table(some, self.scan.keys))
            self.cursor.advance(some["seq"][-1].as_py())
        return pa.concat_tables(rows).unify_dictionaries()

    def compare(self, stage):
        return self.reconciler.compare(self.history, stage)


@pytest.fixture
def half(record):
    def make(**options):
        recorded = record()
        recorded.log_curve(10)
        return Half(recorded, **options)

    return make


def test_burst_of_rewinds_is_answered_by_one_comparison(half):
    run = half()
    for position in (15, 11, 7):
        run.recorded.run.rewind(position)
        run.read()
        assert run.reconciler.is_requested
        run.clock.now_s += QUIET_S - 0.01
        assert not run.reconciler.is_due()
    run.clock.now_s += 0.02
    assert run.reconciler.is_due()
    run.compare("live")
    assert not run.reconciler.is_requested


def test_burst_that_does_not_end_is_answered_at_last(half):
    run = half()
    start_s = run.clock.now_s
    while not run.reconciler.is_requested or not run.reconciler.is_due():
        run.recorded.run.rewind(15)
        run.read()
        run.clock.now_s += QUIET_S / 2
    assert run.clock.now_s - start_s == pytest.approx(LONGEST_WAIT_S, abs=QUIET_S)


def test_rewind_of_rows_that_were_not_sent_needs_no_comparison(half):
    run = half()
    position = run.recorded.run.position()
    run.recorded.log_curve(5, first=10)
    run.recorded.run.rewind(position)
    run.read()
    assert not run.reconciler.is_requested
    assert not run.reconciler.is_required_at_end


def test_overwrite_of_rows_that_were_not_sent_defers_nothing(half):
    run = half()
    for value in (1.0, 2.0):
        run.recorded.run.log("metrics", "valid", {"loss": value}, index=1, append=False)
    run.read()
    live = run.cursor.peek(100)
    assert run.reconciler.remove_deferred(live) is live
    assert not run.reconciler.is_required_at_end


def test_rows_of_an_overwritten_place_wait_for_the_end(half):
    run = half()
    run.recorded.run.log("metrics", "train", {"loss": 9.0}, index=3, append=False)
    run.recorded.log_curve(1, first=10)
    run.read()
    rows = run.cursor.peek(100)
    live = rows.filter(pa.array(run.scan.tombstones.mask_live(rows)))
    assert run.reconciler.remove_deferred(live)["index"].to_pylist() == [10, 10]
    assert run.reconciler.num_deferred == 1
    assert run.reconciler.is_required_at_end
    assert not run.reconciler.is_requested


@pytest.mark.parametrize(
    ("stage", "needs_new_run", "stays_required"),
    [("live", False, True), ("killed", False, True), ("ended", True, True)],
)
def test_stale_points_need_a_new_run_once_the_run_has_ended(
    half, stage, needs_new_run, stays_required
):
    run = half()
    run.recorded.run.rewind(9)
    run.read()
    run.pending()
    outcome = run.compare(stage)
    assert (outcome is None) == needs_new_run
    assert outcome is None or outcome.num_rows == 0
    assert run.reconciler.is_required_at_end == stays_required
    assert run.reconciler.num_present == 10


def test_equal_replay_uses_up_the_stale_points(half):
    run = half()
    run.recorded.run.rewind(9)
    run.read()
    run.compare("live")
    run.recorded.log_curve(5, first=5)
    run.recorded.log_curve(1, first=10)
    run.read()
    missing = run.reconciler.remove_present(run.pending())
    assert missing["step"].to_pylist() == [10, 10]
    assert not run.reconciler.is_required_at_end


@pytest.mark.parametrize("can_replace", [True, False])
def test_differing_replay_needs_a_new_run_unless_it_is_the_callers(half, can_replace):
    run = half(can_replace=can_replace)
    run.recorded.run.rewind(9)
    run.read()
    run.compare("live")
    run.recorded.log_curve(5, first=5, scale=2.0)
    run.read()
    missing = run.reconciler.remove_present(run.pending())
    if can_replace:
        assert missing is None
    else:
        assert missing["value"].to_pylist() == [2 / (i + 1) for i in range(5, 10)]


def test_points_that_mlflow_lost_are_missing(half):
    run = half(is_required=True)
    run.history = run.history.slice(3)
    outcome = run.compare("ended")
    assert outcome["seq"].to_pylist() == [0, 1, 2]
    assert run.reconciler.num_present == 20
    assert not run.reconciler.is_required_at_end


def test_points_of_others_in_a_borrowed_run_do_not_matter(half):
    run = half(is_required=True)
    other = pa.table({"key": ["theirs"], "time_ms": [1], "step": [1], "value": [2.0]})
    columns = [run.history[name].cast(other[name].type) for name in other.column_names]
    run.history = pa.concat_tables([pa.table(columns, other.column_names), other])
    outcome = run.compare("ended")
    assert outcome.num_rows == 0


def test_stale_durations_equal_any_value():
    stale = StalePoints(frozenset({"profile/s"}))
    stale.add("profile/s", 1, 0.5)
    stale.add("loss", 1, 0.5)
    stale.add("loss", 1, math.nan)
    assert stale.take(Point("loss", 0.6, 0, 1)) is False
    assert stale.take(Point("loss", 0.5, 0, 2)) is None
    assert stale.take(Point("loss", math.nan, 0, 1)) is True
    assert stale.take(Point("profile/s", 0.7, 0, 1)) is True
    assert stale.take(Point("profile/s", 0.7, 0, 1)) is None
    assert len(stale) == 1
