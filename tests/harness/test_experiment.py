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
from harness.cli.target import load_target
from harness.experiment import build_experiment, parse_arguments, parse_value
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


def test_load_target_file_and_name_gives_the_object(script):
    assert load_target(f"{script}:ready").epochs == 3


def test_load_target_module_and_name_gives_the_object():
    assert load_target("torch.nn:Identity") is nn.Identity


@pytest.mark.parametrize(
    ("target", "match"),
    [
        ("nothing", "expected FILE.py:NAME or MODULE:NAME, got 'nothing'"),
        ("missing.py:ready", "got 'missing.py'"),
        ("no_such_module_at_all:ready", "got 'no_such_module_at_all'"),
        ("torch.nn:Identty", r"found no such name\. Did you mean 'Identity'"),
    ],
)
def test_load_target_that_does_not_exist_raises(target, match):
    with pytest.raises(harness.ExperimentError, match=match):
        load_target(target)


def test_load_target_similar_file_is_offered(script):
    wrong = script.with_name(script.name.replace("script", "scirpt"))
    with pytest.raises(harness.ExperimentError, match=r"Did you mean '.*script_"):
        load_target(f"{wrong}:ready")


def test_build_experiment_function_takes_settings_by_signature(script):
    made = build_experiment(load_target(f"{script}:build"), {"width": "5", "name": "7"})
    assert isinstance(made.data, torch.Tensor)
    assert made.data.shape == (4, 5)
    assert made.name == "7"


def test_build_experiment_experiment_with_settings_is_refused(script):
    with pytest.raises(harness.ExperimentError, match="expected a function"):
        build_experiment(load_target(f"{script}:ready"), {"width": "1"})


def test_build_experiment_other_result_is_refused(script):
    with pytest.raises(
        harness.ExperimentError, match=r"return a harness\.Experiment, got 3"
    ):
        build_experiment(load_target(f"{script}:wrong"), {})


def test_build_experiment_something_else_is_refused():
    with pytest.raises(harness.ExperimentError, match="an Experiment or a function"):
        build_experiment(3, {})


def test_parse_arguments_unknown_name_offers_the_nearest(script):
    with pytest.raises(
        harness.ExperimentError, match=r"Did you mean 'width'.*Its parameters"
    ):
        parse_arguments(load_target(f"{script}:build"), {"widht": "1"})


def test_parse_arguments_without_default_must_be_given():
    def needs(rows: int):
        return rows

    with pytest.raises(harness.ExperimentError, match=r"Add --set rows=VALUE"):
        parse_arguments(needs, {})
    assert parse_arguments(needs, {"rows": "3"}) == {"rows": 3}


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
def test_parse_value_text_follows_the_annotation(value, hint, found):
    got = parse_value("name", value, hint)
    assert got == found
    assert type(got) is type(found)


@pytest.mark.parametrize(
    ("value", "hint", "match"),
    [("x", int, "expected int, got 'x'"), ("maybe", bool, "expected true or false")],
)
def test_parse_value_of_wrong_text_raises(value, hint, match):
    with pytest.raises(harness.ExperimentError, match=match):
        parse_value("name", value, hint)


def test_experiment_without_learner_is_refused():
    with pytest.raises(TypeError, match="expected a Learner, got 3"):
        harness.Experiment(learner=3, data=torch.zeros(1))


def test_experiment_set_opt_hparams_reaches_its_learner(script):
    made = load_target(f"{script}:ready").set_opt_hparams(lr=0.5)
    assert made.learner.opt_hparams == {"lr": 0.5}
    assert load_target(f"{script}:ready").learner.opt_hparams == {}


@pytest.mark.parametrize("name", ["json.py", "torch.py", "harness.py"])
def test_load_target_file_that_hides_a_module_is_refused(name, tmp_path):
    (tmp_path / name).write_text("ready = 1")
    before = sys.modules[name.removesuffix(".py")]
    with pytest.raises(harness.ExperimentError, match=r"hides the module .*: rename"):
        load_target(f"{tmp_path / name}:ready")
    assert sys.modules[name.removesuffix(".py")] is before


def test_load_target_file_that_fails_tells_its_own_error_and_leaves_no_module(tmp_path):
    (tmp_path / "falls_over.py").write_text("ready = 1 / 0")
    before = list(sys.path)
    with pytest.raises(ZeroDivisionError):
        load_target(f"{tmp_path / 'falls_over.py'}:ready")
    assert "falls_over" not in sys.modules
    sys.path[:] = before


def test_load_target_module_that_lacks_another_tells_which(tmp_path):
    (tmp_path / "needs_more.py").write_text("import no_such_thing_anywhere")
    before = list(sys.path)
    sys.path.insert(0, str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_thing_anywhere"):
        load_target("needs_more:ready")
    sys.path[:] = before


def test_load_target_file_may_import_its_neighbours(script):
    (script.parent / "neighbour_of_script.py").write_text("value = 5")
    script.write_text(SOURCE + "\nfrom neighbour_of_script import value\n")
    assert load_target(f"{script}:value") == 5
    sys.modules.pop("neighbour_of_script")


def test_parse_arguments_of_a_function_with_open_end_take_any_name():
    def anything(first, *rest, **more):
        return first

    given = {"first": "1", "width": "2", "name": "x"}
    assert parse_arguments(anything, given) == {"first": 1, "width": 2, "name": "x"}


def test_parse_arguments_from_a_config_keep_their_types():
    def build(sizes: list[int], rate: float):
        return sizes

    assert parse_arguments(build, {"sizes": [1, 2], "rate": 0.5}) == {
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
        mlflow_experiment="lines",
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


def test_setting_of_a_file_is_told_as_one_of_the_file(script):
    build = load_target(f"{script}:build")
    places = {"widht": "--config c.yaml: widht", "width": "--config c.yaml: width"}
    with pytest.raises(
        harness.ExperimentError, match=r"^--config c\.yaml: widht: expected"
    ):
        parse_arguments(build, {"widht": 1}, places)
    with pytest.raises(
        harness.ExperimentError, match=r"^--config c\.yaml: width: expected int"
    ):
        parse_arguments(build, {"width": "x"}, places)
    with pytest.raises(harness.ExperimentError, match=r"^--set widht: expected"):
        parse_arguments(build, {"widht": 1})
