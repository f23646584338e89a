"""Points as a real MLflow database stores them."""

from __future__ import annotations

import json
import math
import sys

from tests.tracking.stores import get_run


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
