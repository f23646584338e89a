from __future__ import annotations

import json
from pathlib import Path

import pytest

import tracking
from tests.tracking.stores import execute_sql, get_run
from tracking.delivery.retry import GaveUpError


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


@pytest.mark.parametrize(
    ("table", "key", "flag"),
    [
        ("metrics", "train/bad", "train/bad"),
        ("params", "bad", "bad"),
        ("tags", "bad", "bad"),
    ],
)
def test_item_that_mlflow_fails_for_is_flagged_and_holds_up_nothing(
    table, key, flag, record, deliver, store, in_mlflow, in_journal, client
):
    first = record()
    first.run.finish()
    deliver(first.path, store)  # makes the database
    execute_sql(
        store,  # an error in a driver, which MLflow does not call a refusal
        f"CREATE TRIGGER no BEFORE INSERT ON {table} WHEN NEW.key = '{key}' "
        "BEGIN SELECT json('{'); END",
    )
    run = record(params={"bad": 1, "good": 2}, tags={"bad": "x", "good": "y"})
    run.log_curve(20)
    run.run.log_metric("bad", 1.0, set="train", index=1)
    run.log_curve(20, first=20)
    run.run.finish()
    made = deliver(run.path, store)
    assert made.state.phase == "done"
    wanted = [
        point
        for point in in_journal(run.path)
        if table != "metrics" or point[0] != "train/bad"
    ]
    assert in_mlflow(store, made.state.mlflow_run_id) == wanted
    data = get_run(client, store, made.state).data
    assert list(json.loads(data.tags["luz.flags"])["refused"]) == [flag]
    assert data.params["good"] == "2"
    assert data.tags["good"] == "y"
    execute_sql(store, "DROP TRIGGER no")
    again = deliver(run.path, store, is_sync=True)
    assert again.state.flags == {}
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


def test_artifact_that_mlflow_fails_for_holds_up_no_other(
    record, deliver, store, client
):
    run = record()
    run.run.log_text("x", "first.txt")
    run.run.finish()
    made = deliver(run.path, store)
    root = Path(get_run(client, store, made.state).info.artifact_uri)
    (root / "taken").write_text("where a folder shall be")
    with tracking.start(
        runs_dir=run.path.parent, run_id=run.path.name, delivery=False
    ) as again:
        again.log_text("y", "taken/y.txt")
        again.log_text("z", "z.txt")
    made = deliver(run.path, store)
    assert made.state.phase == "done"
    assert (root / "z.txt").read_text() == "z"
    assert list(made.state.flags["refused"]) == ["taken/y.txt"]


def test_store_that_takes_no_write_at_all_flags_nothing(record, deliver, store):
    first = record()
    first.run.finish()
    deliver(first.path, store)
    for table in ("metrics", "tags"):
        execute_sql(
            store,
            f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} "
            "WHEN NEW.key NOT LIKE 'mlflow.%' AND NEW.key NOT IN ('luz.run_id') "
            "BEGIN SELECT json('{'); END",
        )
    run = record()
    run.log_curve(20)
    run.run.finish()
    with pytest.raises(GaveUpError):
        deliver(run.path, store)


def test_long_experiment_name_is_shortened_the_same_way_each_time(
    record, deliver, store, client
):
    for _ in range(2):
        run = record(experiment="e" * 600)
        run.run.finish()
        made = deliver(run.path, store)
        assert made.state.phase == "done"
    names = [one.name for one in client(store).search_experiments()]
    assert len([name for name in names if name.startswith("eee")]) == 1
    assert max(map(len, names)) == 256
