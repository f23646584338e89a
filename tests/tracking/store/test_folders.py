"""The folder of runs, and the folders in a run."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from tracking.store import create_run_dir, get_rank_dir, list_rank_dirs, runs_folder


def test_runs_folder_is_argument_then_variable_then_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_RUNS", raising=False)
    assert runs_folder() == tmp_path / "runs"
    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path / "there"))
    assert runs_folder() == tmp_path / "there"
    assert runs_folder("mine") == tmp_path / "mine"


def test_make_run_id_sorts_by_time_and_says_its_name(tmp_path):
    ids = [
        create_run_dir(
            tmp_path, "Ziffern & Größe", name, datetime(2026, 1, 1, h, tzinfo=UTC)
        )
        for h, name in ((1, None), (2, "zuerst"), (3, "anders"))
    ]
    names = [path.name for path, _ in ids]
    assert names == sorted(names)
    assert names[0].startswith("20260101-010000-ziffern-groe-")
    assert names[1].startswith("20260101-020000-zuerst-")
    assert ids[0][1].startswith("Ziffern & Größe-")
    assert [name for _, name in ids[1:]] == ["zuerst", "anders"]
    assert all(path.is_dir() for path, _ in ids)


def test_make_run_name_without_a_letter_of_ascii_has_a_folder_too(tmp_path):
    path, name = create_run_dir(tmp_path, None, "数字")
    assert path.name.split("-")[2] == "run"
    assert name == "数字"


def test_make_run_where_nothing_can_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError,
        match=r"start\(runs_dir='.*file'\): expected a writable folder.* HARNESS_RUNS",
    ):
        create_run_dir(tmp_path / "file", None, None)


def test_list_rank_dirs_is_in_order_of_rank(tmp_path):
    for rank in (10, 2, 0):
        get_rank_dir(tmp_path, rank).mkdir(parents=True)
    (tmp_path / "records" / "other").mkdir()
    assert list(list_rank_dirs(tmp_path)) == [0, 2, 10]
    assert list_rank_dirs(tmp_path / "nowhere") == {}


def test_list_rank_dirs_leaves_out_what_is_no_rank(tmp_path):
    get_rank_dir(tmp_path, 1).mkdir(parents=True)
    for name in ("01", "٣", "-1", "99999999999", "7.arrow"):
        (tmp_path / "records" / name).mkdir()
    (tmp_path / "records" / "2").write_text("a file")
    assert list(list_rank_dirs(tmp_path)) == [1]


def test_runs_folder_of_a_removed_working_folder_is_refused(tmp_path, monkeypatch):
    (gone := tmp_path / "gone").mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(
        FileNotFoundError, match="expected a working folder that exists"
    ):
        runs_folder("runs")
    assert runs_folder(tmp_path) == tmp_path
