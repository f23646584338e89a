from __future__ import annotations

from datetime import datetime

import pytest

from tests.tracking.stores import get_run
from tracking.delivery.summaries import write_summaries
from tracking.mlflow_store.tags import description, find_source
from tracking.store import results_path


def test_run_page_shows_what_ran_and_where_its_records_are(
    record, deliver, store, client
):
    run = record(name="first light", note="Tried **this**.")
    run.run.finish()
    made = deliver(run.path, store)
    found = get_run(client, store, made.state)
    tags = found.data.tags
    assert found.info.run_name == "first light"
    manifest = run.run.manifest
    created = datetime.fromisoformat(manifest.created)
    assert found.info.start_time == round(created.timestamp() * 1000)
    assert tags["mlflow.user"] == manifest.user
    assert tags["mlflow.source.type"] == "LOCAL"
    note = tags["mlflow.note.content"]
    assert note.startswith("Tried **this**.")
    assert str(run.path) in note
    assert f"harness runs show {run.run.id}" in note
    assert f"harness runs fork {run.run.id}" not in note  # it has no checkpoint
    experiment = client(store).get_experiment(found.info.experiment_id)
    assert experiment.name == "digits"


def test_description_of_an_ended_run_begins_with_its_results(
    record, deliver, store, client
):
    run = record()
    run.log_curve(5)
    (run.path / "checkpoints").mkdir()
    results_path(run.path).parent.mkdir(exist_ok=True)
    results_path(run.path).write_text("of the run before it was resumed")
    live = description(run.run.manifest, run.path)
    assert f"harness resume {run.run.id}" in live
    assert "of the run before" not in live
    run.run.finish()
    made = deliver(run.path, store, write_summaries=write_summaries)
    note = get_run(client, store, made.state).data.tags["mlflow.note.content"]
    assert note.startswith("**Results** after epoch 4\n\n| | last | lowest | highest |")
    assert "| train/loss | " in note
    assert f"harness runs fork {run.run.id} --at STEP" in note
    assert "harness resume" not in note


def test_words_of_a_command_are_no_markdown(record):
    run = record()
    run.run.manifest.command = ["python", "-c", "print(`1`)\n# ``x``"]
    assert "**Ran** ``` python -c 'print(`1`) # ``x``' ```" in description(
        run.run.manifest, run.path
    )


@pytest.mark.parametrize(
    ("command", "source"),
    [
        ("python train.py --epochs 3", "train.py"),
        ("python -X dev train.py", "train.py"),
        ("python -Xdev -O -W error -u train.py", "train.py"),
        ("python -X importtime -m pkg.train --lr 1", "pkg.train"),
        ("python --check-hash-based-pycs always train.py", "train.py"),
        ("python -c print(1)", "python"),
        ("python -", "python"),
        ("harness fit train.py:experiment", "fit"),
        ("", ""),
    ],
)
def test_source_is_the_script_or_module_that_a_command_runs(command, source):
    assert find_source(command.split()) == source
