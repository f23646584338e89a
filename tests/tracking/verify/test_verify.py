"""Journal, Parquet and MLflow compared, with rows deleted and changed on purpose."""

from __future__ import annotations

import math
import sqlite3
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

import tracking
from tracking.delivery.sync import MlflowContents
from tracking.errors import DeliveryError
from tracking.mlflow_store.runs import RunResolver
from tracking.verify import Comparison
from tracking.verify.mlflow import compare_with_mlflow
from tracking.verify.parquet import compare_with_file
from tracking.verify.verify import verify


def change(store, statement):
    with closing(sqlite3.connect(store.removeprefix("sqlite:///"))) as db, db:
        assert db.execute(statement).rowcount >= 1


@pytest.fixture
def read_back(client_class, cache):
    """What MLflow has of a run, read in this process."""

    def read(path, store):
        resolver = RunResolver(path, store, lambda uri: client_class(uri, cache))
        run = resolver.find()
        return MlflowContents(
            history=resolver.client.history(run.run_id),
            mlflow_run_id=run.run_id,
            experiment_id=run.experiment_id,
            tracking_uri=store,
            status=run.status,
            params=run.params,
            tags=run.tags,
            artifacts=resolver.client.artifacts(run.run_id),
        )

    return read


@pytest.fixture
def compared(read_back):
    """Mismatches with MLflow, as text, and the whole comparison."""

    def compare(path, store):
        found = compare_with_mlflow(tracking.open(path), read_back(path, store))
        return [str(mismatch) for mismatch in found.mismatches], found

    return compare


@pytest.fixture
def finished(record, deliver, store):
    """A run that was delivered whole."""
    run = record(params={"lr": 0.1}, tags={"a": "b"})
    run.log_curve(50)
    values = {"nan": math.nan, "zero": -0.0, "tiny": 5e-324, "yes": True, "n": 3}
    run.run.log("metrics", "valid", values, index=1)
    run.run.log_text("hello", "notes/a.txt")
    run.run.finish()
    deliver(run.path, store)
    return run.path


# --------------------------------------------------------------------------- MLflow


def test_clean_run_gives_nothing(finished, store, compared):
    mismatches, found = compared(finished, store)
    assert mismatches == []
    assert found.notes == []
    assert found.num_expected == found.num_found == 105


def test_each_row_that_differs_is_named(finished, store, compared):
    change(store, "DELETE FROM metrics WHERE key = 'train/loss' AND step = 7")
    change(store, "DELETE FROM metrics WHERE key = 'valid/nan'")
    change(store, "UPDATE metrics SET value = 9 WHERE key = 'train/loss' AND step = 3")
    change(
        store,
        "UPDATE metrics SET timestamp = 5 WHERE key = 'train/accuracy' AND step = 4",
    )
    copied = "SELECT key, {}, timestamp + {}, run_uuid, step, is_nan FROM metrics"
    where = "WHERE key = 'train/accuracy' AND step = 10 AND value = 0.01"
    for value, later in ((77, 2), ("value", 1)):
        insert = "INSERT INTO metrics (key,value,timestamp,run_uuid,step,is_nan) "
        change(store, f"{insert} {copied.format(value, later)} {where}")
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


def test_params_tags_and_artifacts_are_compared_too(finished, store, compared, client):
    change(store, "UPDATE params SET value = '7' WHERE key = 'lr'")
    change(store, "DELETE FROM tags WHERE key = 'a'")
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


def test_thinned_run_lacks_nothing(record, deliver, store, compared):
    run = record(delivery={"per_key": 40})
    run.log_curve(500)
    run.run.finish()
    deliver(run.path, store)
    mismatches, found = compared(run.path, store)
    assert mismatches == []
    assert found.num_found <= 80
    change(store, "DELETE FROM metrics WHERE key = 'train/loss' AND step = 499")
    assert compared(run.path, store)[0] == [
        "missing in MLflow: train/loss at step 499: 0.002"
    ]


