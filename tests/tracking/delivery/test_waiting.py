"""Training ends without waiting for MLflow; the interpreter waits, once for all runs."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import tracking
from tests.harness.terminal import in_terminal
from tracking.delivery.process import Surroundings
from tracking.delivery.state import DeliveryState
from tracking.delivery.waiting import RunDelivery, _Deliveries, _show
from tracking.store import Manifest

BEGIN = """
import os, signal, sys, time
import tracking

def record(**options):
    with tracking.start(**{"experiment": "digits", "runs_dir": "runs"} | options) as run:
        for i in range(20):
            run.log_step({"loss": 1 / (i + 1)}, step=i)  # no picture is drawn of steps
    return run
"""


def start(folder, script, **variables):
    root = str(Path(tracking.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", BEGIN + script],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": root, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_script(folder, script, **variables):
    process = start(folder, script, **variables)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out.split(), err


@pytest.fixture
def is_in_mlflow(tmp_path, in_mlflow, in_journal, client):
    """Checks that a store has a run's points, each once, and how the run ended."""

    def check(run_id, name="mlflow.db"):
        path, store = tmp_path / "runs" / run_id, f"sqlite:///{tmp_path}/{name}"
        state = DeliveryState.read(path)
        assert state is not None
        points = in_mlflow(store, state.mlflow_run_id)
        assert points == in_journal(path)
        status = client(store).get_run(state.mlflow_run_id).info.status
        return bool(points) and status == "FINISHED"

    return check


MANY = """
from tracking.delivery.waiting import _deliveries, prepare_delivery
prepare_delivery()
prepare_delivery()
(prepared,) = _deliveries._processes
runs = [record(), record(delivery={"wait_s": 400})]
broken = record(delivery=False)
(broken.path / "delivery" / "lock").mkdir(parents=True)
broken = record(run_id=broken.id)
os.environ["MLFLOW_TRACKING_URI"] = "sqlite:///other.db"
other = record(experiment="others")
del os.environ["MLFLOW_TRACKING_URI"]
os.environ["FOLD"] = "2"  # has nothing to do with MLflow
runs.append(record(experiment="others"))
assert "mlflow" not in sys.modules
assert not runs[-1].wait(0.0)
pids = {prepared.pid, *(run._delivery._process.pid for run in runs)}
print(len(pids | {broken._delivery._process.pid}), other._delivery._process.pid in pids)
print(broken.id, other.id, *[run.id for run in runs])
"""


def test_runs_of_a_process_share_a_delivery_and_are_waited_for_at_its_end(
    tmp_path, is_in_mlflow
):
    (count, is_shared, broken, other, *runs), err = run_script(tmp_path, MANY)
    assert (count, is_shared) == ("1", "False")
    assert all(map(is_in_mlflow, runs))
    assert is_in_mlflow(other, "other.db")
    first, *rest = err.splitlines()
    assert re.fullmatch(r"waiting until MLflow has \d runs, at most 400 s", first)
    assert rest == [
        f"some rows of {broken} are not in MLflow yet: 'harness sync {broken}' sends "
        "the rest."
    ]


def test_run_that_something_else_has_delivered_is_behind_no_more(tmp_path):
    run = tracking.start(runs_dir=tmp_path, delivery=False)
    run.log_metric("x", 1.0, index=1)
    delivery = RunDelivery(run.path)
    assert delivery.is_behind()  # it gave up before it wrote a state
    state = DeliveryState(phase="gave up", delivered=-1)
    state.write(run.path)
    assert delivery.is_behind()
    state.phase, state.delivered = "done", run.position()
    state.write(run.path)  # as "harness sync" does
    assert not delivery.is_behind()
    run.log_metric("x", 2.0, index=2)
    run.finish()
    assert delivery.is_behind()


KILLED = """
from tracking.delivery.waiting import _deliveries, prepare_delivery
prepare_delivery()
os.kill(_deliveries._processes[0].pid, signal.SIGKILL)
with tracking.start(runs_dir="runs", experiment="digits") as run:
    run.log_metric("x", 1.0, index=1)
    assert run.wait(300)
    first = run._delivery._process.pid
    os.kill(first, signal.SIGKILL)
    while run._delivery._process.pid == first:
        time.sleep(0.02)
    run.log_metric("x", 2.0, index=2)
assert run.wait(300)
print(run.id)
"""

