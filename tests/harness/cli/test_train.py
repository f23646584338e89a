"""Training by command: options, signals, and resuming."""

from __future__ import annotations

import os
import re
import signal

import pytest
import torch

import tracking


def test_fit_untracked_takes_set_opt_and_epochs(call, folder):
    done = call(
        "fit", "exp_cli.py:experiment", "--no-track", "--set", "hidden=5", "--quiet",
        "--opt", "lr=0.05", "--epochs", "1,2", "--seed", "7",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "Fitted Net, 26 parameters, 2 epochs" in done.output
    assert not (folder / "runs").exists()


def test_fit_deterministic_chooses_kernels_and_is_repeated_by_resume(
    call, folder, monkeypatch
):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # chosen by the user
    words = ["fit", "exp_cli.py:experiment", "--quiet", "--no-deliver", "--epochs", "1"]
    try:
        done = call(*words, "--deterministic")
        assert done.exit_code == 0, done.output
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    finally:
        torch.use_deterministic_algorithms(False)
    (run,) = tracking.list_runs()
    assert run.manifest.extra["fit"]["deterministic"] is True


def test_fit_config_file_is_overruled_by_set(call, folder):
    (folder / "own.yaml").write_text("hidden: 3\npause: 0\n")
    words = [
        "fit",
        "exp_cli:experiment",
        "--no-track",
        "--quiet",
        "--config",
        "own.yaml",
    ]
    assert "16 parameters" in call(*words).output
    assert "21 parameters" in call(*words, "--set", "hidden=4").output


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
    "no epochs": (["fit", "exp_cli.py:experiment", "--epochs", "0"], "got '0'"),
    "epochs in disorder": (
        ["fit", "exp_cli.py:experiment", "--epochs", "3,2"],
        "got '3,2'",
    ),
    "every": (
        ["fit", "exp_cli.py:experiment", "--valid-every", "5 rows"],
        "--valid-every: expected a number of steps or epochs, got '5 rows'",
    ),
    "limit": (
        ["fit", "exp_cli.py:experiment", "--limit-batches", "1.5"],
        "--limit-batches: expected a number of batches, or a fraction, got '1.5'",
    ),
    "unknown run": (["resume", "nowhere"], "nowhere"),
    "run to resume": (["fit", "exp_cli.py:experiment", "--resume", "no"], "'no'"),
}


def test_fit_wrong_key_of_a_file_is_told_as_one_of_the_file(call, folder):
    (folder / "own.yaml").write_text("hiden: 3\n")
    done = call("fit", "exp_cli:experiment", "--config", "own.yaml")
    assert done.exit_code == 2
    assert "Error: --config own.yaml: hiden: expected" in done.output
    assert "--set" not in done.output


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_ends_with_2_and_one_clear_line(call, case, folder):
    words, text = USAGE[case]
    done = call(*words)
    assert done.exit_code == 2
    assert text in done.output.splitlines()[-1]
    assert not (folder / "runs").exists()


def test_resume_of_a_run_without_checkpoints_says_to_repeat_its_command(call, folder):
    words = ["--set", "way=error", "--quiet", "--no-deliver", "--no-checkpoints"]
    call("fit", "exp_cli.py:experiment", *words)
    (run,) = tracking.list_runs()
    done = call("resume", run.id)
    assert done.exit_code == 1
    assert done.output == (
        f"error: harness resume: expected a checkpoint of run {run.id!r},"
        " found none. It saved none: repeat its command instead.\n"
    )


def test_fit_failing_in_mid_epoch_ends_with_1_and_keeps_the_record(call, folder):
    words = ["--set", "way=error", "--quiet", "--no-deliver", "--name", "broken"]
    done = call("fit", "exp_cli.py:experiment", *words)
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    start = (
        "error: ArithmeticError: no such number "
        "(in Breaks.on_train_batch_begin, epoch 2, iter 2, training)"
    )
    place = re.escape(f"{start} [exp_cli.py:") + r"(\d+); --debug shows the traceback\]"
    found = re.fullmatch(place, line)
    assert found is not None, line
    lines = (folder / "exp_cli.py").read_text().splitlines()
    assert "no such number" in lines[int(found[1]) - 1]
    past = tracking.open("broken")
    assert past.status == "failed"
    loss = past.records(what="metrics", set="train", name="loss")
    assert loss["index"].to_pylist() == [1]


@pytest.mark.parametrize("times", [1, 2])
def test_fit_interrupted_ends_with_130_and_a_run_marked_killed(call, times, folder):
    words = ["--set", f"way={times}", "--quiet", "--no-deliver", "--name", "stopped"]
    before = signal.getsignal(signal.SIGINT)
    done = call("fit", "exp_cli.py:experiment", *words)
    assert done.exit_code == 130
    assert ("resume with: harness resume" in done.output) == (times == 1)
    past = tracking.open("stopped")
    assert past.status == "killed"
    loss = past.records(what="metrics", set="train", name="loss")
    assert loss["index"].to_pylist() == [1]
    assert signal.getsignal(signal.SIGINT) is before


def test_fit_names_go_into_the_run(call, folder):
    words = ["--name", "mine", "--experiment", "lines", "--epochs", "1", "--no-deliver"]
    assert call("fit", "exp_cli.py:experiment", *words, "--quiet").exit_code == 0
    (past,) = tracking.list_runs()
    assert (past.name, past.manifest.experiment) == ("mine", "lines")
    assert past.params["epochs"] == 1


