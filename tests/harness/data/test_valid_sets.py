"""Several sets of validation data, by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import harness
import tracking
from harness.callbacks import EarlyStopping, SanityCheck
from harness.data.valid_sets import name_sets
from tests.harness.fakes import At, line_learner, slope

SETS = {"clean": slope(4), "shifted": TensorDataset(*slope(6))}


def fit(valid_data: Any = SETS, **options: Any) -> harness.Fitted:
    options = {"tracker": False, "epochs": 2, "verbose": False} | options
    return line_learner().fit(slope(12), valid_data=valid_data, seed=1, **options)


def test_sets_are_recorded_by_name(tmp_path: Any) -> None:
    look: list[tuple[str, str, int]] = []
    seen = At(
        "on_valid_begin",
        lambda ctx: look.append((ctx.valid_name, ctx.split, len(ctx.valid_data))),
    )
    tracker = {"runs_dir": tmp_path, "delivery": False}
    fitted = fit(callbacks=[seen, SanityCheck()], tracker=tracker)
    assert look == [("clean", "clean", 1), ("shifted", "shifted", 1)] * 2
    frame = fitted.get_metrics()
    assert list(frame["set"].unique()) == ["train", "clean", "shifted"]
    for name, data in SETS.items():
        x, y = data if isinstance(data, tuple) else data.tensors  # type: ignore[attr-defined]
        loss = torch.nn.functional.mse_loss(fitted.model(x), y)
        last = fitted.records["metrics"][name][-1]["loss"]
        assert last == pytest.approx(loss.item())
    run = tracking.open(fitted.run_path)
    wide = run.wide()
    assert wide.column_names == ["index", "train/loss", "clean/loss", "shifted/loss"]
    assert wide["clean/loss"].null_count == 0
    inputs = str(run.records(what="inputs")["payload"].to_pylist())
    assert all(f'"{name}"' in inputs for name in ("train", *SETS))
    assert "shifted" in str(fitted)


def test_states_of_sets_are_apart() -> None:

    metric = {"rows": lambda pred, target: float(len(pred))}
    learner = line_learner(metrics=metric)
    fitted = learner.fit(slope(12), 1, SETS, tracker=False, verbose=False)
    found = fitted.records["metrics"]
    assert found["clean"][0]["rows"] == 4
    assert found["shifted"][0]["rows"] == 6


def test_evaluation_of_sets_has_a_value_for_each() -> None:
    fitted = fit(None)
    found = fitted.evaluate(SETS)
    alone = {name: fitted.evaluate(data)["loss"] for name, data in SETS.items()}
    assert {name: found[f"{name}/loss"] for name in SETS} == alone
    assert list(found.get_metrics()["set"]) == ["clean", "shifted"]
    assert "shifted" in str(found)
    with pytest.raises(KeyError):
        found["loss"]


def test_monitor_names_a_set() -> None:
    stop = EarlyStopping("clean/loss")
    fit(callbacks=[stop])
    assert stop.best < float("inf")
    with pytest.raises(ValueError, match=r"a set of this fit, got 'valid/loss'"):
        fit(callbacks=[EarlyStopping()])


@pytest.mark.parametrize(
    ("data", "names"),
    [
        (None, []),
        (slope(4), ["valid"]),
        (SETS, ["clean", "shifted"]),
        ({"valid": slope(4), "a-b.c_1": [*slope(3)]}, ["valid", "a-b.c_1"]),
        ({"x": DataLoader(TensorDataset(*slope(4)))}, ["x"]),
    ],
)
def test_sets_are_named(data: Any, names: list[str]) -> None:
    assert list(name_sets(data, "valid_data")) == names


def test_dict_of_tensors_is_one_set_where_it_can_be_nothing_else() -> None:
    x, y = slope(4)
    columns = {"x": x, "labels": y}
    assert name_sets(columns, "data") == {"valid": columns}
    assert name_sets(columns, "valid_data", columns) == {"valid": columns}
    nested = {"x": (x, x), "labels": (y, y)}
    assert name_sets(nested, "valid_data", nested) == {"valid": nested}
    assert list(name_sets(nested, "valid_data", (x, y))) == ["x", "labels"]
    named = {"clean": columns}
    assert name_sets(named, "valid_data", columns) == named


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ({}, ValueError, "at least one set of data, got an empty dict"),
        ({"x": slope(4)[0]}, TypeError, r"got bare tensors for \['x'\]"),
        ({"x": slope(4), "y": slope(4)[0].numpy()}, TypeError, r"tensors for \['y'\]"),
        ({"train": slope(4)}, ValueError, "'train' is taken"),
        ({1: slope(4)}, TypeError, "expected names of sets, got 1"),
        ({"a/b": slope(4)}, ValueError, "Use letters, digits"),
        ({"": slope(4)}, ValueError, "Use letters, digits"),
        ({"a": 0.2}, TypeError, r"valid_data\['a'\]: expected a tensor"),
        ({"a": (slope(4)[0], slope(3)[0])}, ValueError, r"valid_data\['a'\]: expected"),
    ],
)
def test_what_names_no_sets_is_refused(data: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fit(data)
