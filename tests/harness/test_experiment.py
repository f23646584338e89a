"""Experiments are found by file and name, and built from settings as their signature says."""

from __future__ import annotations

import sys
from types import NoneType

import pytest
import torch
from torch import nn

import harness
from harness.experiment import arguments, build, find, typed

SOURCE = """
import torch
from torch import nn
import harness

learner = harness.setup(nn.Identity, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
ready = harness.Experiment(learner=learner, data=torch.zeros(4, 1), epochs=3)

def build(width: int = 2, rate: float | None = None, name: str = "a"):
    return harness.Experiment(learner=learner, data=torch.zeros(4, width), name=name)

def wrong():
    return 3
"""


@pytest.fixture
def script(tmp_path, request):
    path = tmp_path / f"script_{request.node.name.split('[')[0]}.py"
    path.write_text(SOURCE)
    before = list(sys.path)
    yield path
    sys.path[:] = before
    sys.modules.pop(path.stem, None)


def test_find_file_and_name_gives_the_object(script):
    assert find(f"{script}:ready").epochs == 3


def test_find_module_and_name_gives_the_object():
    assert find("torch.nn:Identity") is nn.Identity


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("nothing", "expected FILE.py:NAME or MODULE:NAME, got 'nothing'"),
        ("missing.py:ready", "found no 'missing.py'"),
        ("no_such_module_at_all:ready", "found no 'no_such_module_at_all'"),
        ("torch.nn:Identty", r"found no such name\. Did you mean 'Identity'"),
    ],
)
def test_find_what_is_not_there_is_told(target, match):
    with pytest.raises(harness.ExperimentError, match=match):
        find(target)


def test_find_similar_file_is_offered(script):
    wrong = script.with_name(script.name.replace("script", "scirpt"))
    with pytest.raises(harness.ExperimentError, match=r"Did you mean '.*script_"):
        find(f"{wrong}:ready")


def test_build_function_takes_settings_by_signature(script):
    made = build(find(f"{script}:build"), {"width": "5", "name": "7"})
    assert made.data.shape == (4, 5)
    assert made.name == "7"


def test_build_experiment_with_settings_is_refused(script):
    with pytest.raises(harness.ExperimentError, match="expected a function"):
        build(find(f"{script}:ready"), {"width": "1"})


def test_build_other_result_is_refused(script):
    with pytest.raises(harness.ExperimentError, match="Experiment back, got 3"):
        build(find(f"{script}:wrong"), {})


def test_build_something_else_is_refused():
    with pytest.raises(harness.ExperimentError, match="an Experiment or a function"):
        build(3, {})


def test_arguments_unknown_name_offers_the_nearest(script):
    with pytest.raises(harness.ExperimentError, match=r"Did you mean 'width'.*It has"):
        arguments(find(f"{script}:build"), {"widht": "1"})


def test_arguments_without_default_must_be_given():
    def needs(rows: int):
        return rows

    with pytest.raises(harness.ExperimentError, match=r"Give --set rows=VALUE"):
        arguments(needs, {})
    assert arguments(needs, {"rows": "3"}) == {"rows": 3}


@pytest.mark.parametrize(
    ("value", "hint", "found"),
    [
        ("3", int, 3),
        ("0.5", float, 0.5),
        ("1e-3", float, 0.001),
        ("3", str, "3"),
        ("true", bool, True),
        ("No", bool, False),
        ("none", int | None, None),
        ("4", int | None, 4),
        ("[1, 2]", list, [1, 2]),
        ("word", NoneType, "word"),
        (7, str, 7),
    ],
)
def test_typed_text_follows_the_annotation(value, hint, found):
    got = typed("name", value, hint)
    assert got == found
    assert type(got) is type(found)


@pytest.mark.parametrize(
    ("value", "hint", "match"),
    [("x", int, "expected int, got 'x'"), ("maybe", bool, "expected true or false")],
)
def test_typed_text_that_does_not_fit_is_told(value, hint, match):
    with pytest.raises(harness.ExperimentError, match=match):
        typed("name", value, hint)


def test_experiment_without_learner_is_refused():
    with pytest.raises(TypeError, match="expected a Learner, got 3"):
        harness.Experiment(learner=3, data=torch.zeros(1))


def test_experiment_set_opt_hparams_reaches_its_learner(script):
    made = find(f"{script}:ready").set_opt_hparams(lr=0.5)
    assert made.learner.opt_hparams == {"lr": 0.5}
    assert find(f"{script}:ready").learner.opt_hparams == {}
