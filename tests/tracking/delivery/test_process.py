"""The delivery process beside training."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tracking
from tracking.delivery.process import (
    is_being_delivered,
    lock_path,
    set_group_niceness,
    wait_for_delivery,
)
from tracking.delivery.service import SummaryProcess
from tracking.delivery.state import DeliveryState
from tracking.durable import hold_lock
from tracking.errors import DeliveryError

TRAINER = """
import os, signal, sys, tracking
run = tracking.start(experiment="digits", runs_dir="runs")
print(run.id, flush=True)
def end_delivery():  # as DeepSpeed's launcher does to all processes of a rank
    os.kill(run._delivery._process.pid, signal.SIGTERM)
end_delivery()
for i in range(40):
    run.log("metrics", "train", {"loss": 1 / (i + 1)}, index=i)
mlflow_run_id = run.mlflow_run_id
end_delivery()
run.log_metric("last", 1.0, set="train", index=40)
run.finish()
assert run.wait(300)
assert "mlflow" not in sys.modules
print(mlflow_run_id)
"""


def start_trainer(folder: Path, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(tracking.__file__).parents[1]),
            **variables,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_run_is_delivered_by_a_process_of_its_own(
    tmp_path, client_class, in_mlflow, in_journal
):
    trainer = start_trainer(tmp_path)
    out, err = trainer.communicate(timeout=500)
    assert (trainer.returncode, err) == (0, "")
    run_id, mlflow_run_id = out.split()
    path = tmp_path / "runs" / run_id
    points = in_mlflow(f"sqlite:///{tmp_path}/mlflow.db", mlflow_run_id)
    assert points == in_journal(path)
    assert len(points) == 41
    names = {path.name for path in tmp_path.iterdir()}
    assert names - {"mlruns"} == {"mlflow.db", "runs"}


def test_process_exits_when_another_one_delivers_the_run(record, store, fork_delivery):
    run = record()
    run.log_curve(3)
    run.run.finish()
    lock_path(run.path).parent.mkdir()
    with hold_lock(lock_path(run.path)):
        words = ("--lock-wait", "0.1", str(run.path))
        process = fork_delivery(*words, MLFLOW_TRACKING_URI=store)
        assert process.wait() == (0, "")
    assert DeliveryState.read(run.path) is None


def test_running_delivery_is_waited_for_until_the_timeout(record):
    run = record()
    lock_path(run.path).parent.mkdir()
    assert wait_for_delivery(run.path, 0.0)
    with ThreadPoolExecutor() as pool, hold_lock(lock_path(run.path)):
        assert is_being_delivered(run.path)
        assert not wait_for_delivery(run.path, 0.0)
        waiting = pool.submit(wait_for_delivery, run.path, 300.0)
        assert not waiting.done()
    assert waiting.result()


def test_run_without_a_delivery_folder_is_not_being_delivered(tmp_path):
    assert not is_being_delivered(tmp_path)


def test_run_that_cannot_be_delivered_says_why_in_state_and_log(
    record, store, fork_delivery
):
    run = record(delivery={"per_key": "many"})
    run.run.finish()
    process = fork_delivery(str(run.path), MLFLOW_TRACKING_URI=store)
    assert process.wait() == (1, "")
    state = DeliveryState.read(run.path)
    assert state.phase == "gave up"
    assert "expected a whole number of at least 2, got 'many'" in state.error
    log = (run.path / "delivery" / "log.txt").read_text()
    assert "ERROR giving up\nTraceback" in log


def test_secrets_are_in_no_file_and_no_tag(record, fork_delivery):
    run = record()
    run.log_curve(3)
    run.run.finish()
    secrets = {"user": "u53rn4me", "password": "pa55w0rd", "token": "t0k3nt0k3n"}
    uri = f"http://{secrets['user']}:{secrets['password']}@127.0.0.1:9/"
    variables = {"MLFLOW_TRACKING_URI": uri, "MLFLOW_TRACKING_TOKEN": secrets["token"]}
    code, output = fork_delivery("--patience", "0", str(run.path), **variables).wait()
    assert code == 1
    state = DeliveryState.read(run.path)
    assert state.tracking_uri == "http://127.0.0.1:9/"
    assert "127.0.0.1" in state.error
    written = b"".join(p.read_bytes() for p in run.path.rglob("*") if p.is_file())
    for secret in secrets.values():
        assert secret.encode() not in written + output.encode()


def test_summaries_that_die_are_left_out(record, deliver, store):
    def die(path):
        raise DeliveryError("expected a report, got exit code -9")

    run = record()
    run.log_curve(5)
    run.run.finish()
    made = deliver(run.path, store, write_summaries=die)
    assert made.state.phase == "done"


def test_summaries_are_made_after_the_run_is_done(record, deliver, store):
    seen = []

    def note(path):
        state = DeliveryState.read(path)
        assert state is not None
        seen.append((state.phase, state.delivered))
        return []

    run = record()
    run.log_curve(5)
    run.run.finish()
    made = deliver(run.path, store, write_summaries=note)
    assert seen == [("done", made.state.delivered)]


@pytest.fixture
def summaries():
    process = SummaryProcess()
    yield process
    process.close()


def test_summaries_of_several_runs_are_made_in_one_process(record, summaries):
    for _ in range(2):
        run = record()
        run.log_curve(5)
        run.run.finish()
        names = [path.name for path in summaries.write(run.path)]
        assert names == ["records.parquet", "curves.png"]
        pids = {summaries._process.pid}
    assert len(pids) == 1
    (run.path / "artifacts" / "records.parquet").unlink()
    (run.path / "artifacts" / "records.parquet").mkdir()
    with pytest.raises(DeliveryError, match="got exit code 1"):
        summaries.write(run.path)
    assert [path.name for path in summaries.write(record().path)] == []


def test_summaries_are_not_made_while_the_run_goes_on(record, summaries):
    assert summaries.write(record().path) == []


def test_niceness_of_a_process_that_has_ended_changes_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    set_group_niceness(process.pid, 10)
