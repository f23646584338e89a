"""Delivery under faults: no row is lost, and none is duplicated.

The faults are real: real servers and databases, killed processes, and requests that are
answered by an error, not answered, or whose answer is lost.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tracking
from tests.tracking.stores import Delivering
from tracking.delivery.retry import GaveUpError
from tracking.delivery.state import DeliveryState
from tracking.delivery.sync import sync
from tracking.delivery.worker import DeliveryWorker
from tracking.mlflow_store.client import StoreClient
from tracking.mlflow_store.runs import RunResolver
from tracking.mlflow_store.server import Server

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[1])}


@pytest.fixture
def is_equal(in_mlflow, in_journal):
    """Checks that MLflow has the points of the journal, each once."""

    def compare(path, store):
        state = DeliveryState.read(path)
        points = in_mlflow(store, state.mlflow_run_id)
        assert points == in_journal(path)
        return bool(points)

    return compare


# ------------------------------------------------------------------ a bad connection


@pytest.mark.parametrize(
    "mode",
    [
        "gone",
        "hang",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("error", "drop")),
    ],
)
def test_server_that_fails_for_a_while_gets_every_row_once(
    record, start_delivery, proxy, server, connect, until, is_equal, monkeypatch, mode
):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1" if mode == "hang" else "60")
    run = record()
    run.log_curve(200)
    work = start_delivery(run.path, proxy.address)
    until(lambda: work.state.delivered >= 399)
    proxy.mode = mode
    if mode == "gone":
        proxy.close()
    run.log_curve(800, first=200)
    run.run.log_params({"late": 1})
    until(lambda: proxy.num_faults >= 2 or mode == "gone")
    until(lambda: work.state.phase == "waiting")
    assert work.state.behind > 0
    assert work.state.error
    if mode == "gone":
        connect(server.port, proxy.port)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
    proxy.mode = "pass"
    proxy.released.set()
    run.log_curve(200, first=1000)
    run.run.finish(wait_s=0)
    assert work.join().phase == "done"
    assert is_equal(run.path, server.address)


def test_server_that_is_absent_at_the_start_gets_everything_later(
    record, start_delivery, server, connect, until, is_equal, client
):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    run = record()
    run.log_curve(300)
    work = start_delivery(run.path, f"http://127.0.0.1:{port}")
    until(lambda: work.state.phase == "waiting")
    assert work.state.mlflow_run_id is None
    assert work.state.behind == 600
    connect(server.port, port)
    run.run.finish(wait_s=0)
    state = work.join()
    assert is_equal(run.path, server.address)
    assert state.page == f"http://127.0.0.1:{port}/#/experiments/" + (
        f"{state.experiment_id}/runs/{state.mlflow_run_id}/model-metrics?workflowType=machine_learning"
    )


def test_reply_lost_at_the_runs_creation_makes_one_run(
    record, start_delivery, proxy, server, until, is_equal, client
):
    run = record()
    run.log_curve(10)
    proxy.mode = "drop"
    work = start_delivery(run.path, proxy.address)
    until(lambda: proxy.num_faults >= 2)  # the experiment, and the run
    proxy.mode = "pass"
    run.run.finish(wait_s=0)
    state = work.join()
    assert is_equal(run.path, server.address)
    runs = client(server.address).search_runs(
        [state.experiment_id], f"tags.`luz.run_id` = '{run.run.id}'"
    )
    assert len(runs) == 1


def test_rows_that_a_server_refuses_are_found_by_halving(
    record, deliver, proxy, server, in_mlflow, in_journal
):
    run = record()
    run.log_curve(300)
    run.run.log_metric("odd", 1.0, set="train", index=1)
    run.log_curve(300, first=300)
    run.run.finish()
    proxy.mode, proxy.refused = "refuse 400", b'"key": "train/odd"'
    made = deliver(run.path, proxy.address)
    wanted = [point for point in in_journal(run.path) if point[0] != "train/odd"]
    assert in_mlflow(server.address, made.state.mlflow_run_id) == wanted
    assert list(made.state.flags["refused"]) == ["train/odd"]
    assert proxy.num_faults <= 20


def test_dead_server_is_given_up_after_the_end_of_training(
    record, make_worker, proxy, is_equal, deliver, server
):
    run = record()
    run.log_curve(100)
    run.run.finish()
    proxy.mode = "error"
    with pytest.raises(GaveUpError, match="500"):
        make_worker(run.path, proxy.address, patience_s=0.3).deliver()
    state = DeliveryState.read(run.path)
    assert (state.phase, state.behind) == ("gave up", 200)
    proxy.mode = "pass"
    deliver(run.path, proxy.address, is_sync=True)
    assert is_equal(run.path, server.address)


def test_artifact_that_cannot_be_stored_delays_no_row(
    record, deliver, proxy, server, is_equal, client
):
    run = record()
    run.run.log_text("the text of the artifact", "note.txt")
    run.log_curve(100)
    run.run.finish()
    proxy.mode, proxy.refused = "refuse 400", b"the text of the artifact"
    deliver(run.path, proxy.address)
    assert is_equal(run.path, server.address)
    state = DeliveryState.read(run.path)
    found = client(server.address)
    assert found.get_run(state.mlflow_run_id).info.status == "FINISHED"
    assert found.list_artifacts(state.mlflow_run_id) == []
    assert "400" in state.flags["refused"]["note.txt"]
    proxy.mode = "pass"
    deliver(run.path, proxy.address, is_sync=True)
    (item,) = found.list_artifacts(state.mlflow_run_id)
    assert (item.path, item.file_size) == ("note.txt", 24)


# ------------------------------------------------------------------ a bad disk


def begins_exclusively(database):
    """Whether a database could be locked, which delivery may be writing into."""
    with contextlib.suppress(sqlite3.OperationalError):
        database.execute("BEGIN EXCLUSIVE")
        return True
    return False


def test_locked_database_is_waited_for(
    record, store, until, is_equal, cache, client_class
):
    is_sending = threading.Event()

    class Watched(StoreClient):
        def send(self, *args, **options):
            is_sending.set()
            super().send(*args, **options)

    run = record()
    run.log_curve(10)
    resolver = RunResolver(run.path, store, lambda uri: Watched(uri, cache))
    work = Delivering(DeliveryWorker(run.path, resolver, patience_s=300.0))
    until(lambda: work.state.delivered >= 19)
    path = store.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        until(lambda: begins_exclusively(other))
        is_sending.clear()
        run.log_curve(500, first=10)
        until(is_sending.is_set)
        assert work.state.delivered == 19
        other.execute("ROLLBACK")
    run.run.finish(wait_s=0)
    work.join()
    assert is_equal(run.path, store)


@pytest.mark.slow
def test_database_locked_for_longer_than_mlflow_waits_is_tried_again(
    record, start_delivery, store, until, is_equal
):
    run = record()
    run.log_curve(10)
    work = start_delivery(run.path, store)
    until(lambda: work.state.delivered >= 19)
    path = store.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        until(lambda: begins_exclusively(other))
        run.log_curve(500, first=10)
        until(lambda: work.state.phase == "waiting")
        assert "database is locked" in work.state.error
        other.execute("ROLLBACK")
    run.run.finish(wait_s=0)
    work.join()
    assert is_equal(run.path, store)


def test_full_disk_under_the_state_file_stops_nothing(record, deliver, store, client):
    run = record()
    run.log_curve(100)
    run.run.finish()
    folder = run.path / "delivery"
    folder.mkdir(exist_ok=True)
    # What is written here fails as on a full disk.
    (folder / f".{os.getpid()}-state.json").symlink_to("/dev/full")
    made = deliver(run.path, store)
    assert made.num_sent == 200
    assert client(store).get_run(made.state.mlflow_run_id).info.status == "FINISHED"


# -------------------------------------------------------------- processes killed

TRAINER = """
import itertools, os, sys, time, tracking
parent = os.getppid()
run = tracking.start(experiment="digits", runs_dir="runs")
print(run.id, flush=True)
for i in itertools.count():
    run.log_step({"loss": 1 / (i + 1)}, step=i)
    time.sleep(0.02)
    assert os.getppid() == parent  # else nobody would ever end it
