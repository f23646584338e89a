from __future__ import annotations

import gc
import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tracking
from tracking import capture
from tracking.capture import MAX_DIFF_BYTES, code_state, command, machine, packages
from tracking.delivery.summaries import write_summaries
from tracking.store import Manifest


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    line = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(line, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repo(tmp_path):
    git(tmp_path, "init", "-q", "-b", "work")
    (tmp_path / "train.py").write_text("lr = 1\n")
    (tmp_path / "prod.env").write_text("A=1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "remote", "add", "origin", "https://me:hunter2@example.org/x.git")
    return tmp_path


def test_code_state_of_a_clean_repository(repo):
    state = code_state(repo)
    assert state.summary == {
        "commit": git(repo, "rev-parse", "HEAD").strip(),
        "branch": "work",
        "dirty": False,
        "remote": "https://example.org/x.git",
    }
    assert state.diff == ""


def test_code_state_dirty_has_diff_and_names_of_untracked_files(repo):
    (repo / "train.py").write_text("lr = 2\n")
    (repo / "notes.txt").write_text("not for others")
    (repo / "below").mkdir()
    state = code_state(repo / "below")
    assert state.summary is not None
    assert state.summary["dirty"] is True
    assert "-lr = 1\n+lr = 2\n" in state.diff
    assert "# untracked: notes.txt\n" in state.diff
    assert "not for others" not in state.diff


def test_code_state_diff_leaves_out_files_that_hold_secrets(repo):
    (repo / "prod.env").write_text("PASSWORD=hunter2\n")
    state = code_state(repo)
    assert state.summary is not None
    assert state.summary["dirty"] is True
    assert "hunter2" not in state.diff


def test_code_state_long_diff_is_cut(repo):
    (repo / "train.py").write_text("x = 'ü'\n" * 120_000)
    diff = code_state(repo).diff
    assert len(diff.encode()) < MAX_DIFF_BYTES + 100
    assert "# cut here:" in diff


def test_code_state_many_untracked_files_are_counted(repo):
    for i in range(250):
        (repo / f"file-{i}").write_text("")
    diff = code_state(repo).diff
    assert diff.count("# untracked: ") == 200
    assert diff.endswith("# and 50 more\n")


def test_code_state_detached_or_before_the_first_commit(repo, tmp_path_factory):
    git(repo, "checkout", "-q", "--detach")
    state = code_state(repo)
    assert state.summary is not None
    assert state.summary["branch"] is None
    fresh = tmp_path_factory.mktemp("fresh")
    git(fresh, "init", "-q", "-b", "work")
    state = code_state(fresh)
    assert state.summary == {
        "commit": None,
        "branch": "work",
        "dirty": False,
        "remote": None,
    }


def test_code_state_outside_a_repository_is_none(tmp_path):
    assert code_state(tmp_path) == capture.CodeState(None, "")


def test_code_state_without_git_is_none(repo, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    assert code_state(repo) == capture.CodeState(None, "")


def test_code_state_of_a_slow_git_is_given_up(repo, tmp_path_factory, monkeypatch):
    slow = tmp_path_factory.mktemp("bin")
    (slow / "git").write_text("#!/bin/sh\nexec sleep 60\n")
    (slow / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow}:/usr/bin:/bin")
    assert code_state(repo, timeout_s=0.3) == capture.CodeState(None, "")


def test_command_is_that_of_this_process():
    assert command()[0] == sys.orig_argv[0]


def test_machine_tells_host_and_python():
    found = machine()
    assert found["host"] == socket.gethostname()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found) == {"host", "user", "python", "devices"}


def test_machine_of_a_user_without_a_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert machine()["user"]


def test_packages_are_those_that_are_installed():
    found = packages(sys.path)
    for name in ("pyarrow", "numpy", "pytest"):
        assert found[name] == importlib.metadata.version(name)


def test_code_state_diff_leaves_out_settings_with_secrets_and_masks_code(repo):
    files = {
        "login.yaml": "api_key: {}\n",
        "model.yaml": "num_tokens: {}\n",
        "client.py": "password = '{}'\n",
    }
    for name, text in files.items():
        (repo / name).write_text(text.format("before"))
    git(repo, "add", ".")
    git(repo, "commit", "-q", "-m", "settings")
    for name, text in files.items():
        (repo / name).write_text(text.format("hunter22"))
    diff = code_state(repo).diff
    assert "# left out, it seems to hold secrets: login.yaml" in diff
    assert "+num_tokens: hunter22\n" in diff
    assert "+password = '***'\n" in diff
    assert diff.count("hunter22") == 1


@pytest.mark.parametrize(
    "setting",
    [
        "filter.own.clean",
        "filter.own.process",
        "diff.own.textconv",
        "diff.own.command",
        "core.fsmonitor",
    ],
)
def test_code_state_runs_no_program_of_gits_settings(setting, repo, tmp_path_factory):
    told = tmp_path_factory.mktemp("told") / "told"
    program = told.with_name("program")
    program.write_text(f"#!/bin/sh\necho ran >> {told}\ncat\n")
    program.chmod(0o755)
    git(repo, "config", setting, str(program))
    git(repo, "config", "filter.own.required", "true")
    (repo / ".git" / "info").mkdir(exist_ok=True)
    (repo / ".git" / "info" / "attributes").write_text("*.py filter=own diff=own\n")
    (repo / "train.py").write_text("lr = 2\n")
    state = code_state(repo)
    assert "-lr = 1\n+lr = 2\n" in state.diff
    assert state.summary is not None
    assert state.summary["dirty"] is True
    assert not told.exists()


# --------------------------------------------------------------- beside training

STARTS = """
import os, signal, sys
import tracking
count, end = int(sys.argv[1]), sys.argv[2]
for i in range(count):
    run = tracking.start(runs_dir="runs", delivery=False)
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    run.finish()
"""


@pytest.fixture
def git_calls(tmp_path_factory, monkeypatch):
    """File in which a git that is found first notes the commands that it gets."""
    folder = tmp_path_factory.mktemp("bin")
    real = shutil.which("git")
    (folder / "git").write_text(
        f'#!/bin/sh\necho "$@" >> {folder}/calls\nexec {real} "$@"\n'
    )
    (folder / "git").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder / "calls"


def run_program(repo, *arguments):
    root = str(Path(tracking.__file__).parents[1])
    return subprocess.run(
        [sys.executable, "-c", STARTS, *arguments],
        cwd=repo,
        env={**os.environ, "PYTHONPATH": root},
        check=False,
    ).returncode


def test_runs_of_a_program_look_at_its_code_once(repo, git_calls):
    (repo / "train.py").write_text("lr = 2\n")
    assert run_program(repo, "3", "finished") == 0
    calls = git_calls.read_text().splitlines()
    assert sum("rev-parse" in call for call in calls) == 1
    runs = tracking.list_runs(repo / "runs")
    assert len(runs) == 3
    commit = git(repo, "rev-parse", "HEAD").strip()
    for run in runs:
        manifest = Manifest.read(run.path)
        assert manifest.git is not None
        assert (manifest.git["commit"], manifest.git["dirty"]) == (commit, True)
        assert manifest.packages["pyarrow"]
        assert manifest.platform
        assert "+lr = 2" in (run.path / "artifacts" / "code.diff").read_text()
        assert not (run.path / "environment.json").exists()


def test_program_killed_at_once_leaves_on_record_what_it_ran_on(repo, until):
    (repo / "train.py").write_text("lr = 2\n")
    assert run_program(repo, "1", "killed") == -signal.SIGKILL
    (path,) = (repo / "runs").glob("2*")
    until((path / "environment.json").exists)
    manifest = Manifest.read(path)
    assert manifest.git is not None
    assert manifest.git["dirty"] is True
    assert manifest.packages["pyarrow"]
    write_summaries(path)
    assert "+lr = 2" in (path / "artifacts" / "code.diff").read_text()
    # A resume keeps it, and notes what it runs on itself.
    (repo / "train.py").write_text("lr = 3\n")
    with tracking.start(run_id=path.name, runs_dir=repo / "runs", delivery=False):
        pass
    assert "+lr = 2" in (path / "artifacts" / "code.diff").read_text()
    manifest = Manifest.read(path)
    assert manifest.packages["pyarrow"]
    assert "git" in manifest.resumed[0]


def test_environment_that_is_damaged_spoils_no_manifest(record):
    run = record()
    run.run.finish()
    manifest = Manifest.read(run.path)
    manifest.packages = {}
    manifest.write(run.path)
    (run.path / "environment.json").write_text('{"started": 3')
    assert Manifest.read(run.path).packages == {}


def test_code_is_looked_at_for_each_run_at_a_prompt(repo, monkeypatch, until):
    monkeypatch.chdir(repo)
    with tracking.start(runs_dir="runs", delivery=False) as run:
        pass
    assert run.manifest.git["dirty"] is False  # type: ignore[index]
    assert capture.recall(repo, save_diff=True) is not None
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    (repo / "train.py").write_text("lr = 2\n")
    assert capture.recall(repo, save_diff=True) is None
    with tracking.start(runs_dir="runs", delivery=False) as run:
        pass
    until(lambda: Manifest.read(run.path).git is not None)
    assert Manifest.read(run.path).git["dirty"] is True  # type: ignore[index]


def interrupt(*_):
    raise KeyboardInterrupt


# Ctrl-C may come between the opening of a file and the block that closes it.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("place", ["capture", "disk"])
def test_ctrl_c_while_a_run_ends_leaves_it_ended(place, repo, monkeypatch):
    monkeypatch.chdir(repo)
    capture._captures.clear()
    run = tracking.start(runs_dir="runs", delivery=False)
    run.log_metric("loss", 0.5)
    assert run._capture is not None
    run._capture.wait(60.0)
    if place == "capture":
        monkeypatch.setattr(run._capture, "wait", interrupt)
    else:  # while the last rows are sealed, as another thread could be told by Ctrl-C
        sealer = run._journal._sealer
        seal = sealer._seal

        def seal_slowly(block, *, must):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            return seal(block, must=must)

        monkeypatch.setattr(sealer, "_seal", seal_slowly)
    with pytest.raises(KeyboardInterrupt):
        run.finish()
    gc.collect()
    assert Manifest.read(run.path).status == "finished"
    past = tracking.open(run.path)
    assert past.records(what="metrics").num_rows == 1
    with tracking.start(run_id=run.id, runs_dir="runs", delivery=False):
        pass
