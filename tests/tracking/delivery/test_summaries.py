from __future__ import annotations

from pyarrow import parquet

import tracking
from tests.tracking.tables import same
from tracking.delivery.summaries import write_summaries


def test_curves_and_records_are_written_into_the_artifacts(record):
    run = record()
    run.log_curve(5)
    run.run.finish()
    written = write_summaries(run.path)
    folder = run.path / "artifacts"
    assert written == [folder / "records.parquet", folder / "curves.png"]
    table = parquet.read_table(folder / "records.parquet")
    assert same(table, tracking.open(run.path).records())
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_run_without_metrics_has_no_curves(record):
    run = record(params={"lr": 0.1})
    run.run.finish()
    written = write_summaries(run.path)
    assert [path.name for path in written] == ["records.parquet"]


def test_file_that_the_user_logged_is_kept(record):
    run = record()
    run.log_curve(5)
    run.run.log_text("mine", "curves.png")
    run.run.finish()
    written = write_summaries(run.path)
    assert [path.name for path in written] == ["records.parquet"]
    assert (run.path / "artifacts" / "curves.png").read_text() == "mine"
