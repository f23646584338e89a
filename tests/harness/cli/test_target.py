"""What the command line refuses before torch is imported."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from harness.cli.target import check_source, load_target
from harness.errors import ExperimentError

SOURCE = """
import torch
from torch import nn as layers

width, (depth, *rest) = 3, (4, 5)

def build(width: int = 3, *, name: str = "x"):
    inner = 3
    return None

def loose(**more):
    return None

@torch.no_grad()
def wrapped(*given, **more):
    return None

try:
    import numpy as chosen
except ImportError:
    chosen = None

if width:
    def made():
        return None
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "my_experiment.py"
    path.write_text(SOURCE)
    return path


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("build", ["width", "name"]),
        ("loose", ["anything"]),
        ("wrapped", ["anything"]),
        ("made", ["anything"]),
        *((name, []) for name in ("width", "depth", "rest", "layers", "chosen")),
    ],
)
def test_what_a_file_may_define_is_accepted(source, name, settings):
    check_source(f"{source}:{name}", settings, {})


@pytest.mark.parametrize(
    ("folder", "advice"),
    [
        ("pkg/deep", r"as a module, in the folder {}: pkg\.deep\.rel:NAME"),
        (".", "imports others by name: from NAME import"),
    ],
)
def test_relative_import_of_a_file_says_how_to_name_it(folder, advice, tmp_path):
    inner = tmp_path / folder
    inner.mkdir(parents=True, exist_ok=True)
    for package in [inner, inner.parent] if folder != "." else []:
        (package / "__init__.py").touch()
    (inner / "rel.py").write_text("from .net import Net\n")
    with pytest.raises(ImportError, match="relative import") as caught:
        load_target(f"{inner / 'rel.py'}:experiment")
    assert re.search(advice.format(tmp_path), caught.value.__notes__[0])


def test_missing_file_name_and_parameter_are_told_with_the_nearest(source):
    def check(target, *settings, **places):
        check_source(target, settings, places)

    with pytest.raises(ExperimentError, match=r"a Python file.*Did you mean"):
        check(str(source).replace("my", "mi") + ":build")
    with pytest.raises(ExperimentError, match=r"name 'biuld'.*Did you mean 'build'"):
        check(f"{source}:biuld")
    with pytest.raises(ExperimentError, match=r"--set widht: .*Did you mean 'width'"):
        check(f"{source}:build", "widht")
    with pytest.raises(ExperimentError, match=r"--config a.yaml: widht: expected"):
        check(f"{source}:build", "widht", widht="--config a.yaml: widht")
    with pytest.raises(ExperimentError, match=r"expected FILE\.py:NAME"):
        check(str(source))
    source.write_text("def build(:")
    with pytest.raises(SyntaxError):
        check(f"{source}:build")


@pytest.mark.parametrize(
    "line",
    [
        "from os.path import *",
        "globals()['hidden'] = 1",
        "exec('hidden = 1')",
        "def __getattr__(name): return 1",
    ],
)
def test_names_that_a_file_does_not_show_are_left_to_its_import(source, line):
    source.write_text(f"{SOURCE}\n{line}\n")
    check_source(f"{source}:hidden", [], {})


def test_mistakes_are_told_before_torch_is_imported(source, root):
    script = """
import sys
sys.modules["torch"] = None  # an import of it would fail
from harness.cli.main import main
for words in ("no.py:x", f"{sys.argv[1]}:biuld", f"{sys.argv[1]}:build --set widht=1",
              f"{sys.argv[1]}:build --epochs abc", f"{sys.argv[1]}:build --epoch 3",
              f"{sys.argv[1]}:build --valid-every 5x",
              f"{sys.argv[1]}:build --limit-batches 1.5"):
    try:
        main(["fit", *words.split()], standalone_mode=False)
    except Exception as error:
        print(type(error).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, source],
        cwd=source.parent,
        env={"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    names = done.stdout.split()
    assert len(names) == 7, done.stderr
    assert set(names) <= {"UsageError", "NoSuchOption"}, done.stderr


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("train.py:made", "Python file, got 'train.py', a folder. Did you mean 'train"),
        (
            "train.py/train:made",
            "got 'train.py/train'. Did you mean 'train.py/train.py'",
        ),
        ("project:made", "got 'project', a folder. Did you mean 'project/model.py'"),
        ("none.py:made", r"got 'none.py', a path that does not exist\.$"),
    ],
)
def test_target_that_is_a_folder_is_told(target, message, tmp_path, monkeypatch):
    for path in ("train.py/train.py", "project/model.py"):
        (tmp_path / path).parent.mkdir()
        (tmp_path / path).write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ExperimentError, match=message):
        load_target(target)
