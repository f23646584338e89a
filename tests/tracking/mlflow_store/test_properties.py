"""Params, tags, artifacts and inputs in a real MLflow database."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tracking.stores import get_run


def test_params_are_sent_once_and_a_change_is_flagged(record, deliver, store, client):
    run = record(params={"lr": 0.1, "layers": [1, 2], "on": True, "no": None})
    run.run.log_params({"lr": 0.2, "long": "x" * 7000, "big": 2**70, "a#b": "odd"})
    run.run.finish()
    made = deliver(run.path, store)
    data = get_run(client, store, made.state).data
    odd = next(key for key in data.params if key.startswith("a_b-"))
    assert data.params == {
        "lr": "0.1",
        "layers": "[1,2]",
        "on": "True",
        "no": "None",
        "long": "x" * 6000,
        "big": str(2**70),
        odd: "odd",
    }
    flags = json.loads(data.tags["luz.flags"])
    assert flags == {"changed_param": {"lr": 1}, "long_param": {"long": 7000}}
    assert json.loads(data.tags["luz.changed_params"]) == {"lr": "0.2"}


def test_tags_take_the_last_value_and_leave_our_own_alone(
    record, deliver, store, client
):
    run = record(tags={"a": 1, "luz.run_id": "mine", "long": "y" * 9000})
    run.run.set_tags({"a": 2})
    run.run.finish()
    made = deliver(run.path, store)
    tags = get_run(client, store, made.state).data.tags
    assert tags["a"] == "2"
    assert tags["luz.run_id"] == run.run.id
    assert "mine" in tags.values()
    assert tags["long"] == "y" * 8000
    assert json.loads(tags["luz.flags"])["long_tag"] == {"long": 9000}


def test_artifacts_lie_at_their_paths_and_a_later_one_replaces(
    record, deliver, store, client, tmp_path
):
    run = record()
    run.run.log_text("one", "notes/a.txt")
    run.run.log_text("two", "notes/a.txt")
    run.run.log_text("gone", "gone.txt")
    (run.path / "artifacts" / "gone.txt").unlink()
    run.run.finish()
    made = deliver(run.path, store)
    found = client(store)
    (item,) = found.list_artifacts(made.state.mlflow_run_id, "notes")
    local = found.download_artifacts(made.state.mlflow_run_id, item.path, str(tmp_path))
    assert Path(local).read_text() == "two"
    assert "not in the run's folder" in made.state.flags["refused"]["gone.txt"]


def test_data_set_in_two_contexts_is_shown_in_both(record, deliver, store, client):
    run = record()
    for context in ("train", "valid", "train"):
        run.run.log_input("digits", context, digest="3f2a", num_samples=1797)
    run.run.finish()
    made = deliver(run.path, store)
    inputs = get_run(client, store, made.state).inputs.dataset_inputs
    found = {i.tags[0].value: (i.dataset.name, i.dataset.profile) for i in inputs}
    assert found == dict.fromkeys(
        ("train", "valid"), ("digits", '{"num_samples": 1797}')
    )
