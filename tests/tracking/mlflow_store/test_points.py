"""Points as a real MLflow database stores them."""

from __future__ import annotations

import json
import math
import sys

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tests.tracking.stores import get_run
from tracking.mlflow_store.points import POINTS, UniqueTimestamps


def test_values_that_mlflow_cannot_hold_are_flagged(
    record, deliver, store, in_mlflow, client
):
    run = record()
    values = {"pos": math.inf, "neg": -math.inf, "nan": math.nan, "big": 2**53 + 1}
    run.run.log("metrics", "train", values, index=1)
    run.run.log("metrics", "train", {"huge": 10**400, "zero": -0.0}, index=1)
    run.run.finish()
    made = deliver(run.path, store)
    found = {k: v for k, _, v, _ in in_mlflow(store, made.state.mlflow_run_id)}
    assert found["train/pos"] == sys.float_info.max
    assert found["train/neg"] == -sys.float_info.max
    assert math.isnan(found["train/nan"])
    assert found["train/big"] == 2.0**53
    assert found["train/huge"] == sys.float_info.max
    flags = json.loads(get_run(client, store, made.state).data.tags["luz.flags"])
    assert flags["infinite"] == {"train/pos": 1, "train/neg": 1, "train/huge": 1}
    assert flags["large_int"] == {"train/big": 1, "train/huge": 1}
    assert made.state.flags == flags


def test_equal_values_of_one_instant_are_all_kept(record, deliver, store, in_mlflow):
    run = record()
    for _ in range(50):
        run.run.log_metric("loss", 0.5, set="train", index=1)
        run.run.log_metric("nan", math.nan, set="train", index=1)
    run.run.finish()
    made = deliver(run.path, store)
    points = in_mlflow(store, made.state.mlflow_run_id)
    assert len(points) == 100
    again = deliver(run.path, store, is_sync=True)
    assert again.num_sent == 0
    assert len(in_mlflow(store, made.state.mlflow_run_id)) == 100


logged = st.lists(
    st.tuples(
        st.sampled_from(["a", "b"]),
        st.integers(0, 1),
        st.sampled_from([0.5, math.nan, 0.0, -0.0]),
        st.integers(0, 3),
    ),
    max_size=30,
)


@given(logged, st.integers(1, 7))
def test_repeated_points_get_the_next_free_millisecond(points, size):
    taken, wanted = set(), []
    for key, step, value, time_ms in points:
        number = None if math.isnan(value) else value
        while (key, step, number, time_ms) in taken:
            time_ms += 1
        taken.add((key, step, number, time_ms))
        wanted.append(time_ms)
    timestamps, found = UniqueTimestamps(), []
    for start in range(0, len(points), size):
        key, step, value, time_ms = zip(*points[start : start + size], strict=True)
        page = [pa.array(key).dictionary_encode(), time_ms, step, value]
        table = pa.table([range(len(key)), *page], schema=POINTS)
        found += timestamps.assign(table)["time_ms"].to_pylist()
    assert found == wanted


def test_points_far_back_are_forgotten():
    timestamps = UniqueTimestamps(window=3)
    page = pa.table([[0], pa.array(["a"]).dictionary_encode(), [7], [1], [0.5]], POINTS)
    others = page.set_column(3, POINTS.field("step"), [pa.array([2])])
    for table in (page, others, others, others):
        timestamps.assign(table)
    assert timestamps.assign(page)["time_ms"].to_pylist() == [7]
