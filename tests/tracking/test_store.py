from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

import tracking
from tracking.cli.describe import describe_run
from tracking.durable import overwrite
from tracking.errors import InvalidFileError, RunNotFoundError, TrackingWarning
from tracking.store import (
    FAILURE,
    Manifest,
    create_run_dir,
    find_run,
    find_runs,
    get_first_error,
    get_rank_dir,
    get_status,
    list_rank_dirs,
    run_paths,
    runs_folder,
)


def add(runs, name, experiment=None, when=None):
    path, name = create_run_dir(runs, experiment, name, when)
    Manifest(id=path.name, name=name).write(path)
    return path


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


def test_manifest_comes_back_as_written(tmp_path):
    manifest = Manifest(
        id="x", name="Größe", experiment="e", command=["a", "b c"], extra={"seed": 7}
    )
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert (
        '\n  "extra": {\n    "seed": 7\n  },\n' in (tmp_path / "run.json").read_text()
    )


def test_manifest_may_have_a_number_that_json_has_not(tmp_path):
    Manifest(id="x", name="x", extra={"loss": float("inf")}).write(tmp_path)
    assert Manifest.read(tmp_path).extra == {"loss": float("inf")}


def test_manifest_of_another_version_is_read_or_refused(tmp_path):
    Manifest(id="x", name="x").write(tmp_path)
    found = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**found, "new_field": 1}))
    assert Manifest.read(tmp_path).name == "x"
    (tmp_path / "run.json").write_text(json.dumps({**found, "format": 99}))
    with pytest.raises(ValueError, match=r"expected format 2 or less, got 99"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "expected JSON, got Expecting value"),
        ("{", "expected JSON, got Expecting property name"),
        ('{"id": "\xff"}', "expected JSON, got .*decode"),
        ("[" * 100_000, "expected JSON, got values nested too deeply"),
        ("[]", "expected object in the whole file, got array"),
        ('{"id": "x"}', "expected field 'name' in the whole file, got none"),
        ('{"id": "x", "name": 1}', "expected str in field 'name', got int"),
        (
            '{"id": "x", "name": "x", "resumed": [{}, 1]}',
            r"expected object in field 'resumed\[1\]', got int",
        ),
        (
            '{"id": "x", "name": "x", "packages": {"a": 1}}',
            r"expected str in field 'packages\[\.\.\.\]', got int",
        ),
        ('{"id": "x", "name": "x", "format": "1"}', "expected int in field 'format'"),
    ],
)
def test_manifest_that_is_invalid_names_file_field_and_types(tmp_path, text, problem):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(InvalidFileError, match=rf"run\.json: {problem}.*Restore"):
        Manifest.read(tmp_path)


def test_manifest_keeps_what_strict_json_does_not_have(tmp_path):
    manifest = Manifest(id="x", name="x", extra={"best": float("-inf"), "seed": 2**80})
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest


def test_manifest_absent_is_no_run(tmp_path):
    with pytest.raises(RunNotFoundError, match=r"expected run\.json in it"):
        Manifest.read(tmp_path)


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


def test_list_rank_dirs_is_in_order_of_rank(tmp_path):
    for rank in (10, 2, 0):
        get_rank_dir(tmp_path, rank).mkdir(parents=True)
    (tmp_path / "records" / "other").mkdir()
    assert list(list_rank_dirs(tmp_path)) == [0, 2, 10]
    assert list_rank_dirs(tmp_path / "nowhere") == {}


def test_runs_of_one_second_are_listed_newest_first(tmp_path):
    ids = [f"20261122-235901-{name}-0000" for name in ("zebra", "ant", "mole")]
    for ms, run_id in enumerate(ids):
        (tmp_path / run_id).mkdir()
        created = f"2026-11-22T23:59:01.00{ms}000+00:00"
        Manifest(id=run_id, name=run_id, created=created).write(tmp_path / run_id)
    assert [path.name for path in run_paths(tmp_path)] == ids[::-1]


# ------------------------------------------------------------------ how a run ended


@pytest.fixture
def ranks(tmp_path):
    """Runs of ranks 0 and 1 of one run."""
    first = tracking.start(runs_dir=tmp_path, delivery=False)
    second = tracking.start(runs_dir=tmp_path, rank=1, run_id=first.id, delivery=False)
    yield first, second
    second.finish()
    first.finish()