"""


@pytest.fixture
def trainer(tmp_path):
    """A training process that logs until it is killed, and the path of its run."""
    process = subprocess.Popen(
        [sys.executable, "-c", TRAINER],
        cwd=tmp_path,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    path = tmp_path / "runs" / process.stdout.readline().strip()
    yield process, path
    process.kill()
    process.wait()
    process.stdout.close()


def log_steps(run, count, first=0):
    """Rows of steps: no picture is drawn of them, which takes seconds."""
    for i in range(first, first + count):
        run.run.log_step({"loss": 1 / (i + 1)}, step=i)


def delivery_of(path):
    """Id of the process that delivers a run; None if there is none."""
    for proc in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (proc / "cmdline").read_bytes().split(b"\0")
            if str(path).encode() in words and b"tracking.delivery" in b"".join(words):
                return int(proc.name)
    return None


@pytest.mark.slow
def test_delivery_outlives_a_killed_trainer_and_closes_its_run(
    trainer, until, is_equal, client_class, client, tmp_path
):
    process, path = trainer
    until(lambda: (DeliveryState.read(path) or DeliveryState()).delivered >= 20)
    process.kill()
    process.wait()
    until(lambda: delivery_of(path) is None)
    store = f"sqlite:///{tmp_path}/mlflow.db"
    assert is_equal(path, store)
    state = DeliveryState.read(path)
    assert state.phase == "done"
    assert client(store).get_run(state.mlflow_run_id).info.status == "KILLED"


@pytest.fixture
def forked_trainer(record, until):
    """A process, forked from this one, that logs until it is killed, and its run."""
    reader, writer = os.pipe()
    parent = os.getpid()
    process = os.fork()
    if process == 0:
        try:
            run = record().run
            os.write(writer, str(run.path).encode())
            for i in itertools.count():
                run.log_step({"loss": 1 / (i + 1)}, step=i)
                time.sleep(0.02)
                assert os.getppid() == parent  # else nobody would ever end it
        finally:
            os._exit(1)
    os.close(writer)
    path = Path(os.read(reader, 1000).decode())
    os.close(reader)
    yield process, path
    with contextlib.suppress(ProcessLookupError, ChildProcessError):
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_killed_trainer_and_delivery_leave_what_sync_finishes(
    forked_trainer, store, fork_delivery, until, is_equal
):
    process, path = forked_trainer
    delivery = fork_delivery(str(path), MLFLOW_TRACKING_URI=store)
    until(lambda: (DeliveryState.read(path) or DeliveryState()).delivered >= 20)
    os.kill(process, signal.SIGKILL)
    delivery.kill()
    os.waitpid(process, 0)
    assert tracking.open(path).status == "killed"
    code, report = fork_delivery("--sync", str(path), MLFLOW_TRACKING_URI=store).wait()
    (line,) = (line for line in report.splitlines() if line.startswith("{"))
    done = json.loads(line)  # MLflow logs beside it
    assert (code, done["phase"], done["behind"]) == (0, "done", 0)
    assert is_equal(path, store)


@pytest.mark.slow
def test_killed_delivery_of_a_live_run_is_restarted_by_sync(
    record, store, until, is_equal, fork_delivery, monkeypatch
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    run = record()
    log_steps(run, 20)
    process = fork_delivery(str(run.path))
    until(lambda: (DeliveryState.read(run.path) or DeliveryState()).delivered >= 19)
    (busy,) = sync([tracking.open(run.path)])
    assert busy.phase == "busy"
    process.kill()
    log_steps(run, 20, first=20)
    (again,) = sync([tracking.open(run.path)])
    assert (again.phase, again.behind) == ("started", 20)
    until(lambda: DeliveryState.read(run.path).delivered >= 39)
    run.run.finish(wait_s=0)
    until(lambda: DeliveryState.read(run.path).phase == "done")
    until(lambda: delivery_of(run.path) is None)
    assert is_equal(run.path, store)


# ------------------------------------------------------------------- the long form


def kill_when(worker, is_time):
    """Deliver in a child process, and kill it; return its lifetime in seconds."""
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            worker.deliver()
        os._exit(0)
    while not is_time(seconds := time.monotonic() - began):
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_kills_at_random_moments_lose_and_duplicate_nothing(
    record, make_worker, deliver, store, is_equal, seed
):
    draw = random.Random(seed)
    run = record()
    for first in (0, 200):  # the first delivery creates the store too
        run.log_curve(200, first=first)
        position = run.run.position()

        def is_delivered(seconds, position=position):
            assert seconds < 300
            state = DeliveryState.read(run.path)
            return state is not None and state.delivered >= position

        longest_s = 1.2 * kill_when(make_worker(run.path, store), is_delivered)
    first = 400

    def kill_one():
        limit_s = draw.uniform(0, longest_s)
        kill_when(make_worker(run.path, store), lambda seconds: seconds > limit_s)

    for _ in range(20):
        count = draw.randrange(1, 400)
        run.log_curve(count, first=first)
        first += count
        if draw.random() < 0.2:  # resumed, and the same once more
            position = run.run.position()
            run.log_curve(50, first=first)
            kill_one()
            run.run.rewind(position)
            run.log_curve(50, first=first)
            first += 50
        kill_one()
    run.run.finish()
    made = deliver(run.path, store)
    assert made.state.superseded == []
    points = {point[:3] for point in made_points(store, made)}
    wanted = tracking.open(run.path).records(what="metrics")
    assert len(points) == wanted.num_rows == len(made_points(store, made))
    assert made.num_sent < wanted.num_rows  # killed processes sent the rest
    assert deliver(run.path, store, is_sync=True).num_sent == 0


def made_points(store, made):
    path = store.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute(
            "SELECT key, step, value, timestamp FROM metrics WHERE run_uuid = ?",
            (made.state.mlflow_run_id,),
        ).fetchall()


@pytest.mark.slow
def test_server_killed_again_and_again_gets_every_row_once(
    record, start_delivery, until, is_equal, tmp_path
):
    folder = tmp_path / "server"
    folder.mkdir()
    with Server(f"sqlite:///{folder}/mlflow.db", folder=folder) as server:
        run = record()
        work = start_delivery(run.path, server.address)
        for turn in range(2):
            run.log_curve(1500, first=1500 * turn)
            until(
                lambda turn=turn: (
                    (work.state or DeliveryState()).delivered > 3000 * turn
                )
            )
            os.killpg(server.process.pid, signal.SIGKILL)
            server.process.wait()
            run.log_curve(10, first=100_000 + 10 * turn)
            until(lambda: work.state.phase == "waiting")
            server.start()
        run.run.finish(wait_s=0)
        work.join()
        assert is_equal(run.path, server.address)
