"""All comparisons of a run, and its damage."""

from __future__ import annotations

import pyarrow as pa
import pytest
from pyarrow import parquet

import tracking
from tracking.errors import DeliveryError
from tracking.verify.verify import verify


@pytest.mark.slow
def test_run_unknown_to_mlflow_is_an_error(record, store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run = record()
    run.run.finish()
    with pytest.raises(DeliveryError, match="expected it in MLflow, got no such run"):
        verify(tracking.open(run.path))


def test_verify_reads_mlflow_in_a_separate_process(
    finished, store, monkeypatch, change
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run = tracking.open(finished)
    tracking.export(run, finished / "artifacts" / "records.parquet")
    change("DELETE FROM metrics WHERE key = 'train/loss' AND step = 7")
    found = verify(run)
    assert found.num_rows == {"MLflow": (105, 104), "records.parquet": (108, 108)}
    assert found.message() == (
        f"verify: run {run.id} expected equal records, got 105 metric rows in the "
        "journal and 104 in MLflow; first missing train/loss at step 7. "
        f"Run 'harness sync {run.id}'."
    )


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
