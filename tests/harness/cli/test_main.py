"""The command: real processes where signals or imports matter, click's runner elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import tracking
from harness.cli.main import main

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = """
import signal
import time
import torch
from torch import nn
import harness

class Breaks(harness.Callback):
    def __init__(self, way):
        self.way = way
    def on_train_batch_begin(self):
        if self.ctx.epoch == 2 and self.ctx.iter == 2:
            if self.way == "error":
                raise ArithmeticError("no such number")
            for _ in range(int(self.way)):
                signal.raise_signal(signal.SIGINT)

class Slow(harness.Callback):
    def __init__(self, pause):
        self.pause = pause
    def on_train_batch_end(self):
        time.sleep(self.pause)

class Net(nn.Module):
    def __init__(self, hidden=2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, hidden), nn.Dropout(0.5), nn.Linear(hidden, 1))
    def forward(self, x):
        return self.body(x)

def experiment(hidden: int = 2, pause: float = 0.0, fail: bool = False, way: str = "0"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator)
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner = learner.set_hparams(hidden=hidden).set_opt_hparams(lr=0.1)
    return harness.Experiment(
        learner=learner, data=(x, torch.zeros(40, 2 if fail else 1).T if fail else x[:, :1]),
        valid_data=0.25, epochs=4, seed=3, callbacks=[Slow(pause), Breaks(way)],
        dataloader_options={"batch_size": 10}, name="line",
    )
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "exp_cli.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("exp_cli", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


