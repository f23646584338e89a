from __future__ import annotations

import re

import pytest


@pytest.mark.slow
def test_init_writes_a_project_that_trains(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call("init", "mine")
    assert "harness fit train.py:experiment" in done.output
    monkeypatch.chdir(tmp_path / "mine")
    done = call("fit", "train.py:experiment", "--no-deliver", "--epochs", "1")
    assert "Fitted Net" in done.output


def test_init_leaves_a_folder_with_something_in_it_alone(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    call("init", "mine")  # an empty one is taken
    before = {p.name: p.read_text() for p in (tmp_path / "mine").iterdir()}
    assert set(before) == {"train.py", "README.md", ".gitignore"}
    failed = call("init", "mine")
    assert failed.exit_code == 2
    assert "expected a new folder, got 'mine'" in failed.stderr
    assert {p.name: p.read_text() for p in (tmp_path / "mine").iterdir()} == before


@pytest.mark.parametrize(
    ("name", "got"),
    [
        ("train.py", "'train.py'. The files train.py, README.md and .gitignore"),
        ("notes/mine", "'.*notes', a file"),
    ],
)
def test_init_refuses_a_name_that_no_folder_can_have(
    name, got, call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").write_text("mine")
    failed = call("init", name)
    assert failed.exit_code == 2
    assert re.search(f"expected a .*folder, got {got}", failed.stderr)
    assert [path.name for path in tmp_path.iterdir()] == ["notes"]


def test_init_quotes_a_name_with_spaces_and_names_a_folder_it_cannot_write(
    call, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert "next  cd 'my project'\n" in call("init", "my project").output
    failed = call("init", "n" * 300)  # longer than a name of a file may be
    assert failed.exit_code == 1
    assert "expected a folder that can be written, got [Errno" in failed.stderr
