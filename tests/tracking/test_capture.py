from __future__ import annotations

import importlib.metadata
import socket
import subprocess
import sys

import pytest

from tracking import capture
from tracking.capture import (
    MAX_DIFF_BYTES,
    code_state,
    command,
    machine,
    packages,
)


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
    (repo / "train.py").write_text("x = 'ü'\n" * 300_000)
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
    assert code_state(repo) == capture.CodeState(None, "")


def test_command_is_that_of_this_process():
    assert command()[0] == sys.orig_argv[0]


def test_machine_tells_host_and_python():
    found = machine()
    assert found["host"] == socket.gethostname()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(found) == {"host", "user", "python", "platform", "devices"}


def test_machine_of_a_user_without_a_name(monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    assert machine()["user"]


def test_packages_are_those_that_are_installed():
    found = packages()
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
