"""Images, tables, figures and histograms of a run that is recorded."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

import tracking
from tracking import TrackingWarning
from tracking.fork import fork

IMAGE = np.eye(4)


@pytest.fixture(autouse=True)
def _elsewhere(no_repository, monkeypatch):
    """No code to describe, so that a run has only the files of the test."""
    monkeypatch.chdir(no_repository)


@pytest.fixture
def run(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        yield run


def rows(run, what):
    table = tracking.open(run.path).records(what=what)
    return table.select(["set", "index", "step", "epoch", "name"]).to_pylist()


class Figure:
    def savefig(self, path):
        with open(path, "w") as file:  # noqa: PTH123  as matplotlib does
            file.write("drawn")


def test_items_are_recorded_by_series_and_step(run):
    run.log_image("samples", IMAGE, step=5, epoch=2)
    run.log_image("samples", 1 - IMAGE)
    run.log_image("other", IMAGE)
    run.log_image("samples", IMAGE)
    run.log_figure(Figure(), "curve.png", step=7)
    run.log_table("errors", {"a": [1]}, step=3)
    run.log_histogram("grads", [1.0, 2.0], step=4)
    images = rows(run, "images")
    assert [(r["set"], r["index"], r["step"]) for r in images] == [
        ("samples", None, 5),
        ("samples", 1, None),  # numbered by series
        ("other", 1, None),
        ("samples", 2, None),
        ("curve", None, 7),
    ]
    assert images[0]["epoch"] == 2
    assert [(r["set"], r["step"]) for r in rows(run, "tables")] == [("errors", 3)]
    assert [(r["set"], r["step"]) for r in rows(run, "histograms")] == [("grads", 4)]


def test_equal_content_is_one_file(run):
    for step in range(3):
        run.log_image("samples", IMAGE, step=step)
        run.log_image("other", IMAGE, step=step)
        run.log_table("t", {"a": [1]}, step=step)
    names = {row["name"] for row in rows(run, "images") + rows(run, "tables")}
    files = {p.relative_to(run.path / "artifacts").as_posix() for p in all_files(run)}
    assert len(names) == 2
    assert names == files


def all_files(run):
    return [path for path in (run.path / "artifacts").rglob("*") if path.is_file()]


def test_numbers_continue_after_a_rewind(run):
    run.log_image("samples", IMAGE)
    position = run.position()
    run.log_image("samples", 1 - IMAGE)
    run.log_table("t", {"a": [1]})
    run.rewind(position)
    run.log_image("samples", IMAGE)
    assert [row["index"] for row in rows(run, "images")] == [1, 2]
    assert rows(run, "tables") == []


def test_secrets_in_a_table_are_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "hunter2hunter2")
    columns = {
        "text": ["it is hunter2hunter2", "https://me:pw@example.org"],
        "password": ["abc", 3],
        "more": [{"token": "abc"}, ["hunter2hunter2"]],
        "hunter2hunter2": [1, 2],
    }
    with tracking.start(runs_dir=tmp_path, delivery=False) as run:
        run.log_table("t", columns)
    (file,) = all_files(run)
    table = json.loads(file.read_text())
    assert table["columns"] == ["text", "password", "more", "***"]
    assert table["data"] == [
        ["it is ***", "***", {"token": "***"}, 1],
        ["https://example.org", 3, ["***"], 2],
    ]
    (row,) = tracking.open(run.path).records(what="tables").to_pylist()
    assert "hunter2" not in row["payload"]


def test_table_shows_pictures_that_lie_beside_it(run):
    picture = np.zeros((4, 4, 3), np.uint8)
    run.log_table("errors", {"image": [picture, picture], "target": [1, 2]})
    (row,) = tracking.open(run.path).records(what="tables").to_pylist()
    frame = pd.read_json(run.path / "artifacts" / row["name"], orient="split")
    (file,) = {cell["filepath"] for cell in frame["image"]}
    assert (run.path / "artifacts" / file).is_file()
    assert json.loads(row["payload"])[0]["images"] == [file]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: run.log_image("", IMAGE), "expected a name, got ''"),
        (lambda run: run.log_image(3, IMAGE), "expected a string as name, got 3"),
        (lambda run: run.log_image("\ud800", IMAGE), "valid Unicode as name"),
        (lambda run: run.log_image("a", IMAGE, step=1.5), "integer or None as step"),
        (lambda run: run.log_table("a", {}, epoch="1"), "integer or None as epoch"),
        (lambda run: run.log_figure(Figure(), "a.pdf", step=1), "is kept as PNG"),
        (lambda run: run.log_figure(3, "a", step=1), "expected a figure"),
    ],
)
def test_bad_arguments_are_refused_and_leave_nothing(run, call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(run)
    assert tracking.open(run.path).records().num_rows == 0
    assert all_files(run) == []


def test_failing_disk_is_a_warning(run):
    (run.path / "artifacts").write_text("in the way")
    for log in (
        lambda: run.log_image("samples", IMAGE),
        lambda: run.log_table("t", {"a": [1]}),
        lambda: run.log_figure(Figure(), "f", step=1),
    ):
        with pytest.warns(TrackingWarning, match=r"Training continues without it"):
            log()
    run.log_histogram("grads", [1.0])  # has no file
    assert rows(run, "images") == []
    assert len(rows(run, "histograms")) == 1


def test_fork_has_the_files_of_its_rows(run):
    run.log_image("samples", IMAGE)
    run.log_table("t", {"image": [np.zeros((2, 2, 3), np.uint8)]})
    kept = {path.name for path in all_files(run)}
    position = run.position()
    run.log_image("samples", 1 - IMAGE)
    run.finish()
    child = fork(tracking.open(run.path), {0: position}, {})
    assert {path.name for path in all_files(child)} == kept
