"""Long series: MLflow gets some points, always the same ones, and it is told so."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

import tracking
from tests.tracking.stores import execute_sql, get_run
from tracking.delivery.waiting import _report_thinned
from tracking.verify.mlflow import compare_with_mlflow


def points_of(points):
    return [(key, step, value) for key, step, value, _ in points]


def test_points_sent_live_are_those_of_a_later_sync(
    record, deliver, start_delivery, store, tmp_path, in_mlflow, until
):
    recorded = record(delivery={"per_key": 40})
    run = recorded.run
    run.begin_fit()
    recorded.log_curve(30)
    live = start_delivery(recorded.path, store)

    def wait_for_rows():
        until(lambda: live.state.delivered >= run.position())

    wait_for_rows()
    position = run.position()
    recorded.log_curve(60, first=30)
    wait_for_rows()
    run.rewind(position)  # the replay is equal, and then longer
    recorded.log_curve(300, first=30)
    wait_for_rows()
    run.begin_fit()
    recorded.log_curve(45)
    run.finish()
    state = live.join()
    found = points_of(in_mlflow(store, state.mlflow_run_id))
    keys = [key for key, *_ in found]
    assert keys.count("train/loss") <= 40
    assert keys.count("train/loss_fit2") <= 40
    steps = {step for key, step, _ in found if key == "train/loss"}
    assert {0, 19, 329} <= steps
    assert not state.superseded
    other = f"sqlite:///{tmp_path}/other.db"
    synced = deliver(recorded.path, other, is_sync=True)
    assert points_of(in_mlflow(other, synced.state.mlflow_run_id)) == found
    assert synced.num_present == len(found)


def test_series_of_half_the_limit_is_complete_while_it_grows(
    record, start_delivery, store, in_mlflow, in_journal, until
):
    recorded = record(delivery={"per_key": 100})
    recorded.log_curve(50)
    live = start_delivery(recorded.path, store)
    until(lambda: live.state.delivered >= recorded.run.position())
    run_id = live.state.mlflow_run_id
    assert in_mlflow(store, run_id) == in_journal(recorded.path)
    assert not live.worker._cursor.is_thinned
    recorded.run.finish()
    live.join()


def test_it_is_told_where_somebody_looks(
    record, deliver, store, client, read_back, capsys
):
    recorded = record(delivery={"per_key": 40})
    recorded.log_curve(50)
    recorded.run.log_metric("loss", 1.0, set="valid", index=1)
    recorded.run.finish()
    state = deliver(recorded.path, store).state
    thinned = {"train/loss": 40, "train/accuracy": 40}
    assert state.list_thinned() == thinned
    tags = get_run(client, store, state).data.tags
    assert '"thinned":{"train/loss":40,"train/accuracy":40}' in tags["luz.flags"]
    assert "at most 40, spread over its steps" in tags["mlflow.note.content"]
    past = tracking.open(recorded.path)
    found = compare_with_mlflow(past, read_back(past.path, store))
    assert found.mismatches == []
    assert found.num_expected == found.num_found <= 81
    assert found.notes[0] == (
        "train/loss: MLflow has at most 40 points, the records have all"
    )
    capsys.readouterr()  # what MLflow says of its database
    _report_thinned([(past.id, thinned)])
    assert capsys.readouterr().err == (
        f"MLflow has at most 40 points of train/loss and others of {past.id}; the records "
        "have all. delivery={'per_key': None} sends all.\n"
    )


def test_all_points_are_sent_if_asked_for(record, deliver, store, client):
    recorded = record(delivery={"per_key": None})
    for i in range(10_001):
        recorded.run.log_step({"loss": i / 7}, step=i)
    recorded.run.finish()
    state = deliver(recorded.path, store).state
    points = execute_sql(store, "SELECT step, value FROM metrics ORDER BY step")
    assert points == [(i, i / 7) for i in range(10_001)]
    assert state.list_thinned() == {}
    assert "**Points**" not in get_run(client, store, state).data.tags


MEASURE = """
import resource, sqlite3, sys
from pathlib import Path
import numpy as np
from tracking.delivery.cursor import Cursor
from tracking.delivery.reconcile import Reconciler
from tracking.delivery.scan import JournalScan
from tracking.mlflow_store.client import _read_sqlite

rank_dir, database, per_key, expected = sys.argv[1:]
scan = JournalScan(Path(rank_dir))
scan.read_all()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cursor = Cursor(scan.last_seq, int(per_key) or None)
reconciler = Reconciler(scan, cursor)
outcome = reconciler.compare(_read_sqlite(Path(database), "a"), "ended")
assert (outcome.num_rows, reconciler.num_present) == (int(expected), 300_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def run_python(script, *arguments):
    """Run a script in a process of its own; return what it prints."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    root = str(Path(tracking.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_long_series_are_compared_in_little_memory(record, tmp_path):
    recorded = record()
    for i in range(300_000):
        recorded.run.log_step({"loss": 1 / (i + 1)}, step=i)
    recorded.run.finish()
    database = tmp_path / "points.db"
    with closing(sqlite3.connect(database)) as db, db:
        db.execute(
            "CREATE TABLE metrics (key, timestamp, step, value, is_nan, run_uuid)"
        )
        rows = (
            ("train/loss_step", 1, i, 1 / (i + 1), 0, "a") for i in range(10, 300_000)
        )
        db.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?, ?, ?)", rows)
    folder = recorded.path / "records" / "0"
    all_kb, thinned_kb = (
        int(run_python(MEASURE, folder, database, per_key, 10))
        for per_key in (0, 10_000)
    )
    # 40 bytes for each point of MLflow, and its table of 28.
    assert all_kb < 80_000
    assert thinned_kb < 80_000
