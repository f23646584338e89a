from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import tracking
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint
from harness.checkpoint.fork import fork_run
from harness.checkpoint.format import list_checkpoints, verify_checkpoint
from harness.cli.main import main
from harness.errors import CheckpointError
from harness.fitted import Fitted
from tests.harness.exact import CASES, EPOCHS
from tracking.mlflow_store.tags import run_tags

CASE = CASES["adam-onecycle-metrics"]


def train(
    runs: Path, *own: Any, epochs: int = EPOCHS, tracker: tracking.Run | None = None
) -> Fitted:
    return CASE.learner().fit(
        CASE.data(),
        epochs,
        CASE.valid,
        callbacks=[*CASE.callbacks(runs), *own],
        dataloader_options=CASE.options,
        seed=7,
        tracker=tracker or {"runs_dir": runs, "delivery": False},
        verbose=False,
    )


def metric_rows(run: tracking.PastRun) -> list[dict[str, Any]]:
    names = ["seq", "what", "set", "name", "index", "value", "time"]
    table = run.records().select(names).to_pylist()
    return [row for row in table if row["what"] in {"metrics", "lr"}]


@pytest.fixture
def parent(tmp_path: Path) -> tracking.PastRun:
    """A finished run with a checkpoint of every third step."""
    fitted = train(tmp_path, ModelCheckpoint(every_n_steps=3, keep_last=9))
    assert fitted.run_path is not None
    return tracking.PastRun(fitted.run_path)


def test_fork_shares_the_records_up_to_the_checkpoint_and_the_checkpoint(
    parent: tracking.PastRun, tmp_path: Path
) -> None:
    before = metric_rows(parent)
    child = fork_run(parent.path, 9)
    # Step 9 lies in the second epoch, so the records are those of the first.
    assert metric_rows(child) == [row for row in before if row["index"] == 1]
    assert metric_rows(parent) == before
    [place] = list_checkpoints(child.path / "checkpoints")
    assert verify_checkpoint(place).run.id == child.id
    assert (child.path / "artifacts" / "model.txt").is_file()
    assert child.params == parent.params
    assert child.status == "killed"
    assert child.name == f"{parent.name}-fork"
    assert child.id != parent.id


def test_fork_is_linked_to_its_parent_and_not_nested_under_it(
    parent: tracking.PastRun,
) -> None:
    child = fork_run(parent.path, 9, name="other")
    origin = child.manifest.extra["forked_from"]
    assert (origin["run"], origin["step"], origin["epoch"]) == (parent.id, 9, 2)
    tags = run_tags(child.manifest, child.path, str)
    assert tags["luz.forked_from"] == parent.id
    assert f"**Forked** from `{parent.id}` at step 9" in tags["mlflow.note.content"]
    assert "mlflow.parentRunId" not in tags
    assert "luz.forked_from" not in run_tags(parent.manifest, parent.path, str)
    assert child.name == "other"


def test_fork_that_is_resumed_ends_as_its_parent_did(
    parent: tracking.PastRun, tmp_path: Path
) -> None:
    child = fork_run(parent.path, 9)
    before = metric_rows(parent)
    fitted = train(tmp_path, ResumeFromCheckpoint(child.path / "checkpoints"))
    assert fitted.run_id == child.id
    assert child.wide().equals(parent.wide())
    assert child.status == "finished"
    assert metric_rows(parent) == before


def test_fork_of_a_second_fit_continues_as_the_second_fit(tmp_path: Path) -> None:
    save = ModelCheckpoint(every_n_steps=3, keep_last=9)
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        for own in ([], [save]):
            train(tmp_path, *own, tracker=run)
    parent = tracking.open(run.path)
    child = fork_run(run.path, 9)
    assert (
        train(tmp_path, ResumeFromCheckpoint(child.path / "checkpoints")).run_id
        == child.id
    )
    assert set(child.wide()["fit"].to_pylist()) == {1, 2}
    assert child.wide().equals(parent.wide())


def test_fork_of_a_step_without_checkpoint_lists_those_there_are(
    parent: tracking.PastRun, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    match = r"expected a step with a checkpoint, got 7.*of steps: 3, 6, 9, 12\."
    with pytest.raises(CheckpointError, match=match):
        fork_run(parent.path, 7)
    assert sorted(tmp_path.iterdir()) == before


def test_fork_of_a_torn_checkpoint_is_refused_and_leaves_nothing(
    parent: tracking.PastRun, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    for place in list_checkpoints(parent.path / "checkpoints"):
        (place / "rank-0.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"bytes in rank-0\.json"):
        fork_run(parent.path, 9)
    assert sorted(tmp_path.iterdir()) == before


def test_fork_of_a_run_that_is_being_written_is_refused(
    parent: tracking.PastRun, tmp_path: Path
) -> None:
    with (
        tracking.start(run_id=parent.id, runs_dir=tmp_path, delivery=False),
        pytest.raises(ValueError, match="expected a run that has ended"),
    ):
        fork_run(parent.path, 9)


def test_fork_command_makes_the_run_and_names_it(
    parent: tracking.PastRun, tmp_path: Path
) -> None:
    words = ["runs", "fork", parent.id, "--at", "9", "--runs-dir", str(tmp_path)]
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    child = tracking.open(json.loads(done.output)["run"], tmp_path)
    assert child.manifest.extra["forked_from"]["run"] == parent.id
    shown = CliRunner().invoke(main, words)
    assert "resume with: harness resume " in shown.output
    refused = CliRunner().invoke(main, [*words[:4], "8", *words[5:]])
    assert refused.exit_code == 1
    assert "expected a step with a checkpoint, got 8" in refused.output