def test_status_of_a_run_nobody_writes_is_killed(tmp_path):
    manifest = Manifest(id="x", name="x")
    manifest.write(tmp_path)
    assert get_status(tmp_path, manifest) == "killed"
    finished = Manifest(id="x", name="x", status="finished")
    assert get_status(tmp_path, finished) == "finished"
    # It finished after the caller had read its manifest.
    finished.write(tmp_path)
    assert get_status(tmp_path, manifest) == "finished"


def test_rank_that_failed_tells_why_where_rank_0_could_not(ranks):
    first, second = ranks
    second.finish("failed", ValueError("boom"))
    first._journal.close()  # as a kill leaves it: no word in the manifest
    past = tracking.open(first.path)
    assert past.status == "failed"
    assert describe_run(past)["error"] == {
        "type": "ValueError",
        "message": "boom (rank 1)",
    }


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_error_is_the_first_of_all_ranks(ranks, order):
    kinds = [RuntimeError("connection closed"), ValueError("boom")]
    for rank in order:
        ranks[rank].finish("failed", kinds[rank])
    found = get_first_error(ranks[0].path, Manifest.read(ranks[0].path))
    assert found is not None
    assert found["type"] == type(kinds[order[0]]).__name__


def test_killed_rank_is_no_failure(ranks):
    first, second = ranks
    second.finish("killed")
    first._journal.close()
    assert tracking.open(first.path).status == "killed"


def test_resumed_run_removes_failures(ranks, tmp_path):
    first, second = ranks
    second.finish("failed", ValueError("boom"))
    first._journal.close()
    with tracking.start(runs_dir=tmp_path, run_id=first.id, delivery=False):
        pass
    past = tracking.open(first.path)
    assert past.status == "finished"
    assert describe_run(past)["error"] is None
    assert past.manifest.resumed[0]["status"] == "failed"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"message": "torn'])
def test_invalid_failure_file_is_ignored(ranks, text):
    first, second = ranks
    (get_rank_dir(second.path, 1) / FAILURE).write_text(text)
    first._journal.close()
    assert tracking.open(first.path).status == "killed"


# ----------------------------------------------------- one spoilt run among others


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


def test_copy_of_a_run_has_an_id_of_its_own(tmp_path):
    run = add(tmp_path, "amber-fox")
    copy = tmp_path / f"{run.name}-backup"
    shutil.copytree(run, copy)
    assert Manifest.read(run).id == run.name
    assert Manifest.read(copy).id == copy.name
    with pytest.raises(RunNotFoundError, match="with 2"):
        find_run("amber-fox", tmp_path)
    shutil.rmtree(run)
    assert Manifest.read(copy).id == run.name  # renamed, as far as one can tell


@pytest.mark.parametrize("id_", ["..", ".", "", "../other", "/", "a\0b"])
def test_hostile_id_is_no_other_folder(tmp_path, id_):
    path = add(tmp_path, "amber")
    Manifest(id=id_, name="amber").write(path)
    assert Manifest.read(path).id == id_


def test_list_rank_dirs_leaves_out_what_is_no_rank(tmp_path):
    get_rank_dir(tmp_path, 1).mkdir(parents=True)
    for name in ("01", "٣", "-1", "99999999999", "7.arrow"):
        (tmp_path / "records" / name).mkdir()
    (tmp_path / "records" / "2").write_text("a file")
    assert list(list_rank_dirs(tmp_path)) == [1]


FULL = """
import os, sys, warnings
warnings.simplefilter("error")
sys.path.insert(0, sys.argv[1])
import tracking
run = tracking.start(name="x", runs_dir="runs", delivery=False)
run.log_metric("loss", 1.0)
with open("ballast", "wb", buffering=0) as file:
    try:
        while True:
            file.write(bytes(4096))
    except OSError:
        pass
run.finish("failed", ValueError("an error"))
"""


def test_run_on_a_disk_that_was_never_freed_has_ended(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small filesystem")
    try:
        root = str(Path(tracking.__file__).parents[1])
        subprocess.run([sys.executable, "-c", FULL, root], cwd=tmp_path, check=True)
        (run,) = tracking.list_runs(tmp_path / "runs")
        assert run.status == "failed"
        assert run.manifest.error == {"type": "ValueError", "message": "an error"}
        assert run.records().num_rows == 1
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_overwrite_of_a_file_without_the_space_is_refused(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    overwrite(path, b"shorter")
    assert path.read_bytes() == b"shorter"
    with pytest.raises(OSError, match="No space left"):
        overwrite(path, bytes(1 << 20))
    assert path.read_bytes() == b"shorter"
