from __future__ import annotations

import argparse
import shutil
import socket
import time
from pathlib import Path

import pytest

import tracking.delivery.__main__ as delivery
from tracking.api import start
from tracking.cli.render import format_sync
from tracking.delivery.process import RunByRunProcess
from tracking.delivery.state import DeliveryState
from tracking.delivery.sync import sync
from tracking.errors import DeliveryError
from tracking.mlflow_store.uris import local_path
from tracking.read import PastRun
from tracking.settings import Settings
from tracking.verify.verify import verify


def test_sync_of_a_moved_project_names_the_old_store_and_makes_nothing(
    tmp_path, monkeypatch
):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with start(runs_dir=tmp_path / "runs", delivery=False) as run:
        run.log_metric("loss", 1.0)
    old = tmp_path / "old" / "mlflow.db"
    (run.path / "delivery").mkdir(exist_ok=True)
    DeliveryState(tracking_uri=f"sqlite:///{old}").write(run.path)
    (result,) = sync([PastRun(run.path)])
    assert result.phase == "gave up"
    assert result.error is not None
    assert str(old) in result.error
    assert not old.parent.exists()


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a run that was delivered to a store in it, sqlite or files."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "p1"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def make(store):
        if store == "mlruns":
            (folder / "mlruns" / "0").mkdir(parents=True)
            (folder / "mlruns" / "0" / "meta.yaml").touch()
        else:
            (folder / store).touch()
        with start(name="x", delivery=False) as run:
            run.log_metric("loss", 1.0)
        (run.path / "delivery").mkdir()
        uri = find_store(run.path)
        assert local_path(uri) == folder / store
        DeliveryState(tracking_uri=uri, run_path=str(run.path)).write(run.path)
        return folder, run.path

    return make


def find_store(path):
    program = delivery.Program(argparse.Namespace(), Settings.read({}), Path.cwd())
    return program.make_resolver(path).uri


@pytest.mark.parametrize("store", ["mlflow.db", "mlruns"])
@pytest.mark.parametrize("is_delivered", [True, False])
@pytest.mark.parametrize("move", [shutil.move, shutil.copytree])
def test_moved_or_copied_project_uses_the_store_at_its_new_place(
    move, is_delivered, store, project, tmp_path, monkeypatch
):
    folder, run = project(store)
    if not is_delivered:
        shutil.rmtree(run / "delivery")
    new = tmp_path / "deep" / "p2"
    new.parent.mkdir()
    move(folder, new)
    monkeypatch.chdir(new)
    uri = find_store(new / "runs" / run.name)
    assert local_path(uri) == new / store
    assert Path.cwd() == new  # where the artifacts of a new experiment go


@pytest.mark.parametrize("store", ["mlflow.db", "mlruns"])
def test_moved_run_without_its_store_is_refused_with_the_former_place(
    store, project, tmp_path, monkeypatch
):
    folder, run = project(store)
    moved = shutil.move(run, tmp_path / "elsewhere")
    assert local_path(find_store(moved)) == folder / store  # that is still there
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(DeliveryError, match=f"p1/{store}'.*was moved"):
        find_store(moved)
    assert not folder.exists()


def wait_for_phase(path, phase):
    deadline = time.monotonic() + 120
    while True:
        state = DeliveryState.read_or_none(path)
        if state is not None and state.phase == phase:
            return state
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_runs_are_named_where_there_is_room_for_any_number(tmp_path):
    names = ["x" * 100_000 + str(i) for i in range(60)]  # a command line has 2 MB
    with RunByRunProcess("--read", str(tmp_path)) as process:
        reports = [process.ask(tmp_path / name) for name in names]
    assert [report["run"] for report in reports] == names
    assert all(report["error"] for report in reports)


def test_process_that_ends_without_a_report_costs_one_run(tmp_path):
    path = tmp_path / "runs" / "x"
    with RunByRunProcess("--unknown") as process:
        for _ in range(2):  # another process is started for the second one
            with pytest.raises(DeliveryError, match=r"(?s)delivery of x: .* --unknown"):
                process.ask(path)


def test_live_run_whose_delivery_cannot_be_started_stops_no_other(tmp_path):
    with start(runs_dir=tmp_path, delivery=False) as run:
        run.log_metric("loss", 1.0)
        (run.path / "delivery").write_text("")
        (result,) = sync([PastRun(run.path)])
    assert result.phase == "gave up"
    assert not result.is_complete
    assert str(run.path / "delivery") in str(result.error)


@pytest.mark.slow
@pytest.mark.parametrize("is_live", [False, True])
def test_delivery_that_waits_for_a_gone_address_gives_way_to_sync(
    is_live, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with socket.socket() as gone:
        gone.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{gone.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        run = start(name="x", delivery={"patience_s": 300})
        run.log_metric("loss", 1.0)
        wait_for_phase(run.path, "waiting")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        if not is_live:
            run.finish(wait_s=0)
        (result,) = sync([PastRun(run.path)])
        assert result.phase == ("started" if is_live else "done")
        run.finish(wait_s=0)
    state = wait_for_phase(run.path, "done")
    assert state.tracking_uri.startswith("sqlite:")
    assert not (run.path / "delivery" / "handover").exists()


@pytest.mark.slow
def test_sync_says_that_records_are_lost(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with start(runs_dir=tmp_path, delivery=False) as run:
        for step in range(3):
            run.log_metric("loss", 1.0, index=step)
    past = PastRun(run.path)
    (result,) = sync([past])
    assert (result.phase, result.present) == ("done", 3)
    (records,) = (run.path / "records" / "0").glob("*.arrow")
    records.unlink()
    records.symlink_to(records)  # which cannot be read
    (result,) = sync([past])
    assert result.phase == "gave up"
    records.unlink()
    (result,) = sync([past])
    assert result.phase == "lost"
    assert result.error is not None
    assert "expected the rows that MLflow has" in result.error
    assert not result.is_complete
    shutil.rmtree(run.path / "records")
    (result,) = sync([past])
    assert result.phase == "lost"
    text = format_sync(vars(result))
    assert text.startswith(f"{run.id}: records are lost: expected its records in")
    assert not verify(past).is_equal