FIT = [sys.executable, "-m", "harness.cli", "fit", "exp_cli.py:experiment"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def run(*words: str):
    return CliRunner().invoke(main, list(words), catch_exceptions=False)


def test_help_is_quick_to_import_and_names_every_command():
    code = (
        "import sys; from harness.cli.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'mlflow', 'pyarrow', 'pandas', 'deepspeed'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for name in main.commands:
        assert name in done.stdout


def test_fit_untracked_takes_set_opt_and_epochs(folder):
    done = run(
        "fit", "exp_cli.py:experiment", "--no-track", "--set", "hidden=5", "--quiet",
        "--opt", "lr=0.5", "--epochs", "1,2", "--seed", "7",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Fitted Net, 26 parameters, 2 epochs" in done.output
    assert not (folder / "runs").exists()


def test_fit_config_file_is_overruled_by_set(folder):
    (folder / "own.yaml").write_text("hidden: 3\npause: 0\n")
    words = [
        "fit",
        "exp_cli:experiment",
        "--no-track",
        "--quiet",
        "--config",
        "own.yaml",
    ]
    assert "16 parameters" in run(*words).output
    assert "21 parameters" in run(*words, "--set", "hidden=4").output


def test_fit_then_evaluate_and_predict_use_the_trained_model(folder):
    words = ["--runs-dir", "runs", "--quiet", "--name", "first", "--no-deliver"]
    subprocess.run([*FIT, *words], env=environment(), check=True, capture_output=True)
    (past,) = tracking.list_runs("runs")
    assert past.status == "finished"
    assert {"hidden": 2, "opt.lr": 0.1, "seed": 3}.items() <= past.params.items()

    found = json.loads(run("evaluate", "first", "--json").output)
    last = past.records(what="metrics", set="valid", name="loss").to_pylist()[-1]
    assert found == {"loss": last["value"]}

    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    np.save("rows.npy", rows)
    pd.DataFrame(rows).to_csv("rows.csv", index=False)
    done = run("predict", "first", "rows.npy", "--to", "out.npy")
    assert "4 rows -> out.npy" in done.output
    run("predict", "first", "rows.csv", "--to", "out.csv")
    assert np.load("out.npy").shape == (4, 1)
    np.testing.assert_allclose(pd.read_csv("out.csv"), np.load("out.npy"), rtol=1e-6)


USAGE = {
    "unknown file": (["fit", "nothing.py:experiment"], "got 'nothing.py'"),
    "unknown name": (["fit", "exp_cli.py:experimnt"], "Did you mean 'experiment'"),
    "unknown parameter": (
        ["fit", "exp_cli.py:experiment", "--set", "hiden=3"],
        "Did you mean 'hidden'",
    ),
    "no value": (["fit", "exp_cli.py:experiment", "--set", "hidden"], "NAME=VALUE"),
    "wrong type": (["fit", "exp_cli.py:experiment", "--set", "hidden=x"], "got 'x'"),
    "epochs": (["fit", "exp_cli.py:experiment", "--epochs", "ten"], "got 'ten'"),
    "unknown run": (["resume", "nowhere"], "nowhere"),
    "run to resume": (["fit", "exp_cli.py:experiment", "--resume", "no"], "'no'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_ends_with_2_and_one_clear_line(case, folder):
    words, text = USAGE[case]
    done = run(*words)
    assert done.exit_code == 2
    assert text in done.output.splitlines()[-1]
    assert not (folder / "runs").exists()


def test_fit_failing_training_ends_with_1_and_marks_the_run(folder):
    done = run("fit", "exp_cli.py:experiment", "--set", "fail=true", "--quiet")
    assert done.exit_code == 1
    (line,) = [line for line in done.output.splitlines() if line.startswith("error: ")]
    assert "equal length" in line
    with pytest.raises(ValueError, match="equal length"):
        run("--debug", "fit", "exp_cli.py:experiment", "--set", "fail=true")


def test_fit_failing_in_mid_epoch_ends_with_1_and_keeps_the_record(folder):
    words = ["--set", "way=error", "--quiet", "--no-deliver", "--name", "broken"]
    done = run("fit", "exp_cli.py:experiment", *words)
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line == (
        "error: ArithmeticError: no such number "
        "(in Breaks.on_train_batch_begin, epoch 2, iter 2, training)"
    )
    past = tracking.open("broken")
    assert past.status == "failed"
    loss = past.records(what="metrics", set="train", name="loss")
    assert loss["index"].to_pylist() == [1]


@pytest.mark.parametrize("times", [1, 2])
def test_fit_interrupted_ends_with_130_and_a_run_marked_killed(times, folder):
    words = ["--set", f"way={times}", "--quiet", "--no-deliver", "--name", "stopped"]
    before = signal.getsignal(signal.SIGINT)
    done = run("fit", "exp_cli.py:experiment", *words)
    assert done.exit_code == 130
    assert ("go on with: harness resume" in done.output) == (times == 1)
    past = tracking.open("stopped")
    assert past.status == "killed"
    loss = past.records(what="metrics", set="train", name="loss")
    assert loss["index"].to_pylist() == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_fit_names_go_into_the_run(folder):
    words = ["--name", "mine", "--experiment", "lines", "--epochs", "1", "--no-deliver"]
    assert run("fit", "exp_cli.py:experiment", *words, "--quiet").exit_code == 0
    (past,) = tracking.list_runs()
    assert (past.name, past.manifest.experiment) == ("mine", "lines")
    assert past.params["epochs"] == 1


def test_fit_shows_epochs_unless_quiet(folder):
    words = ["fit", "exp_cli.py:experiment", "--no-track", "--epochs", "2"]
    shown = [line.split()[:2] for line in run(*words).stderr.splitlines()]
    assert shown == [["epoch", "1/2"], ["epoch", "2/2"]]
    assert run(*words, "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("text", "match"),
    [("[1, 2]", "expected settings by name, got [1, 2]"), ("a: [", "expected YAML")],
)
def test_fit_config_file_that_holds_no_settings_ends_with_2(text, match, folder):
    (folder / "own.yaml").write_text(text)
    done = run("fit", "exp_cli.py:experiment", "--config", "own.yaml", "--no-track")
    assert done.exit_code == 2
    assert match in done.output


def test_fit_optimizer_option_that_does_not_exist_ends_with_one_line(folder):
    words = ["--no-track", "--quiet", "--opt", "momentun=0.9"]
    done = run("fit", "exp_cli.py:experiment", *words)
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith("error: ")
    assert "momentun" in line


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGINT, 130),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
    ],
)
def test_fit_signal_in_mid_epoch_keeps_the_record_and_resumes_exactly(
    number, code, folder
):
    with subprocess.Popen(
        [*FIT, "--set", "pause=0.15", "--name", "stopped", "--no-deliver"],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line.startswith("epoch 2/4"):
                break
        time.sleep(0.2)
        child.send_signal(number)
        told = child.stderr.read()
        assert child.wait(60) == code
    assert "interrupted in epoch 3" in told
    assert "go on with: harness resume" in told
    past = tracking.open("stopped", runs_dir="runs")
    assert past.status == "killed"
    loss = past.records(what="metrics", set="train", name="loss")
    assert loss["index"].to_pylist() == [1, 2]
    assert past.damage == []

    assert run("resume", "stopped").exit_code == 0
    whole = [
        "fit", "exp_cli.py:experiment", "--set", "pause=0", "--name", "whole", "--quiet",
        "--no-deliver",
    ]  # fmt: skip
    assert run(*whole).exit_code == 0
    found = [
        past.records(what="metrics")
        .select(["set", "name", "index", "value"])
        .to_pylist()
        for past in (past, tracking.open("whole", runs_dir="runs"))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 8


def test_doctor_tells_each_part_as_text_and_json(folder):
    done = run("doctor", "--json")
    found = {item["name"]: item for item in json.loads(done.output)}
    assert {"devices", "disk"} <= found.keys()
    assert done.exit_code == any(item["state"] == "broken" for item in found.values())
    for item in found.values():
        assert item["state"] == "ok" or item["advice"]
