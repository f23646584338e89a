"""The manifest of a run, and files of JSON that are spoilt."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import tracking
from tracking.durable import overwrite
from tracking.errors import InvalidFileError, RunNotFoundError
from tracking.store import Manifest, create_run_dir, find_run


def add(runs, name, experiment=None, when=None):
    path, name = create_run_dir(runs, experiment, name, when)
    Manifest(id=path.name, name=name).write(path)
    return path


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
