"""Journal and Parquet compared, with rows deleted and changed on purpose."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from pyarrow import parquet

import tracking
from tracking.verify import Comparison
from tracking.verify.parquet import compare_with_file
from tracking.verify.verify import verify


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
    for block in (run.path / "records" / "0").iterdir():
        block.unlink()
    message = verify(run, [file], mlflow=False).message()
    assert message.endswith("Keep the file: the journal has lost these rows.")


def test_export_with_superseded_rows_is_compared_with_them(record, tmp_path):
    run = record()
    run.log_curve(3)
    run.run.rewind(1)
    run.run.finish()
    file = tmp_path / "all.parquet"
    tracking.export(run.path, file, superseded=True)
    found = compare_with_file(tracking.open(run.path), file)
    assert found == Comparison([], [], 7, 7)


def test_fits_of_a_file_are_compared(record, tmp_path):
    run = record().run
    for loss in (1.0, 2.0):
        run.begin_fit()
        run.log("metrics", "train", {"loss": loss}, 1, epoch=1)
    run.finish()
    file = tmp_path / "fits.parquet"
    tracking.export([run], file)
    past = tracking.open(run.path)
    assert compare_with_file(past, file).mismatches == []
    at = parquet.read_schema(file).names.index("fit")

    def forget(table):
        ones = pa.array(np.ones(table.num_rows, np.int32))
        return table.set_column(at, "fit", ones)

    rewrite(file, forget)
    [changed] = compare_with_file(past, file).mismatches
    assert (changed.kind, changed.detail) == ("changed", "fit 2 is 1")
    rewrite(
        file, lambda table: table.drop_columns(["fit"])
    )  # as earlier versions wrote
    assert compare_with_file(past, file).mismatches == []