def test_run_that_goes_on_is_compared_as_far_as_it_was_sent(
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


@pytest.mark.slow
def test_run_that_mlflow_has_not_is_an_error(record, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run = record()
    run.run.finish()
    with pytest.raises(DeliveryError, match="expected it in MLflow, got no such run"):
        verify(tracking.open(run.path))


def test_whole_comparison_reads_mlflow_in_a_process_of_its_own(
    finished, store, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run = tracking.open(finished)
    tracking.export(run, finished / "artifacts" / "records.parquet")
    change(store, "DELETE FROM metrics WHERE key = 'train/loss' AND step = 7")
    found = verify(run)
    assert found.num_rows == {"MLflow": (105, 104), "records.parquet": (108, 108)}
    assert found.message() == (
        f"verify: run {run.id} expected equal records, got 105 metric rows in the "
        "journal and 104 in MLflow; first missing train/loss at step 7. "
        f"Run 'harness sync {run.id}'."
    )


# -------------------------------------------------------------------------- Parquet


@pytest.fixture
def exported(record, tmp_path):
    """A run with an export of it, and of another in the same file."""
    other = record()
    other.log_curve(3)
    run = record(params={"lr": 0.1})
    run.log_curve(4)
    special = {"nan": math.nan, "zero": -0.0, "none": None, "text": "ü", "big": 2**70}
    run.run.log("metrics", "valid", special, index=1)
    run.run.finish()
    other.run.finish()
    file = tmp_path / "both.parquet"
    tracking.export([run.path, other.path], file)
    return tracking.open(run.path), file


def rewrite(file, changed):
    """Change the table in a file."""
    table = changed(parquet.read_table(file))
    parquet.write_table(table, file)


def test_equal_file_gives_nothing(exported):
    run, file = exported
    assert compare_with_file(run, file) == Comparison([], [], 14, 14)
    found = verify(run, [file], mlflow=False)
    assert (found.is_equal, found.message()) == (True, "")


def test_each_row_of_a_file_that_differs_is_named(exported):
    run, file = exported
    places = [
        i
        for i, row in enumerate(parquet.read_table(file).to_pylist())
        if row["run"] == run.id
    ]

    def spoil(table):
        value = table["value"].to_pylist()
        value[places[2]] = 42.0
        zero = next(i for i in places if value[i] == 0.0 and i > places[8])
        value[zero] = 0.0
        column = table.schema.get_field_index("value")
        table = table.set_column(column, "value", pa.array(value))
        seq = table["seq"].to_numpy().copy()
        seq[places[5]] = 999
        column = table.schema.get_field_index("seq")
        table = table.set_column(column, table.schema.field("seq"), pa.array(seq))
        kept = np.r_[np.delete(np.arange(table.num_rows), places[3]), places[4]]
        return table.take(kept)

    rewrite(file, spoil)
    found = compare_with_file(run, file)
    assert (found.num_expected, found.num_found) == (14, 14)
    assert [str(mismatch) for mismatch in found.mismatches] == [
        "missing in both.parquet: metrics/train/loss at index 1, step 10, rank 0, seq 3",
        "missing in both.parquet: metrics/train/loss at index 2, step 20, rank 0, seq 5",
        "changed in both.parquet: metrics/train/accuracy at index 0, step 0, rank 0, "
        "seq 2: value 0.0 is 42.0",
        "changed in both.parquet: metrics/valid/zero at index 1, rank 0, seq 10: "
        "value -0.0 is 0.0",
        "unknown in both.parquet: metrics/train/loss at index 2, step 20, rank 0, "
        "seq 999",
        "duplicate in both.parquet: metrics/train/accuracy at index 1, step 10, rank 0, "
        "seq 4",
    ]
    message = verify(run, [file], mlflow=False).message()
    assert "got 14 rows in the journal and 14 in both.parquet; first missing" in message
    assert message.endswith(f"Run 'harness export {run.id} --to both.parquet'.")


def test_export_with_superseded_rows_is_compared_with_them(record, tmp_path):
    run = record()
    run.log_curve(3)
    run.run.rewind(1)
    run.run.finish()
    file = tmp_path / "all.parquet"
    tracking.export(run.path, file, superseded=True)
    found = compare_with_file(tracking.open(run.path), file)
    assert found == Comparison([], [], 7, 7)


def test_file_without_records_is_refused(exported, tmp_path):
    run, _ = exported
    file = tmp_path / "other.parquet"
    parquet.write_table(pa.table({"a": [1]}), file)
    with pytest.raises(ValueError, match=r"expected records in .*, got the columns a"):
        verify(run, [file], mlflow=False)


def test_damaged_journal_is_a_mismatch(record):
    run = record()
    run.log_curve(4)
    run.run.finish()
    (block,) = (run.path / "records" / "0").glob("*.arrow")
    data = block.read_bytes()
    block.write_bytes(data[: len(data) // 2])
    found = verify(tracking.open(run.path), [], mlflow=False)
    assert not found.is_equal
    assert "expected an undamaged journal, got damage: 8 rows" in found.message()
