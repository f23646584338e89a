"""Models in a run's folder, put there by several ranks and sent to MLflow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath

import pytest

from tests.tracking.stores import get_run
from tracking.delivery.models import adding_model


def write_model(folder, uuid="one"):
    (folder / "MLmodel").write_text(f"model_uuid: {uuid}\nmetadata: {{step: 3}}\n")
    (folder / "data").mkdir()
    (folder / "data" / "model.pt2").write_bytes(b"graph")


def add(run, uuid="one", name="model"):
    with adding_model(run.path, name) as folder:
        write_model(folder, uuid)


def test_block_that_fails_leaves_nothing_and_a_later_model_replaces(record):
    run = record()

    def fail():
        with adding_model(run.path, "model"):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list((run.path / "models").iterdir()) == []
    add(run)
    add(run, "two")
    (folder,) = (run.path / "models").iterdir()
    assert "two" in (folder / "MLmodel").read_text()


def test_ranks_may_add_a_model_at_the_same_time(record):
    run = record()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda rank: add(run, str(rank)), range(8)))
    (folder,) = (run.path / "models").iterdir()
    assert (folder / "data" / "model.pt2").read_bytes() == b"graph"


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a.b", 3])
def test_bad_names_are_refused(record, name):
    run = record()
    with (
        pytest.raises(ValueError, match="expected letters, digits"),
        adding_model(run.path, name),
    ):
        pass


def test_models_are_logged_once_and_a_damaged_one_holds_up_no_other(
    record, deliver, store, client, tmp_path
):
    run = record()
    add(run)
    damaged = [
        "[1]",
        "{model_uuid: a, metadata: [3]}",
        "{model_uuid: a, metadata: {step: x}}",
    ]
    for number, text in enumerate(damaged):
        with adding_model(run.path, f"damaged {number}") as folder:
            (folder / "MLmodel").write_text(text)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private").write_text("mine")
    (run.path / "models" / "model" / "linked").symlink_to(tmp_path / "elsewhere")
    link = run.path / "models" / "model" / "data" / "link"
    link.symlink_to(tmp_path / "elsewhere" / "private")
    (run.path / "models" / "linked").symlink_to(tmp_path / "elsewhere")
    run.run.finish()
    made = deliver(run.path, store)
    again = deliver(run.path, store)
    assert again.state.mlflow_run_id == made.state.mlflow_run_id
    found = get_run(client, store, again.state)
    (output,) = found.outputs.model_outputs
    assert output.step == 3
    assert found.data.tags["luz.model.model"] == f"one {output.model_id}"
    model = client(store).get_logged_model(output.model_id)
    assert model.name == "model"
    for number in range(len(damaged)):
        assert f"models/damaged {number}" in made.state.flags["refused"]
    sent = client(store).list_logged_model_artifacts(output.model_id, "data")
    assert [PurePosixPath(file.path).name for file in sent] == ["model.pt2"]
    assert "luz.model.linked" not in found.data.tags
