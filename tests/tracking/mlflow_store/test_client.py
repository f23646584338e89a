from __future__ import annotations

import math
import os

import pytest

from tests.tracking.stores import execute_sql
from tracking.delivery.retry import GaveUpError
from tracking.mlflow_store.client import (
    Point,
    UnreachableError,
    limit_requests,
    prepare_environment,
)


def test_database_of_another_version_stays_and_is_an_error(
    record, deliver, store, cache, client_class, tmp_path
):
    client_class(f"sqlite:///{tmp_path}/other.db", cache)
    (tmp_path / "other.db").rename(tmp_path / "mlflow.db")
    execute_sql(store, "UPDATE alembic_version SET version_num = '0123'")
    run = record()
    run.run.finish()
    # MLflow before 3.10 says "Can't locate revision".
    with pytest.raises(GaveUpError, match=r"out-of-date database schema|revision"):
        deliver(run.path, store)
    assert execute_sql(store, "SELECT version_num FROM alembic_version") == [("0123",)]


def test_error_of_a_database_is_told_without_its_statement(store, cache, client_class):
    client = client_class(store, cache)
    run = client.create_run("0", "run", 1, {})
    fail = "BEGIN INSERT INTO missing VALUES (1); END"
    execute_sql(store, f"CREATE TRIGGER fail BEFORE INSERT ON metrics {fail}")
    with pytest.raises(UnreachableError, match="no such table") as caught:
        client.send(run.run_id, [Point("loss", 1.0, 1, 1)])
    assert "SQL:" not in str(caught.value)
    assert "autoflush" not in str(caught.value)


def test_error_without_a_text_is_told_by_its_class(
    store, cache, client_class, monkeypatch
):
    client = client_class(store, cache)

    def fail(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr(client._client, "log_batch", fail)
    with pytest.raises(UnreachableError, match=r"^MemoryError$"):
        client.send("run", [Point("loss", 1.0, 1, 1)])


def test_artifacts_of_a_new_experiment_lie_beside_the_database(
    record, deliver, store, client, tmp_path
):
    run = record()
    run.run.finish()
    made = deliver(run.path, store)
    for id_ in ("0", made.state.experiment_id):
        found = client(store).get_experiment(id_)
        assert found.artifact_location == f"{tmp_path}/mlruns/{id_}"


@pytest.mark.parametrize(
    ("timeout_s", "seconds"),
    [(None, 30), (0, 1), (2.6, 3), (math.inf, 86_400), (math.nan, 1)],
)
def test_timeout_of_mlflow_is_in_whole_seconds(monkeypatch, timeout_s, seconds):
    monkeypatch.setattr(os, "environ", {"HOME": "/"})
    prepare_environment()
    limit_requests(timeout_s)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == str(seconds)
