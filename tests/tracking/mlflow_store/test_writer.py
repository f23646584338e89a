from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest

import tracking
from tests.tracking.stores import execute_sql, get_run
from tracking.delivery.retry import GaveUpError
from tracking.mlflow_store.client import GoneError, MlflowRun, UnreachableError
from tracking.mlflow_store.properties import RunProperties
from tracking.mlflow_store.writer import RunWriter


def test_row_that_mlflow_refuses_holds_up_nothing(
    record, deliver, store, in_mlflow, in_journal, client
):
    first = record()
    first.run.finish()
    deliver(first.path, store)  # makes the database
    execute_sql(
        store,
        "CREATE TRIGGER no BEFORE INSERT ON metrics WHEN NEW.key = 'train/bad' "
        "BEGIN SELECT RAISE(ABORT, 'not this one'); END",
    )
    run = record()
    run.log_curve(100)
    run.run.log_metric("bad", 1.0, set="train", index=1)
    run.log_curve(100, first=100)
    run.run.finish()
    made = deliver(run.path, store)
    wanted = [point for point in in_journal(run.path) if point[0] != "train/bad"]
    assert in_mlflow(store, made.state.mlflow_run_id) == wanted
    flags = json.loads(get_run(client, store, made.state).data.tags["luz.flags"])
    assert "not this one" in flags["refused"]["train/bad"]
    execute_sql(store, "DROP TRIGGER no")
    again = deliver(run.path, store, is_sync=True)
    assert again.state.flags == {}
    assert get_run(client, store, again.state).data.tags["luz.flags"] == "{}"
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


@pytest.mark.parametrize(
    ("table", "key", "flag"),
    [
        ("metrics", "train/bad", "train/bad"),
        ("params", "bad", "bad"),
        ("tags", "bad", "bad"),
    ],
)
def test_item_that_mlflow_fails_for_is_flagged_and_holds_up_nothing(
    table, key, flag, record, deliver, store, in_mlflow, in_journal, client
):
    first = record()
    first.run.finish()
    deliver(first.path, store)  # makes the database
    execute_sql(
        store,  # an error in a driver, which MLflow does not call a refusal
        f"CREATE TRIGGER no BEFORE INSERT ON {table} WHEN NEW.key = '{key}' "
        "BEGIN SELECT json('{'); END",
    )
    run = record(params={"bad": 1, "good": 2}, tags={"bad": "x", "good": "y"})
    run.log_curve(20)
    run.run.log_metric("bad", 1.0, set="train", index=1)
    run.log_curve(20, first=20)
    run.run.finish()
    made = deliver(run.path, store)
    assert made.state.phase == "done"
    wanted = [
        point
        for point in in_journal(run.path)
        if table != "metrics" or point[0] != "train/bad"
    ]
    assert in_mlflow(store, made.state.mlflow_run_id) == wanted
    data = get_run(client, store, made.state).data
    assert list(json.loads(data.tags["luz.flags"])["refused"]) == [flag]
    assert data.params["good"] == "2"
    assert data.tags["good"] == "y"
    execute_sql(store, "DROP TRIGGER no")
    again = deliver(run.path, store, is_sync=True)
    assert again.state.flags == {}
    assert in_mlflow(store, made.state.mlflow_run_id) == in_journal(run.path)


def test_artifact_that_mlflow_fails_for_holds_up_no_other(
    record, deliver, store, client
):
    run = record()
    run.run.log_text("x", "first.txt")
    run.run.finish()
    made = deliver(run.path, store)
    root = Path(get_run(client, store, made.state).info.artifact_uri)
    (root / "taken").write_text("where a folder shall be")
    with tracking.start(
        runs_dir=run.path.parent, run_id=run.path.name, delivery=False
    ) as again:
        again.log_text("y", "taken/y.txt")
        again.log_text("z", "z.txt")
    made = deliver(run.path, store)
    assert made.state.phase == "done"
    assert (root / "z.txt").read_text() == "z"
    assert list(made.state.flags["refused"]) == ["taken/y.txt"]


def test_store_that_takes_no_write_at_all_flags_nothing(record, deliver, store):
    first = record()
    first.run.finish()
    deliver(first.path, store)
    for table in ("metrics", "tags"):
        execute_sql(
            store,
            f"CREATE TRIGGER no_{table} BEFORE INSERT ON {table} "
            "WHEN NEW.key NOT LIKE 'mlflow.%' AND NEW.key NOT IN ('luz.run_id') "
            "BEGIN SELECT json('{'); END",
        )
    run = record()
    run.log_curve(20)
    run.run.finish()
    with pytest.raises(GaveUpError):
        deliver(run.path, store)


def test_long_experiment_name_is_shortened_the_same_way_each_time(
    record, deliver, store, client
):
    for _ in range(2):
        run = record(experiment="e" * 600)
        run.run.finish()
        made = deliver(run.path, store)
        assert made.state.phase == "done"
    names = [one.name for one in client(store).search_experiments()]
    assert len([name for name in names if name.startswith("eee")]) == 1
    assert max(map(len, names)) == 256


# ---------------------------------------------------- what the run's folder claims


