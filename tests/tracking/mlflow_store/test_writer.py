from __future__ import annotations

import json

from tests.tracking.stores import execute_sql, get_run


def test_row_that_mlflow_refuses_holds_up_nothing(
    record, deliver, store, in_mlflow, in_journal, client
):
    first = record()
    first.run.finish()
    deliver(first.path, store)  # makes the database
    execute_sql(
        store,
        "CREATE TRIGGER no BEFORE INSERT ON metrics WHEN NEW.key = 'train/bad' "
        "BEGIN SELECT RAISE(ABORT, 'not this one'); END",
    )
    run = record()
    run.log_curve(100)
    run.run.log_metric("bad", 1.0, set="train", index=1)
    run.log_curve(100, first=100)
    run.run.finish()
    made = deliver(run.path, store)
    wanted = [point for point in in_journal(run.path) if point[0] != "train/bad"]
    assert in_mlflow(store, made.state.mlflow_run_id) == wanted
    flags = json.loads(get_run(client, store, made.state).data.tags["luz.flags"])
    assert "not this one" in flags["refused"]["train/bad"]
    execute_sql(store, "DROP TRIGGER no")
    again = deliver(run.path, store, is_sync=True)
    assert again.state.flags == {}
    assert get_run(client, store, again.state).data.tags["luz.flags"] == "{}"
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)
