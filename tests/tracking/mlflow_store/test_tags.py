from __future__ import annotations

from datetime import datetime

import pytest

from tests.tracking.stores import get_run
from tracking.mlflow_store.tags import find_source


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
    experiment = client(store).get_experiment(found.info.experiment_id)
    assert experiment.name == "digits"


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