CHILDREN = """
import multiprocessing

def work(queue):
    queue.put(record(delivery={"wait_s": 400}).id)
    tracking.start(runs_dir="runs", delivery={"wait_s": 400})  # finished at the end

def main():
    mine = record()
    pid = mine._delivery._process.pid
    child = os.fork()
    if child == 0:
        assert not mine.wait()
        forked = record(delivery={"wait_s": 400})
        assert forked._delivery._process.pid != pid
        print(forked.id, flush=True)
        sys.exit()
    os.waitpid(child, 0)
    for method in ("fork", "spawn"):
        context = multiprocessing.get_context(method)
        queue = context.Queue()
        process = context.Process(target=work, args=[queue])
        process.start()
        run_id = queue.get(timeout=300)
        process.join()
        state = tracking.delivery.state.DeliveryState.read(mine.path.parent / run_id)
        assert state is not None and state.phase == "done", (method, state)
        print(run_id)
    assert mine.wait(300)
    print(mine.id)

if __name__ == "__main__":
    main()
"""


@pytest.mark.slow
def test_delivery_that_is_killed_is_started_again(tmp_path, is_in_mlflow):
    (run_id,), err = run_script(tmp_path, KILLED)
    assert is_in_mlflow(run_id)
    assert err == ""


@pytest.mark.slow
def test_children_deliver_by_themselves_and_wait_at_their_end(tmp_path, is_in_mlflow):
    (tmp_path / "script.py").write_text(BEGIN + CHILDREN)
    run_ids, _ = run_script(
        tmp_path, "import runpy; runpy.run_path('script.py', run_name='__main__')"
    )
    assert len(run_ids) == 4
    assert all(map(is_in_mlflow, run_ids))


@pytest.fixture
def silent():
    """Address of a server that takes requests and does not answer."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen(100)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_interrupt_ends_the_last_wait_and_nothing_else(tmp_path, silent):
    script = """
import atexit
atexit.register(print, "after")
run = record(delivery={"patience_s": 0})
print(run.id, flush=True)
"""
    variables = {"MLFLOW_TRACKING_URI": silent, "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    process = start(tmp_path, script, **variables)
    assert process.stdout
    assert process.stderr
    run_id = process.stdout.readline().strip()
    line = process.stderr.readline()
    assert line == f"waiting until MLflow has {run_id}, at most 60 s\n"
    assert Manifest.read(tmp_path / "runs" / run_id).status == "finished"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "after\n")
    assert f"of {run_id} are not in MLflow yet" in err
    assert "delivery continues in the background" in err


def test_last_wait_is_bounded_and_needs_no_stderr(tmp_path, silent):
    script = """
import atexit, os, sys
os.close(2)
assert os.open(os.devnull, os.O_RDONLY) == 2  # else the next file would become stderr
began = time.monotonic()
run = record(delivery={"patience_s": 0, "wait_s": 0.6})
assert time.monotonic() - began < 60
print(run.id)
"""
    variables = {"MLFLOW_TRACKING_URI": silent, "MLFLOW_HTTP_REQUEST_TIMEOUT": "1"}
    (run_id,), _ = run_script(tmp_path, script, **variables)
    assert Manifest.read(tmp_path / "runs" / run_id).status == "finished"


def test_line_of_a_wait_is_one_line_of_the_terminal(tmp_path):
    run = SimpleNamespace(run_path=tmp_path / ("long-" * 30))
    states = [DeliveryState(behind=3)]
    text = in_terminal(lambda: _show([run], states, 5.0, ""), 60)  # type: ignore[list-item]
    assert len(text.removeprefix("\r").removesuffix("\x1b[K")) == 59


@pytest.mark.parametrize("is_done", [True, False])
def test_report_that_comes_at_once_counts(is_done, tmp_path):
    deliveries, surroundings = _Deliveries(), Surroundings({}, "/", "/")

    class Process:
        """Reports while a run is handed over."""

        def __init__(self):
            self.surroundings = surroundings

        def take(self, request):
            deliveries._note_report(request["number"], is_done)
            return True

    deliveries._processes.append(Process())  # type: ignore[arg-type]
    run = RunDelivery(tmp_path)
    deliveries.add(run, surroundings)
    assert run.is_over
    assert run.is_done is is_done
    assert deliveries.list_unsent() == ([] if is_done else [run])


@pytest.mark.parametrize(
    ("name", "is_same"),
    [
        *[(name, True) for name in ("FOLD", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")],
        *[(name, False) for name in ("MLFLOW_TRACKING_URI", "AWS_PROFILE", "no_proxy")],
        *[(name, False) for name in ("REQUESTS_CA_BUNDLE", "OUR_TOKEN", "PGPASSWORD")],
    ],
)
def test_only_variables_of_a_store_need_another_process(name, is_same):
    first, second = (Surroundings({name: text}, "/", "/") for text in "ab")
    assert (first == second) is is_same
    assert Surroundings({}, "/", "/x") != Surroundings({}, "/", "/")
