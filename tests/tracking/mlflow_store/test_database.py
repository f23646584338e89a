from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tests.tracking.stores import all_runs
from tracking.durable import hold_lock


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
                opened = client_class(store, cache)
                experiment = opened.experiment_id("digits")
                opened.create_run(experiment, f"run {number}", 1, {})
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert {run.info.run_name for run in all_runs(client, store)} == {
        f"run {number}" for number in range(4)
    }


def is_waited_for(path: Path) -> bool:
    """Whether somebody waits for a lock on a file; see proc_locks(5)."""
    inode = f":{path.stat().st_ino} "
    lines = Path("/proc/locks").read_text().splitlines()
    return any("->" in line and inode in line for line in lines)


def test_stores_are_created_by_one_process_at_a_time(
    tmp_path, client_class, cache, until
):
    client_class(f"sqlite:///{tmp_path}/other.db", cache)  # prepares one
    path = tmp_path / "mlflow.db"
    other = threading.Thread(target=client_class, args=(f"sqlite:///{path}", cache))
    with hold_lock(cache / "lock"):
        other.start()
        until(lambda: is_waited_for(cache / "lock"))
        assert not path.exists()
    other.join(300)
    assert path.exists()
