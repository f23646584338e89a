"""Processes that are killed or interrupted, and fits that resume from their files."""

from __future__ import annotations

import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import harness
import tracking
from harness.callbacks import AutoResume
from harness.checkpoint.weights import save_weights
from tests.harness.checkpoint.newest import find_newest
from tests.harness.exact import CASES, WITH_WORKERS, Case, Stop, same_bits
from tracking.delivery.state import DeliveryState
from tracking.delivery.sync import sync

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

CASE = CASES["adam-onecycle-metrics"]
EPOCHS = 4
Row = tuple[Any, ...]


def train(
    folder: Path, case: Case = CASE, every: int | None = 1, **tracker: Any
) -> harness.Fitted:
    """Train with a checkpoint at each step; resumes by itself."""
    fitted = case.learner().fit(
        case.data(),
        EPOCHS,
        case.valid,
        callbacks=[
            *case.callbacks(folder),
            harness.callbacks.StepMetrics(),
            AutoResume(folder / "saved", every_n_steps=every),
        ],
        accelerator=harness.accelerator(device="cpu", accumulate=case.accumulate),
        dataloader_options=case.options,
        seed=7,
        tracker={"runs_dir": folder / "runs", "delivery": False} | tracker,
        verbose=False,
    )
    save_weights(fitted.model, folder / "weights.safetensors")
    return fitted


def rows(folder: Path) -> list[Row]:
    """What the newest run recorded, but times of the wall clock; none twice."""
    run = tracking.list_runs(folder / "runs")[0]
    columns = ["what", "set", "name", "index", "epoch", "step", "value", "payload"]
    table = run.records().select(columns).to_pylist()
    found = [tuple(row.values()) for row in table if row["what"] != "profile"]
    series = [
        row[:4] + row[5:6] for row in found if row[0] in {"metrics", "steps", "lr"}
    ]
    assert len(set(series)) == len(series)
    # Losses are read out in bulk, so their place among the others depends on time.
    return sorted(
        (row for row in found if row[0] not in {"artifacts", "inputs"}), key=repr
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "weights.safetensors")


def check_same(one: Path, two: Path) -> None:
    assert rows(one) == rows(two)
    first, second = weights(one), weights(two)
    assert first.keys() == second.keys()
    assert all(same_bits(first[name], second[name]) for name in first)


# ----------------------------------------------------------------------- SIGKILL


def in_child(delay_s: float | None, work: Any) -> bool:
    """Do it in a child that is killed after a while; True if it came to its end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:  # noqa: BLE001  a child of pytest must not continue as pytest
            import traceback  # noqa: PLC0415

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert status in {0, signal.SIGKILL}
    return status == 0


def check_kills(folder: Path, case: Case, num_kills: int, seed: int) -> None:
    began = time.monotonic()
    assert in_child(None, lambda: train(folder / "unbroken", case))
    took_s = time.monotonic() - began
    draw, broken = random.Random(seed), folder / "broken"
    for _ in range(num_kills):
        if in_child(draw.uniform(0.1, 0.8) * took_s, lambda: train(broken, case)):
            break
        if (broken / "saved").exists():
            # No checkpoint is damaged, whenever the process was killed.
            assert find_newest(broken / "saved")[1] == []
    else:
        assert in_child(None, lambda: train(broken, case))
    check_same(broken, folder / "unbroken")


# Slow: it forks, which after tests that started ranks in this process may not end.
@pytest.mark.slow
def test_fit_killed_at_random_instants_resumes_to_the_same_end(tmp_path: Path) -> None:
    check_kills(tmp_path, CASE, num_kills=4, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["callbacks", "accumulation", "workers"])
@pytest.mark.parametrize("seed", range(3))
def test_fit_killed_many_times_resumes_to_the_same_end(
    seed: int, name: str, tmp_path: Path
) -> None:
    check_kills(tmp_path, (CASES | WITH_WORKERS)[name], num_kills=15, seed=seed)


def test_run_that_went_on_keeps_its_id_and_what_was_superseded(tmp_path: Path) -> None:
    stop = Stop("on_train_batch_end", 10)
    stopping = Case(
        learner=CASE.learner, callbacks=lambda folder: [*CASE.callbacks(folder), stop]
    )
    first = train(tmp_path, stopping, every=None)
    # Rows after the checkpoint, as a process that is killed later would leave them.
    with tracking.start(
        run_id=first.run_id, runs_dir=tmp_path / "runs", delivery=False
    ) as run:
        run.log("metrics", "train", {"loss": 99.0}, index=2)
    second = train(tmp_path, every=None)
    assert second.run_id == first.run_id
    [run_found] = tracking.list_runs(tmp_path / "runs")
    kept = run_found.records(what="metrics", name="loss", set="train")
    assert 99.0 not in kept["value"].to_pylist()
    everything = run_found.records(superseded=True)
    assert 99.0 in everything["value"].to_pylist()
    assert run_found.status == "finished"
    train(tmp_path / "unbroken", every=None)
    check_same(tmp_path, tmp_path / "unbroken")


def test_resume_without_the_former_run_records_everything_in_a_new_one(
    tmp_path: Path,
) -> None:
    """The run's folder is gone, so a new run records everything again."""
    stop = Stop("on_train_batch_end", 10)
    stopping = Case(
        learner=CASE.learner, callbacks=lambda folder: [*CASE.callbacks(folder), stop]
    )
    first = train(tmp_path, stopping, every=None)
    assert first.run_path is not None
    first.run_path.rename(tmp_path / "elsewhere")
    second = train(tmp_path, every=None)
    assert second.run_id != first.run_id
    train(tmp_path / "unbroken", every=None)
    # A fit remembers the values of its epochs; those of its steps were only in the run.
    found, wanted = (
        tracking.list_runs(folder / "runs")[0]
        .wide()
        .to_pandas()
        .dropna(subset="train/loss")
        for folder in (tmp_path, tmp_path / "unbroken")
    )
    of_steps = [name for name in wanted.columns if name.endswith("_step")]
    assert len(wanted) == EPOCHS
    assert found.drop(columns=of_steps).equals(wanted.drop(columns=of_steps))
    assert tracking.list_runs(tmp_path / "runs")[0].params["optimizer"] == "Adam"


