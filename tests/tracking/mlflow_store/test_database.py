from __future__ import annotations

import fcntl
import os
import threading

import pytest

from tests.tracking.stores import all_runs


@pytest.mark.parametrize(
    "is_prepared", [True, pytest.param(False, marks=pytest.mark.slow)]
)
def test_four_processes_that_create_one_store_all_succeed(
    tmp_path, client_class, client, cache, is_prepared
):
    store = f"sqlite:///{tmp_path}/mlflow.db"
    if is_prepared:
        client_class(f"sqlite:///{tmp_path}/other.db", cache)
    else:
        cache = tmp_path / "cache"
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                remote = client_class(store, cache)
                experiment = remote.experiment_id("digits")
                remote.create_run(experiment, f"run {number}", 1, {})
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert {run.info.run_name for run in all_runs(client, store)} == {
        f"run {number}" for number in range(4)
    }


def test_stores_are_created_by_one_process_at_a_time(tmp_path, client_class, cache):
    client_class(f"sqlite:///{tmp_path}/other.db", cache)  # prepares one
    path = tmp_path / "mlflow.db"
    other = threading.Thread(target=client_class, args=(f"sqlite:///{path}", cache))
    with (cache / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other.start()
        other.join(1.0)
        assert other.is_alive()
        assert not path.exists()
    other.join(60)
    assert path.exists()
