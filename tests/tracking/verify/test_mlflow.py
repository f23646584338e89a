"""Journal and MLflow compared, with points deleted and changed on purpose."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

import tracking
from tracking.verify.mlflow import compare_with_mlflow


@pytest.fixture
def compared(read_back):
    """Mismatches with MLflow, as text, and the whole comparison."""

    def compare(path, store):
        found = compare_with_mlflow(tracking.open(path), read_back(path, store))
        return [str(mismatch) for mismatch in found.mismatches], found

    return compare


def test_clean_run_gives_nothing(finished, store, compared):
    mismatches, found = compared(finished, store)
    assert mismatches == []
    assert found.notes == []
    assert found.num_expected == found.num_found == 105


def test_each_row_that_differs_is_named(finished, store, compared, change):
    change("DELETE FROM metrics WHERE key = 'train/loss' AND step = 7")
    change("DELETE FROM metrics WHERE key = 'valid/nan'")
    change("UPDATE metrics SET value = 9 WHERE key = 'train/loss' AND step = 3")
    change("UPDATE metrics SET timestamp = 5 WHERE key = 'train/accuracy' AND step = 4")
    copied = "SELECT key, {}, timestamp + {}, run_uuid, step, is_nan FROM metrics"
    where = "WHERE key = 'train/accuracy' AND step = 10 AND value = 0.01"
    for value, later in ((77, 2), ("value", 1)):
        insert = "INSERT INTO metrics (key,value,timestamp,run_uuid,step,is_nan) "
        change(f"{insert} {copied.format(value, later)} {where}")
    mismatches, found = compared(finished, store)
    run = tracking.open(finished)
    (row,) = run.records(what="metrics", name="accuracy").slice(4, 1).to_pylist()
    sent_ms = math.floor(round(row["time"].timestamp() * 1e6) / 1000)
    assert mismatches == [
        "changed in MLflow: train/loss at step 3: value 0.25 is 9.0",
        f"changed in MLflow: train/accuracy at step 4: time_ms {sent_ms} is 5",
        "missing in MLflow: train/loss at step 7: 0.125",
        "missing in MLflow: valid/nan at step 1: nan",
        "duplicate in MLflow: train/accuracy at step 10: 0.01",
        "unknown in MLflow: train/accuracy at step 10: 77.0",
    ]
    assert (found.num_expected, found.num_found) == (105, 105)


def test_params_tags_and_artifacts_are_compared_too(
    finished, store, compared, client, change
):
    change("UPDATE params SET value = '7' WHERE key = 'lr'")
    change("DELETE FROM tags WHERE key = 'a'")
    run = next(iter(client(store).search_runs(["1"])))
    artifacts = run.info.artifact_uri.removeprefix("file://")
    (Path(artifacts) / "notes" / "a.txt").write_text("other")
    mismatches, _ = compared(finished, store)
    assert mismatches == [
        "changed in MLflow: param lr: '0.1' is '7'",
        "missing in MLflow: tag a",
    ]
    (Path(artifacts) / "notes" / "a.txt").write_text("longer than before")
    mismatches, _ = compared(finished, store)
    assert mismatches[-1] == (
        "changed in MLflow: bytes of artifact notes/a.txt: 5 is 18"
    )


def test_metrics_of_others_in_the_same_run_do_not_matter(
    finished, store, compared, client
):
    (run,) = client(store).search_runs(["1"])
    client(store).log_metric(run.info.run_id, "theirs", 1.0)
    assert compared(finished, store)[0] == []


def test_what_mlflow_cannot_hold_is_a_note(record, deliver, store, compared):
    run = record(params={"p": "x" * 6001})
    run.run.log_params({"q": 1})
    run.run.log_params({"q": 2})
    run.run.log_metric("loss", math.inf, set="train", index=1)
    run.run.log_metric("n", 2**60 + 1, set="train", index=1)
    run.run.set_tags({"t": "y" * 8001})
    run.run.finish()
    deliver(run.path, store)
    mismatches, found = compared(run.path, store)
    assert mismatches == []
    assert found.notes == [
        "train/loss: MLflow stores infinite values as the largest float (1 times)",
        "train/n: MLflow stores large integers as floats, rounded (1 times)",
        "param p: MLflow has the first 6000 of 6001 characters",
        "param q was logged with several values; MLflow has the first",
        "tag t: MLflow has the first 8000 of 8001 characters",
    ]


def test_row_that_mlflow_refused_is_missing_with_the_reason(
    finished, record, deliver, store, compared
):
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as db, db:
        db.execute(
            "CREATE TRIGGER no BEFORE INSERT ON metrics WHEN NEW.key = 'train/bad' "
            "BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )
    run = record()
    run.run.log_metric("bad", 1.0, set="train", index=1)
    run.run.finish()
    deliver(run.path, store)
    (mismatch,), _ = compared(run.path, store)
    assert mismatch.startswith(
        "missing in MLflow: train/bad at step 1: 1.0, refused by MLflow: "
    )


@pytest.mark.parametrize("is_equal", [True, False])
def test_replayed_run_is_equal_once_it_has_ended(
    record, deliver, store, compared, is_equal
):
    run = record()
    run.log_curve(5)
    position = run.run.position()
    run.log_curve(5, first=5)
    run.run.log("profile", "fit", {"epoch_s": 1.25}, index=1)
    run.run.finish("killed")
    deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.log_curve(5, first=5, scale=1.0 if is_equal else 2.0)
    again.run.log("profile", "fit", {"epoch_s": 1.5}, index=1)
    again.run.finish()
    deliver(run.path, store)
    assert compared(run.path, store)[0] == []


def test_points_left_by_a_rewind_are_called_superseded(
    record, deliver, store, compared
):
    run = record()
    run.log_curve(2)
    position = run.run.position()
    run.log_curve(1, first=2)
    run.run.finish("killed")
    deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.run.rewind(position)
    again.run.finish("killed")
    mismatches, _ = compared(run.path, store)
    assert mismatches == [
        "superseded in MLflow: train/accuracy at step 2: 0.002",
        "superseded in MLflow: train/loss at step 2: 0.3333333333333333",
    ]


def test_thinned_run_is_missing_nothing(record, deliver, store, compared, change):
    run = record(delivery={"per_key": 40})
    run.log_curve(500)
    run.run.finish()
    deliver(run.path, store)
    mismatches, found = compared(run.path, store)
    assert mismatches == []
    assert found.num_found <= 80
    change("DELETE FROM metrics WHERE key = 'train/loss' AND step = 499")
    assert compared(run.path, store)[0] == [
        "missing in MLflow: train/loss at step 499: 0.002"
    ]


def test_run_still_being_written_is_compared_as_far_as_it_was_sent(
    record, deliver, store, compared
):
    run = record()
    run.log_curve(10)
    run.run.finish("killed")
    deliver(run.path, store)
    again = record(run_id=run.run.id)
    again.log_curve(10, first=10)
    mismatches, found = compared(run.path, store)
    assert mismatches == []
    assert found.notes == ["20 rows have still to be delivered"]