# ------------------------------------------------------------ signals, in process


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signal_ends_the_fit_after_the_batch_with_a_checkpoint(
    signum: signal.Signals, tmp_path: Path
) -> None:
    before = signal.getsignal(signum)
    stop = Stop("on_train_batch_begin", 3, signum)
    case = Case(callbacks=lambda folder: [stop])
    fitted = train(tmp_path, case, every=None)
    assert fitted.signum == signum
    place, _ = find_newest(tmp_path / "saved")
    assert place is not None
    assert place.name == "000001-epoch-1-batch-3-step-3"
    assert tracking.list_runs(tmp_path / "runs")[0].status == "killed"
    assert signal.getsignal(signum) is before


def test_second_signal_leaves_at_once_and_the_next_fit_is_clean(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT)
    seen: list[str] = []

    class Impatient(harness.Callback):
        def on_train_batch_begin(self) -> None:
            signal.raise_signal(signal.SIGINT)
            seen.append("asked")
            signal.raise_signal(signal.SIGINT)
            seen.append("still here")

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Case(callbacks=lambda folder: [Impatient()]))
    assert seen == ["asked"]
    assert signal.getsignal(signal.SIGINT) is before
    assert tracking.list_runs(tmp_path / "runs")[0].status == "killed"
    assert train(tmp_path).signum is None
    assert signal.getsignal(signal.SIGINT) is before
    train(tmp_path / "unbroken")
    check_same(tmp_path, tmp_path / "unbroken")


# --------------------------------------------------------- signals, by the command

