"""Runs are listed and found, whatever else lies beside them."""

from __future__ import annotations

import os
from datetime import UTC, datetime

import pytest

import tracking
from tracking.errors import InvalidFileError, RunNotFoundError, TrackingWarning
from tracking.store import Manifest, create_run_dir, find_run, find_runs, run_paths


def add(runs, name, experiment=None, when=None):
    path, name = create_run_dir(runs, experiment, name, when)
    Manifest(id=path.name, name=name).write(path)
    return path


def test_find_run_by_path_id_name_or_part_of_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = tmp_path / "runs"
    one = add(runs, "amber fox")
    two = add(runs, "amber")
    assert find_run(one) == one
    assert find_run(f"runs/{one.name}") == one
    assert find_run(one.name) == one
    assert find_run("amber fox") == one
    assert find_run("amber") == two  # a whole name comes before a part of one
    assert find_run("ber f") == one
    assert find_run(one.name[-9:]) == one


def test_find_runs_by_path_id_name_and_part_at_once(tmp_path):
    paths = [add(tmp_path, f"name {n}") for n in range(4)]
    spoilt = add(tmp_path, "spoilt")
    (spoilt / "run.json").write_text('{"name": 3}')
    refs = [paths[0], paths[1].name, "name 2", "name-3", "name 2", spoilt.name]
    with pytest.warns(TrackingWarning, match="is skipped"):
        found = find_runs(refs, tmp_path)
    assert found == [*paths, paths[2], spoilt]
    with (
        pytest.warns(TrackingWarning, match="is skipped"),
        pytest.raises(RunNotFoundError, match="'nothing'"),
    ):
        find_runs([paths[0], "nothing"], tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        '{"id": "x", "name": "odd", "extra": {"value": NaN}}',
        '{"id": "x", "name": "odd", "user": "\\ud800"}',
        '{"id": "x", "name": "first", "name": "odd"}',
    ],
)
def test_name_of_a_manifest_that_only_python_reads_is_found(tmp_path, text):
    path = add(tmp_path, "a")
    (path / "run.json").write_text(text)
    assert find_runs(["odd"], tmp_path) == [path]
    assert Manifest.read(path).name == "odd"


def test_find_run_part_of_several_names_them(tmp_path):
    one, two = (add(tmp_path, name) for name in ("amber-fox", "amber-owl"))
    with pytest.raises(
        RunNotFoundError, match=r"expected the id or name of one run.*with 2"
    ) as caught:
        find_run("amber", tmp_path)
    assert one.name in str(caught.value)
    assert two.name in str(caught.value)


def test_find_run_mistyped_offers_the_nearest(tmp_path):
    add(tmp_path, "amber-fox")
    add(tmp_path, "quiet-owl")
    with pytest.raises(RunNotFoundError, match=r"got none .* Nearest: amber-fox"):
        find_run("ambr-fox", tmp_path)
    with pytest.raises(RunNotFoundError, match=r"got none .* The latest: .*-quiet-owl"):
        find_run("0" * 40, tmp_path)


def test_find_run_without_any_says_where_it_looked(tmp_path):
    with pytest.raises(RunNotFoundError, match=r"expected a run in .* has no runs yet"):
        find_run("x", tmp_path / "nowhere")


def test_run_paths_are_newest_first_and_runs_only(tmp_path):
    old = add(tmp_path, "b", when=datetime(2025, 1, 1, tzinfo=UTC))
    new = add(tmp_path, "a", when=datetime(2026, 1, 1, tzinfo=UTC))
    (tmp_path / "99999999-no-run").mkdir()
    (tmp_path / "file").write_text("")
    assert run_paths(tmp_path) == [new, old]
    assert run_paths(tmp_path / "nowhere") == []


def test_runs_of_one_second_are_listed_newest_first(tmp_path):
    ids = [f"20261122-235901-{name}-0000" for name in ("zebra", "ant", "mole")]
    for ms, run_id in enumerate(ids):
        (tmp_path / run_id).mkdir()
        created = f"2026-11-22T23:59:01.00{ms}000+00:00"
        Manifest(id=run_id, name=run_id, created=created).write(tmp_path / run_id)
    assert [path.name for path in run_paths(tmp_path)] == ids[::-1]