def test_link_in_a_run_of_somebody_else_uploads_no_file(
    record, deliver, store, client, tmp_path
):
    secret = tmp_path / "home"
    secret.mkdir()
    (secret / "key").write_text("s3cret")
    run = record()
    run.run.log_text("x", "good.txt")
    names = ["link", "folder/key", "deep/folder/key", "../../home/key", "/etc/passwd"]
    for name in [*names, "a" * 300, "nul\0byte"]:
        run.run._log_dict("artifacts", {name: [{"size_bytes": 6}]}, "test")
    run.run.finish()
    folder = run.path / "artifacts"
    (folder / "link").symlink_to(secret / "key")
    (folder / "folder").symlink_to(secret)
    (folder / "deep").mkdir()
    (folder / "deep" / "folder").symlink_to("../../../../home")
    made = deliver(run.path, store)
    assert made.state.phase == "done"
    root = Path(get_run(client, store, made.state).info.artifact_uri)
    found = [path for path in root.rglob("*") if path.is_file()]
    assert [path.name for path in found] == ["good.txt"]
    assert made.state.flags["refused"].keys() >= {*names}


def test_linked_folder_of_artifacts_uploads_nothing(record, deliver, store, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "key").write_text("s3cret")
    run = record()
    run.run._log_dict("artifacts", {"key": [{}]}, "test")
    run.run.finish()
    (run.path / "artifacts").symlink_to(tmp_path / "home")
    made = deliver(run.path, store)
    assert list(made.state.flags["refused"]) == ["key"]


def test_tags_of_the_user_replace_those_that_describe_the_run(
    record, deliver, store, client
):
    own = {"mlflow.note.content": "mine", "mlflow.source.name": "notebook 7"}
    run = record(tags=own, note="The note.")
    run.run.finish()
    made = deliver(run.path, store)
    tags = get_run(client, store, made.state).data.tags
    assert {name: tags[name] for name in own} == own
    assert deliver(run.path, store, is_sync=True).state.flags == {}


def test_description_that_was_changed_in_mlflow_stays(record, deliver, store, client):
    run = record(note="The note.")
    run.run.finish()
    made = deliver(run.path, store)
    tags = get_run(client, store, made.state).data.tags
    assert tags["mlflow.note.content"].startswith("The note.")
    name, run_id = "mlflow.note.content", made.state.mlflow_run_id
    client(store).set_tag(run_id, name, "changed on the page")
    with tracking.start(
        runs_dir=run.path.parent, run_id=run.path.name, delivery=False, note="New."
    ):
        pass
    for is_sync in (False, True):
        made = deliver(run.path, store, is_sync=is_sync)
        tags = get_run(client, store, made.state).data.tags
        assert tags[name] == "changed on the page"


def test_description_that_nobody_changed_follows_the_run(
    record, deliver, store, client
):
    run = record(note="The note.")
    run.run.finish()
    deliver(run.path, store)
    with tracking.start(
        runs_dir=run.path.parent, run_id=run.path.name, delivery=False, note="New."
    ):
        pass
    made = deliver(run.path, store)
    tags = get_run(client, store, made.state).data.tags
    assert tags["mlflow.note.content"].startswith("New.")


# ---------------------------------------------------- what a store cannot hold


@pytest.fixture
def file_store(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return (tmp_path / "mlruns").as_uri()


def test_names_that_clash_in_a_file_store_hold_up_nothing(
    record, deliver, file_store, client
):
    run = record()
    run.run.log_metric("loss", 1.0, set="", index=1)
    run.run.log_metric("x", 2.0, set="loss", index=1)  # "loss" is a file there
    run.run.log_metric("accuracy", 3.0, set="train", index=1)
    run.run.log_params({"a": 1, "a/b": 2, "c": 3})
    run.run.finish()
    made = deliver(run.path, file_store)
    assert made.state.phase == "done"
    data = get_run(client, file_store, made.state).data
    assert data.metrics == {"loss": 1.0, "train/accuracy": 3.0}
    assert data.params == {"a": "1", "c": "3"}
    assert made.state.flags["refused"].keys() == {"loss/x", "a/b"}


class Store:
    """A client whose artifacts fail as their names say."""

    uri = "http://none"

    def __init__(self):
        self.kept: list[str] = []
        self.tried: list[str] = []

    def run(self, run_id):
        return None

    def send(self, run_id, points=(), tags=None):
        pass

    def artifacts(self, run_id, folder=None):
        return dict.fromkeys(self.kept, 1)

    def send_artifact(self, run_id, file, folder):
        self.tried.append(file.name)
        if file.name == "gone.txt":
            raise GoneError("404: no such page")
        if file.name == "broken.txt":
            raise UnreachableError("500")
        self.kept.append(file.name.partition("?")[0])


def test_artifact_that_fails_holds_up_no_other(tmp_path):
    names = ["gone.txt", "broken.txt", "what?.txt", "good one.txt"]
    for name in names:
        (tmp_path / name).write_text("x")
    wanted = RunProperties(artifacts={name: {"size_bytes": 1} for name in names})
    run = MlflowRun("r", "0", "RUNNING", None, {}, {})
    store = Store()
    writer = RunWriter(store, run, "luz.delivered")
    for _ in names:  # one at a time, as while the run is live
        with contextlib.suppress(UnreachableError):
            writer.upload_artifacts(wanted, tmp_path, limit_s=0.0)
    assert store.kept == ["what", "good one.txt"]
    assert writer.refused == {
        "gone.txt": "404: no such page",
        "what?.txt": "MLflow stores it under another name",
    }
    writer.is_isolating = True
    writer.upload_artifacts(wanted, tmp_path)
    assert writer.refused["broken.txt"] == "500"
