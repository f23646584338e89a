import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from tracking.journal.arrays import (
    join_chunks,
    make_array,
    make_empty_table,
    make_texts,
    read_array,
)
from tracking.schema import NAMES, SCHEMA

TRACKED = """
import sys
import tracking

run = tracking.start(params={"lr": 0.1, "text": "\\u00fc", "none": None}, delivery=False)
run.begin_fit()
for step in range(17_000):  # more than a block
    run.log_step({"loss": step / 7}, step)
run.log_metric("accuracy", 0.5)
run.log("notes", "train", {"a": None, "b": "text", "c": [1, 2]}, index=1, epoch=1)
run.log("notes", "train", {"a": 1}, index=1, epoch=1)
run.log_text("hello", "hello.txt")
position = run.position()
run.log_metric("accuracy", 0.6)
run.rewind(position)
run.end_fit()
assert run.begin_fit() == 2
run.log("metrics", "valid", {"loss": 0.3}, epoch=1)
run.finish()
tracking.start(delivery=False).finish()
with tracking.start(run_id=run.id, delivery=False) as again:
    assert again.begin_fit() == 3
    again.log_metric("accuracy", 0.7)
past = tracking.open(run.id)
table = past.records(superseded=True)
assert past.params == {"lr": 0.1, "text": "\\u00fc", "none": None}
assert len(past.records("metrics", name="accuracy")) == 2
assert past.wide().num_rows > 17_000
assert past.summary()["train/loss_step"]["count"] == 17_000
assert "pandas" not in sys.modules
frame = table.to_pandas()
assert len(frame) == len(table) > 17_000
assert frame["value"].isna().sum() == table["value"].null_count > 0
"""


def test_tracked_run_imports_no_pandas(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", TRACKED], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def read_only(values):
    values.flags.writeable = False
    return values


ROWS = np.zeros(9, [("a", "<i4"), ("b", "<f8")])
ROWS["b"] = np.arange(9) / 3

NUMBERS = [
    np.arange(-3, 6, dtype=np.int8),
    np.arange(20)[::-2],  # not contiguous
    ROWS["b"],
    read_only(np.arange(9, dtype=np.float32)),
    np.frombuffer(bytes(range(36)), np.int32),
    np.array([0.0, -0.0, np.inf, np.nan]),
    np.arange(9) % 3 == 0,
    np.empty(0),
    np.empty(0, bool),
]


@pytest.mark.parametrize("values", NUMBERS, ids=lambda one: f"{one.dtype}-{len(one)}")
def test_numbers_are_those_of_pyarrow_and_come_back(values):
    is_null = np.arange(len(values)) % 4 == 1
    for mask in (
        None,
        is_null,
        np.ones(len(values), bool),
        np.zeros(len(values), bool),
    ):
        made, expected = make_array(values, mask), pa.array(values, mask=mask)
        made.validate(full=True)
        assert made.type == expected.type
        assert made.null_count == expected.null_count
        assert repr(made.to_pylist()) == repr(expected.to_pylist())  # NaN, -0.0
        kept = values if mask is None else np.where(mask, values.dtype.type(1), values)
        for column in (made, pa.chunked_array([made[:3], made[3:]], made.type)):
            found = read_array(column, null=1)
            assert found.dtype == values.dtype
            assert found.tobytes() == kept.tobytes()
            assert read_array(column[2:5], null=1).tobytes() == kept[2:5].tobytes()


def test_chunks_may_be_absent():
    for type_ in (pa.int64(), pa.bool_(), pa.string(), NAMES):
        none = pa.chunked_array([], type_)
        assert join_chunks(none).equals(none.combine_chunks())
    assert len(read_array(pa.chunked_array([], pa.int64()))) == 0


@pytest.mark.parametrize(
    "texts", [[], [""], ["a", "", "ü€𝄞"], ["a", None, "", None], [None], ("x",) * 9]
)
def test_texts_are_those_of_pyarrow(texts):
    made = make_texts(texts)
    made.validate(full=True)
    assert made.equals(pa.array(texts, pa.string()))


def test_texts_that_are_not_unicode_are_refused():
    with pytest.raises(UnicodeEncodeError):
        make_texts(["\ud800"])


def test_empty_table_has_the_schema():
    assert make_empty_table().equals(SCHEMA.empty_table(), check_metadata=True)
