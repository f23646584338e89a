"""Experiments are found by file and name, and built from settings as their signature says."""

from __future__ import annotations

import sys
from types import NoneType

import pytest
import torch
from torch import nn

import harness
import tracking
from harness.accelerators.single import SingleDevice
from harness.experiment import arguments, build, find, typed
from tests.harness.fakes import At, line_learner, slope

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


@pytest.mark.parametrize("name", ["json.py", "torch.py", "harness.py"])
def test_find_file_that_hides_a_module_is_refused(name, tmp_path):
    (tmp_path / name).write_text("ready = 1")
    before = sys.modules[name.removesuffix(".py")]
    with pytest.raises(harness.ExperimentError, match=r"hides the module .*: rename"):
        find(f"{tmp_path / name}:ready")
    assert sys.modules[name.removesuffix(".py")] is before


def test_find_file_that_fails_tells_its_own_error_and_leaves_no_module(tmp_path):
    (tmp_path / "falls_over.py").write_text("ready = 1 / 0")
    before = list(sys.path)
    with pytest.raises(ZeroDivisionError):
        find(f"{tmp_path / 'falls_over.py'}:ready")
    assert "falls_over" not in sys.modules
    sys.path[:] = before


def test_find_module_that_lacks_another_tells_which(tmp_path):
    (tmp_path / "needs_more.py").write_text("import no_such_thing_anywhere")
    before = list(sys.path)
    sys.path.insert(0, str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_anywhere"):
        find("needs_more:ready")
    sys.path[:] = before


def test_find_file_may_import_its_neighbours(script):
    (script.parent / "neighbour_of_script.py").write_text("value = 5")
    script.write_text(SOURCE + "\nfrom neighbour_of_script import value\n")
    assert find(f"{script}:value") == 5
    sys.modules.pop("neighbour_of_script")


def test_arguments_of_a_function_with_open_end_take_any_name():
    def anything(first, *rest, **more):
        return first

    given = {"first": "1", "width": "2", "name": "x"}
    assert arguments(anything, given) == {"first": 1, "width": 2, "name": "x"}


def test_arguments_from_a_config_keep_their_types():
    def build(sizes: list[int], rate: float):
        return sizes

    assert arguments(build, {"sizes": [1, 2], "rate": 0.5}) == {
        "sizes": [1, 2],
        "rate": 0.5,
    }


def test_experiment_fit_passes_everything_on(tmp_path):
    seen = []

    def note(ctx):
        seen.append((ctx.min_epochs, ctx.max_epochs, ctx.train_data.batch_size))
        seen.append((ctx.valid_data is not None, ctx.accelerator.accumulate))

    made = harness.Experiment(
        learner=line_learner(),
        data=slope(8),
        valid_data=slope(4),
        epochs=(1, 2),
        callbacks=[At("on_fit_begin", note)],
        name="mine",
        experiment="lines",
        seed=5,
        dataloader_options={"batch_size": 3},
        accelerator=SingleDevice("cpu", accumulate=2),
    )
    fitted = made.fit(verbose=False, tracker={"runs_dir": tmp_path, "delivery": False})
    assert seen == [(1, 2, 3), (True, 2)]
    past = tracking.open(fitted.run_path)
    assert (past.name, past.manifest.experiment) == ("mine", "lines")
    assert past.params["seed"] == 5


def test_experiment_fit_without_tracking_records_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made = harness.Experiment(learner=line_learner(), data=slope(2), epochs=1)
    assert made.fit(verbose=False, tracker=False).run_id is None
    assert list(tmp_path.iterdir()) == []
