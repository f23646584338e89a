"""Finding and creating the MLflow run of a run."""

from __future__ import annotations

import shutil

import pytest

from tests.tracking.stores import execute_sql
from tracking.delivery.retry import GaveUpError
from tracking.delivery.state import DeliveryState
from tracking.mlflow_store.runs import RunResolver
from tracking.settings import Settings

CURVE = 30


def test_run_that_mlflow_lost_is_created_again(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(CURVE)
    run.run.finish()
    first = deliver(run.path, store)
    for table in ("metrics", "latest_metrics", "params", "tags", "runs"):
        execute_sql(store, f"DELETE FROM {table}")
    second = deliver(run.path, store)
    assert second.state.mlflow_run_id != first.state.mlflow_run_id
    assert in_mlflow(store, second.state.mlflow_run_id) == in_journal(run.path)


def test_deleted_run_stays_deleted_and_sync_creates_a_new_one(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(CURVE)
    run.run.finish()
    first = deliver(run.path, store)
    client(store).delete_run(first.state.mlflow_run_id)
    second = deliver(run.path, store, is_sync=True)
    assert second.state.mlflow_run_id != first.state.mlflow_run_id
    assert in_mlflow(store, second.state.mlflow_run_id) == in_journal(run.path)


def test_copies_with_a_quotation_mark_in_their_name_are_told_apart(
    record, deliver, store
):
    run = record()
    run.log_curve(3)
    run.run.finish()
    ids = {}
    for name in ("it's a copy", "it_s a copy"):
        copy = run.path.with_name(name)
        shutil.copytree(run.path, copy)
        ids[name] = deliver(copy, store).state.mlflow_run_id
    assert len(set(ids.values())) == 2
    for name, id_ in ids.items():
        copy = run.path.with_name(name)
        shutil.rmtree(copy / "delivery")
        assert deliver(copy, store).state.mlflow_run_id == id_


def test_deleted_experiment_is_an_error(record, deliver, store, client):
    run = record()
    run.run.finish()
    made = deliver(run.path, store)
    client(store).delete_experiment(made.state.experiment_id)
    other = record()
    other.run.finish()
    with pytest.raises(GaveUpError, match="got 'digits', which is deleted"):
        deliver(other.path, store)
    assert DeliveryState.read(other.path).phase == "gave up"


def test_interrupted_replacement_is_finished_by_the_next_delivery(
    record, deliver, store, in_mlflow, in_journal, client
):
    run = record()
    run.log_curve(20)
    run.run.finish()
    first = deliver(run.path, store)
    made = client(store).get_run(first.state.mlflow_run_id)
    tags = {"luz.run_id": run.run.id, "luz.supersedes": made.info.run_id}
    fresh = client(store).create_run(made.info.experiment_id, tags=tags)
    (run.path / "delivery" / "state.json").unlink()
    second = deliver(run.path, store)
    assert second.state.mlflow_run_id == fresh.info.run_id
    assert in_mlflow(store, fresh.info.run_id) == in_journal(run.path)
    old = client(store).get_run(made.info.run_id)
    assert old.data.tags["luz.superseded_by"] == fresh.info.run_id


def test_experiment_of_the_environment_is_used_where_the_run_names_none(
    record, store, client, cache, client_class
):
    run = record(experiment=None)
    run.run.finish()
    settings = Settings.read({"MLFLOW_EXPERIMENT_NAME": "theirs"})
    resolver = RunResolver(
        run.path,
        store,
        lambda uri: client_class(uri, cache),
        settings,
    )
    writer = resolver.connect()
    assert client(store).get_experiment(writer.experiment_id).name == "theirs"
