from __future__ import annotations

import pytest
from pyarrow import parquet

import tracking
from tests.tracking.tables import same
from tracking.delivery.summaries import find_unit, write_summaries
from tracking.store import results_path


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


def test_results_give_last_lowest_and_highest_value_the_loss_first(record):
    run = record()
    for epoch, (accuracy, loss) in enumerate(
        [(0.5, 2.0), (0.75, 1.0), (0.625, 1.5)], 1
    ):
        run.run.log("metrics", "valid", {"a|b": accuracy, "loss": loss}, index=epoch)
    run.run.log("metrics", "train", {"loss": float("nan")}, index=3)
    run.run.finish()
    (run.path / "delivery").mkdir(exist_ok=True)
    write_summaries(run.path)
    assert results_path(run.path).read_text() == (
        "**Results** after epoch 3\n\n"
        "| | last | lowest | highest |\n"
        "| --- | --- | --- | --- |\n"
        "| valid/loss | 1.5 | 1 (2) | 2 (1) |\n"
        "| train/loss | nan |  |  |\n"
        "| valid/a\\|b | 0.625 | 0.5 (1) | 0.75 (2) |\n"
    )


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


def test_link_in_a_run_of_somebody_else_is_not_written_through(record, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    run = record()
    run.log_curve(5)
    run.run.finish()
    (run.path / "artifacts").mkdir(exist_ok=True)
    for name in ("records.parquet", "curves.png"):
        (run.path / "artifacts" / name).symlink_to(precious)
    write_summaries(run.path)
    assert precious.read_text() == "mine"


def test_linked_folder_of_artifacts_gets_no_summaries(record, tmp_path):
    (tmp_path / "other").mkdir()
    run = record()
    run.log_curve(5)
    run.run.finish()
    (run.path / "artifacts").symlink_to(tmp_path / "other")
    assert write_summaries(run.path) == []
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize(
    ("places", "unit"),
    [
        ([(1, 1, 10), (2, 2, 20)], "epoch"),
        ([(10, 1, 10), (20, 1, 20)], "step"),
        ([(1, 1, 1), (2, 2, 2)], "epoch"),
        ([(7, None, None)], "epoch"),
    ],
)
def test_curves_are_labelled_by_what_their_indices_count(record, places, unit):
    run = record().run
    for index, epoch, step in places:
        run.log("metrics", "valid", {"loss": 1.0}, index, epoch=epoch, step=step)
    run.log("lr", "train", {"opt": 0.1}, 3, epoch=1, step=9)
    run.finish()
    assert find_unit(tracking.open(run.path).records()) == unit