SPOILT = {
    "empty": "",
    "torn": "{",
    "no object": "[]",
    "deep": '{"id": ' + "[" * 100_000,
    "wrong type": '{"id": "x", "name": "x", "resumed": 3}',
    "newer": '{"id": "x", "name": "x", "format": 99}',
    "no time": '{"id": "x", "name": "x", "created": "yesterday"}',
    "no zone": '{"id": "x", "name": "x", "ended": "2026-11-22T23:59:01"}',
}


def spoil(runs, kind):
    """A run whose run.json is spoilt in a way; its folder."""
    path = add(runs, "spoilt")
    (path / "run.json").unlink()
    if kind == "folder":
        (path / "run.json").mkdir()
    elif kind == "pipe":
        os.mkfifo(path / "run.json")
    elif kind == "dangling":
        (path / "run.json").symlink_to(path / "nowhere")
    elif kind == "huge":
        with (path / "run.json").open("wb") as file:
            file.truncate(1 << 40)
    else:
        (path / "run.json").write_text(SPOILT[kind])
    return path


@pytest.mark.parametrize("kind", [*SPOILT, "folder", "pipe", "huge"])
def test_spoilt_manifest_hides_no_other_run(tmp_path, kind):
    spoilt = spoil(tmp_path, kind)
    good = add(tmp_path, "amber-fox")
    assert find_run(good.name, tmp_path) == good  # no other manifest is read
    assert find_run(spoilt.name, tmp_path) == spoilt
    skipped = r"run\.json.* expected .* is skipped"
    with pytest.warns(TrackingWarning, match=skipped):
        assert list_paths(tmp_path) == [good]
    if kind in {"wrong type", "no time", "no zone"}:  # it still has a name
        assert find_run("amber", tmp_path) == good
    else:
        with pytest.warns(TrackingWarning, match=skipped):
            assert find_run("amber", tmp_path) == good
        with pytest.warns(TrackingWarning, match=skipped):
            assert find_run("spoil", tmp_path) == spoilt
    with pytest.raises(InvalidFileError, match=r"run\.json.* expected"):
        Manifest.read(spoilt)


def list_paths(runs):
    return [run.path for run in tracking.list_runs(runs)]


def test_manifest_that_is_a_dangling_link_is_no_run_but_is_found(tmp_path):
    spoilt = spoil(tmp_path, "dangling")
    assert find_run(spoilt.name, tmp_path) == spoilt
    assert list_paths(tmp_path) == []


def test_id_comes_before_a_name_that_says_the_same(tmp_path):
    one = add(tmp_path, "amber")
    add(tmp_path, one.name)
    assert find_run(one.name, tmp_path) == one


@pytest.mark.parametrize("ref", ["", "a\0b", "~nobody-has-this-name/x", "."])
def test_odd_reference_is_no_run(tmp_path, ref, monkeypatch):
    monkeypatch.chdir(tmp_path)
    add(tmp_path / "runs", "amber")
    with pytest.raises(RunNotFoundError, match=r"expected a run in .*runs|with 1:"):
        find_run(ref)


def test_link_to_a_run_is_the_run_and_is_listed_once(tmp_path):
    runs = tmp_path / "runs"
    run = add(runs, "amber-fox")
    (runs / "latest").symlink_to(run.name)
    (runs / "newest").symlink_to(run)
    elsewhere = add(tmp_path / "big-disk", "quiet-owl")
    (runs / elsewhere.name).symlink_to(elsewhere)
    assert sorted(run_paths(runs)) == sorted([run, runs / elsewhere.name])
    assert find_run("latest", runs) == run
    assert find_run("amber", runs) == run
    assert find_run("quiet", runs) == elsewhere
    assert Manifest.read(runs / "latest").id == run.name
