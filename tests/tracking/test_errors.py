from __future__ import annotations

import pytest

import tracking
from tracking.errors import describe_path


def test_messages_say_what_a_path_is(tmp_path):
    with tracking.start(runs_dir=tmp_path / "runs", delivery=False) as run:
        pass
    checkpoint = run.path / "checkpoints" / "1"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").touch()
    told = {
        tmp_path: "a folder",
        tmp_path / "runs": "a folder of runs",
        run.path: "a run",
        run.path / "run.json": f"a file of run {run.id}",
        checkpoint.parent: f"a folder of checkpoints of run {run.id}",
        checkpoint: f"a checkpoint of run {run.id}",
        run.path / "none": "a path that does not exist",
    }
    assert {path: describe_path(path) for path in told} == told
    with pytest.raises(tracking.RunNotFoundError, match=f"checkpoint of run {run.id}"):
        tracking.open(checkpoint)
    for use in (tracking.list_runs, lambda path: tracking.start(runs_dir=path)):
        with pytest.raises(NotADirectoryError, match="folder of runs, got a run"):
            use(run.path)
