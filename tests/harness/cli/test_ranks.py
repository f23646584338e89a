"""Ranks that commands start: usage that is refused before, and a resume on as many."""

from __future__ import annotations

import json

import pytest

import tracking
from harness.cli.main import main
from tests.harness.terminal import in_terminal

LAUNCH = {
    "unknown file": (["nothing.py:experiment"], "got 'nothing.py'"),
    "unknown name": (["exp_cli.py:experimnt"], "Did you mean 'experiment'"),
    "unknown parameter": (
        ["exp_cli.py:experiment", "--set", "hiden=3"],
        "Did you mean 'hidden'",
    ),
    "option of neither": (["exp_cli.py:experiment", "--epoch", "3"], "--epoch"),
    "epochs": (["exp_cli.py:experiment", "--epochs", "ten"], "got 'ten'"),
    "run": (["exp_cli.py:experiment", "--resume", "no"], "'no'"),
    "port": (["exp_cli.py:experiment", "--master-port", "70000"], "1<=x<=65535"),
    "hostfile": (["exp_cli.py:experiment", "--hostfile", "hosts"], "byte-order mark"),
    "machine": (["exp_cli.py:experiment", "--include", "node1:0"], "got 'node1'"),
    "two ways": (
        ["exp_cli.py:experiment", "--num_gpus", "2", "--include", "localhost:0"],
        "expected no num_gpus",
    ),
}


@pytest.mark.parametrize("case", LAUNCH)
def test_wrong_usage_of_launch_is_one_line_before_ranks_start(call, case, folder):
    words, text = LAUNCH[case]
    (folder / "hosts").write_text("node0 slots=2\n", encoding="utf-8-sig")
    done = call("launch", *words)
    assert done.exit_code == 2
    assert text in done.output.splitlines()[-1]


def test_launch_shows_at_once_that_it_loads(folder):
    words = ["launch", "exp_cli.py:experiment", "--set", "hiden=3"]

    def launch():
        with pytest.raises(SystemExit):
            main(words)

    assert in_terminal(launch).startswith("loading exp_cli.py:experiment ...")


def test_usage_error_of_ranks_is_shown_by_one_on_each_machine(
    call, folder, monkeypatch
):
    names = {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "node0"}
    for name, text in names.items():
        monkeypatch.setenv(name, text)
    shown = []
    for rank in range(4):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank % 2))
        done = call("fit", "nothing.py:experiment")
        assert done.exit_code == 2
        shown.append("got 'nothing.py'" in done.output)
    assert shown == [True, False, True, False]


def test_resume_of_ranks_on_several_machines_says_how_to_start_them(call, folder):
    words = ["--epochs", "1", "--no-deliver", "--quiet", "--name", "many"]
    assert call("fit", "exp_cli.py:experiment", *words).exit_code == 0
    (past,) = tracking.list_runs()
    path = past.path / "run.json"
    manifest = json.loads(path.read_text())
    assert manifest["extra"]["fit_ranks"]["world_size"] == 1
    manifest["extra"]["fit_ranks"] = {
        "world_size": 8,
        "local_world_size": 4,
        "options": None,
    }
    path.write_text(json.dumps(manifest))
    done = call("resume", "many")
    assert done.exit_code == 2
    assert "expected 8 ranks, 4 on this machine" in done.output
    assert "-m harness.cli resume" in done.output
    # With one rank, it resumes here.
    assert call("resume", "many", "--num-gpus", "1").exit_code == 0