def test_fit_by_steps_is_recorded_and_replayed(call, folder):
    words = ["--max-steps", "5", "--valid-every", "2 steps", "--limit-batches", "3"]
    words += ["--stop-within", "60"]
    command = ["fit", "exp_cli.py:experiment", *words, "--no-deliver", "--quiet"]
    assert call(*command).exit_code == 0
    (past,) = tracking.list_runs()
    assert past.wide()["index"].to_pylist() == [2, 3, 4, 5]
    assert past.manifest.extra["fit"]["stop_within"] == 60
    assert past.params["max_steps"] == 5
    assert past.params["valid_every"] == "2 steps"
    assert past.manifest.extra["fit"]["limit_batches"] == "3"
    assert call("resume", past.id).exit_code == 0
    assert call("evaluate", past.id).exit_code == 0


def test_fit_precision_and_device_go_into_the_run(call, folder):
    words = ["--precision", "bf16", "--device", "cpu", "--epochs", "1", "--no-deliver"]
    assert call("fit", "exp_cli.py:experiment", *words, "--quiet").exit_code == 0
    (past,) = tracking.list_runs()
    assert (past.params["precision"], past.params["device"]) == ("bf16", "cpu")
    assert past.manifest.extra["fit"]["precision"] == "bf16"
    done = call("fit", "exp_cli.py:experiment", "--device", "gpu", "--no-track")
    assert done.exit_code == 2
    assert "expected 'cpu', 'cuda' or 'mps', got 'gpu'" in done.output


def test_fit_shows_epochs_unless_quiet(call, folder):
    words = ["fit", "exp_cli.py:experiment", "--no-track", "--epochs", "2"]
    shown = [line.split()[:2] for line in call(*words).stderr.splitlines()]
    assert [words for words in shown if words[0] == "epoch"] == [
        ["epoch", "1/2"],
        ["epoch", "2/2"],
    ]
    assert call(*words, "--quiet").stderr == ""


@pytest.mark.parametrize(
    ("text", "match"),
    [("[1, 2]", "expected arguments by name, got [1, 2]"), ("a: [", "expected YAML")],
)
def test_fit_config_file_that_holds_no_arguments_ends_with_2(call, text, match, folder):
    (folder / "own.yaml").write_text(text)
    done = call("fit", "exp_cli.py:experiment", "--config", "own.yaml", "--no-track")
    assert done.exit_code == 2
    assert match in done.output


def test_fit_optimizer_option_that_does_not_exist_ends_with_one_line(call, folder):
    words = ["--no-track", "--quiet", "--opt", "momentun=0.9"]
    done = call("fit", "exp_cli.py:experiment", *words)
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith("error: ")
    assert "momentun" in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_fit_signal_in_mid_epoch_keeps_the_record_and_resumes_exactly(
    call, start, number, code, folder
):
    words = ["--set", "pause=0.15", "--name", "stopped", "--no-deliver"]
    with start("fit", "exp_cli.py:experiment", *words) as child:
        assert child.stderr is not None
        for line in child.stderr:
            if line == "in epoch 3\n":
                break
        child.send_signal(number)
        shown = child.stderr.read()
        assert child.wait(60) == code
    assert "interrupted in epoch 3" in shown
    assert "resume with: harness resume" in shown
    past = tracking.open("stopped", runs_dir="runs")
    assert past.status == "killed"
    loss = past.records(what="metrics", set="train", name="loss")
    assert loss["index"].to_pylist() == [1, 2]
    assert past.damage == []

    assert call("resume", "stopped").exit_code == 0
    whole = [
        "fit", "exp_cli.py:experiment", "--set", "pause=0", "--name", "whole", "--quiet",
        "--no-deliver",
    ]  # fmt: skip
    assert call(*whole).exit_code == 0
    found = [
        past.records(what="metrics")
        .select(["set", "name", "index", "value"])
        .to_pylist()
        for past in (past, tracking.open("whole", runs_dir="runs"))
    ]
    assert found[0] == found[1]
    assert len(found[0]) == 8


def test_resume_of_a_run_of_another_program_is_a_usage_error(call, folder):
    with tracking.start(name="r", delivery=False):
        pass
    done = call("resume", "r")
    assert done.exit_code == 2
    assert "expected a run of 'harness fit', got one of" in done.output
    assert "Run that script again" in done.output


TOKENS = """
import torch, harness
from torch import nn
def make(num_tokens: int = 16, api_key: str = "", url: str = ""):
    assert api_key != "***" and "v=1" in url
    data = torch.utils.data.TensorDataset(torch.ones(8, num_tokens), torch.ones(8, 1))
    learner = harness.setup(module=nn.Linear, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner = learner.set_hparams(in_features=num_tokens, out_features=1)
    return harness.Experiment(
        learner=learner.set_opt_hparams(lr=0.01), data=data, valid_data=0.25, epochs=1, seed=1
    )
"""


def test_recorded_arguments_are_replayed_as_given_and_secrets_asked_for(call, folder):
    (folder / "exp_cli.py").write_text(TOKENS)
    sets = ["num_tokens=8", "api_key=hunter22", "url=http://h/x?v=1"]
    words = [word for text in sets for word in ("--set", text)]
    options = ["--no-deliver", "--quiet", "--name", "r"]
    assert call("fit", "exp_cli.py:make", *words, *options).exit_code == 0
    past = tracking.open("r", runs_dir="runs")
    assert past.manifest.extra["fit"]["sets"] == {
        "num_tokens": "8",
        "url": "http://h/x?v=1",
    }
    assert "hunter22" not in (past.path / "run.json").read_text()
    for command in ("evaluate", "resume"):
        refused = call(command, "r")
        assert refused.exit_code == 2
        assert "expected --set api_key=VALUE, got no value" in refused.output
        assert call(command, "r", "--set", "api_key=hunter22").exit_code == 0