EXPERIMENT = """
import os, signal
from pathlib import Path
import harness
from tests.harness.exact import CASES, VALID, X, Y, adam, one_cycle


class Ask(harness.Callback):
    def __init__(self, signum):
        self.signum = signum

    def on_train_batch_end(self):
        if self.ctx.step == 8 and not Path("asked").exists():
            Path("asked").touch()
            os.kill(os.getpid(), self.signum)


def experiment(signum: int = 0):
    asking = [Ask(signum)] if signum else []
    return harness.Experiment(
        learner=adam(), data=(X, Y), valid_data=VALID, epochs=3, seed=7,
        callbacks=[one_cycle(), *asking],
        dataloader_options={"batch_size": 4, "drop_last": False},
    )
"""


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command `harness`, as a person types it."""
    root = Path(__file__).parents[3]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", "harness.cli", *words],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def check_command(folder: Path, signum: int) -> None:
    for name in ("broken", "unbroken"):
        (folder / name).mkdir()
        (folder / name / "exp.py").write_text(EXPERIMENT)
    options = ("--set", f"signum={signum}", "--no-deliver", "--quiet")
    asked = command(folder / "broken", "fit", "exp.py:experiment", *options)
    assert asked.returncode == 128 + signum, asked.stderr
    found = re.search(r"resume with: harness resume (\S+)", asked.stderr)
    assert found is not None
    assert tracking.open(found[1], folder / "broken" / "runs").status == "killed"
    resumed = command(folder / "broken", "resume", found[1])
    assert resumed.returncode == 0, resumed.stderr
    # The same callbacks, that nobody asks to end.
    (folder / "unbroken" / "asked").touch()
    whole = command(folder / "unbroken", "fit", "exp.py:experiment", *options)
    assert whole.returncode == 0, whole.stderr
    assert rows(folder / "broken") == rows(folder / "unbroken")
    states = []
    for name in ("broken", "unbroken"):
        [run] = tracking.list_runs(folder / name / "runs")
        assert run.status == "finished"
        states.append(load_file(run.path / "model" / "model.safetensors"))
    assert all(same_bits(states[0][key], states[1][key]) for key in states[1])


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_fit_command_ended_by_a_signal_is_finished_by_resume(
    signum: signal.Signals, tmp_path: Path
) -> None:
    check_command(tmp_path, signum)


# ------------------------------------------------------------------ one MLflow run


def histories(folder: Path, run_id: str) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each metric of an MLflow run, as MLflow returns them."""
    import mlflow  # noqa: PLC0415

    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    keys = [
        key
        for key in client.get_run(run_id).data.metrics
        if not key.startswith("system/")
    ]
    return {
        key: sorted((p.step, p.value) for p in client.get_metric_history(run_id, key))
        for key in keys
    }


class Pause(harness.Callback):
    """Waits until delivery has sent what there is."""

    def on_train_batch_end(self) -> None:
        if self.ctx.step != 8:
            return
        run: Any = self.ctx.run
        position, until = run.position(), time.monotonic() + 90
        while time.monotonic() < until:
            state = DeliveryState.read(run.path)
            if state is not None and state.delivered >= position:
                return
            time.sleep(0.05)
        raise TimeoutError("delivery sends nothing")


def delivered(folder: Path, monkeypatch: pytest.MonkeyPatch, *kills: Case) -> str:
    """Train with delivery, after children that are killed; return the MLflow run's id."""
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder}/mlflow.db")
    for case in kills:
        assert not in_child(
            None, lambda case=case: train(folder, case, 2, delivery=True)
        )
    assert in_child(None, lambda: train(folder, every=2, delivery=True))
    [run] = tracking.list_runs(folder / "runs")
    [done] = sync([run], 60.0)
    assert done.behind == 0
    state = DeliveryState.read(run.path)
    assert state is not None
    assert state.mlflow_run_id is not None
    return state.mlflow_run_id


@pytest.mark.slow
def test_mlflow_history_of_a_killed_and_resumed_fit_is_that_of_the_unbroken_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Killed when the rows are with MLflow, and back to a checkpoint before them.
    late = Stop("on_train_batch_begin", 10, signal.SIGKILL)
    killed = Case(
        learner=CASE.learner,
        callbacks=lambda folder: [*CASE.callbacks(folder), Pause(), late],
    )
    broken, unbroken = tmp_path / "broken", tmp_path / "unbroken"
    first = delivered(broken, monkeypatch, killed)
    second = delivered(unbroken, monkeypatch)
    assert histories(broken, first) == histories(unbroken, second)
    assert histories(broken, first)["train/loss_step"]
    assert num_mlflow_runs(broken) == 1


@pytest.mark.slow
def test_mlflow_shows_a_fresh_run_where_the_replay_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = Stop("on_train_batch_begin", 10, signal.SIGKILL)
    killed = Case(
        learner=lambda: CASE.learner().set_opt_hparams(weight_decay=0.1),
        callbacks=lambda folder: [Differs(), *CASE.callbacks(folder), Pause(), late],
    )
    broken = tmp_path / "broken"
    first = delivered(broken, monkeypatch, killed)
    [run] = tracking.list_runs(broken / "runs")
    ours = run.records(what="steps", name="loss").select(["step", "value"]).to_pylist()
    shown = histories(broken, first)["train/loss_step"]
    assert shown == sorted((row["step"], row["value"]) for row in ours)
    assert num_mlflow_runs(broken) == 2


class Differs(harness.Callback):
    """Draws from the system at each batch, as a kernel without a fixed order might."""

    def on_train_batch_begin(self) -> None:
        if self.ctx.step >= 6:
            torch.manual_seed(int.from_bytes(os.urandom(4), "little"))


def num_mlflow_runs(folder: Path) -> int:
    with sqlite3.connect(folder / "mlflow.db") as database:
        return int(database.execute("select count(*) from runs").fetchone()[0])
