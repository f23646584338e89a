"""Fits that start from weights: of a result, another model, a state dict or a file."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import harness
import tracking
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint
from harness.checkpoint.weights import save_weights
from harness.errors import CheckpointError
from tests.harness.exact import BATCH, Case, X, Y, differences
from tests.harness.exact import fit as fit_case
from tests.harness.fakes import Line, line_learner, points, slope

OFF: dict[str, Any] = {
    "tracker": False,
    "verbose": False,
    "dataloader_options": {"batch_size": 2, "shuffle": False},
}


class Net(nn.Module):
    """A body, and a head with as many outputs as asked."""

    ctx: Any

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, classes)

    def forward(self, x):
        return self.head(self.body(x))


def learner(classes: int = 3) -> harness.Learner:
    made = harness.setup(Net, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD)
    return made.set_hparams(classes=classes).set_opt_hparams(lr=0.1)


@pytest.fixture(scope="module")
def fitted() -> harness.Fitted:
    return learner().fit(points(8), 1, seed=0, **OFF)


class First(harness.Callback):
    """Keeps the weights at the beginning of a fit."""

    def on_fit_begin(self) -> None:
        self.state = copy.deepcopy(self.ctx.model.state_dict())


def start_of(made: harness.Learner, **options: Any) -> dict[str, torch.Tensor]:
    first = First()
    made.fit(points(8), 1, callbacks=[first], **OFF, **options)
    return first.state


def is_same(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# ------------------------------------------------------------------------- fitted.fit


def test_fitted_trains_a_copy_further_with_a_new_optimizer():
    x, y = slope(6)
    model = Line()
    for _ in range(2):  # each fit has an optimizer of its own, without momentum yet
        opt = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        for _ in range(2):
            for rows in range(0, 6, 2):
                part = slice(rows, rows + 2)
                nn.functional.mse_loss(model(x[part]), y[part]).backward()
                opt.step()
                opt.zero_grad()
    first = line_learner().set_opt_hparams(momentum=0.9).fit((x, y), 2, **OFF)
    before = copy.deepcopy(first.model.state_dict())
    second = first.fit((x, y), 2, **OFF)
    assert torch.equal(second.model.w, model.w)
    assert is_same(first.model.state_dict(), before)
    assert len(second.records["metrics"]["train"]) == 2
    assert len(first.records["metrics"]["train"]) == 2
    assert second.learner is first.learner
    assert second.start is not None
    assert second.start.is_complete


def test_further_fit_may_be_as_long_as_its_steps():
    first = line_learner().fit(slope(2), 1, **OFF)
    second = first.fit(slope(2), max_steps=12, **OFF)
    assert len(second.records["metrics"]["train"]) == 12


def test_what_the_user_changed_about_the_model_goes_on():
    first = learner().fit(points(8), 1, **OFF)
    first.model.head = nn.Linear(4, 5)
    first.model.body.requires_grad_(False)
    weight = first.model.body[0].weight.clone()  # type: ignore[index]
    second = first.fit(points(8), 1, **OFF)
    assert second.model.head.out_features == 5
    assert torch.equal(second.model.body[0].weight, weight)  # type: ignore[index]


class Temperature(nn.Module):
    """A loss that learns its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, pred, target):
        return nn.functional.mse_loss(pred * self.scale, target)


def test_loss_goes_on_with_what_it_learned():
    first = line_learner(loss=Temperature()).fit(slope(4), 1, **OFF)
    learned = first.loss.scale.item()
    second = first.fit(slope(4), 1, **OFF)
    assert first.loss.scale.item() == learned != 1
    assert second.loss.scale.item() != learned
    found = []

    class Look(harness.Callback):
        def on_fit_begin(self) -> None:
            found.append(self.ctx.loss_fn.scale.item())

    first.fit(slope(4), 1, callbacks=[Look()], **OFF)
    assert found == [learned]


def test_fit_that_started_from_weights_resumes_bit_for_bit(tmp_path: Path, fitted):
    made = learner()

    class Starts:
        def fit(self, *args: Any, **options: Any) -> harness.Fitted:
            return made.fit(*args, start=fitted, **options)

    case = Case(
        learner=Starts,  # type: ignore[arg-type]
        data=lambda: (X[:, :2].contiguous(), Y),
        valid=points(4),
        options={"batch_size": BATCH},
    )
    whole = fit_case(case, tmp_path / "whole")
    fit_case(case, tmp_path / "parts", ("on_train_batch_end", 3))
    assert differences(whole, fit_case(case, tmp_path / "parts")) == []


def test_optimizer_continues_from_a_checkpoint_where_it_is_asked_to(tmp_path: Path):
    made = line_learner().set_opt_hparams(momentum=0.9)
    whole = made.fit(slope(6), 4, **OFF)
    first = made.fit(slope(6), 2, callbacks=[ModelCheckpoint(tmp_path)], **OFF)
    again = ResumeFromCheckpoint(tmp_path, restore_records=False)
    second = first.fit(slope(6), 2, callbacks=[again], **OFF)
    assert torch.equal(second.model.w, whole.model.w)
    assert len(second.records["metrics"]["train"]) == 2


# ---------------------------------------------------------------------- start=, strict=

WAYS = {
    "result": lambda folder, fitted: fitted,
    "model": lambda folder, fitted: fitted.model,
    "state dict": lambda folder, fitted: fitted.model.state_dict(),
    "arrays": lambda folder, fitted: {
        name: value.numpy() for name, value in fitted.model.state_dict().items()
    },
    "nested": lambda folder, fitted: {
        "epoch": 3,
        "state_dict": fitted.model.state_dict(),
    },
    "folder": lambda folder, fitted: fitted.save(folder / "m") or folder / "m",
    "safetensors": lambda folder, fitted: (
        save_weights(fitted.model, folder / "w.safetensors")  # type: ignore[func-returns-value]
        or str(folder / "w.safetensors")
    ),
    "torch": lambda folder, fitted: (
        torch.save(fitted.model.state_dict(), folder / "w.pt") or folder / "w.pt"  # type: ignore[func-returns-value]
    ),
    "old torch": lambda folder, fitted: (
        torch.save(  # type: ignore[func-returns-value]
            {"model": fitted.model.state_dict()},
            folder / "w.pt",
            _use_new_zipfile_serialization=False,
        )
        or folder / "w.pt"
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_fit_starts_from_the_weights_that_it_is_given(tmp_path: Path, fitted, way):
    found = start_of(learner(), start=WAYS[way](tmp_path, fitted), strict=True)
    assert is_same(found, fitted.model.state_dict())


def test_fit_starts_from_a_checkpoint_or_the_newest_of_a_folder(tmp_path: Path):
    first = learner().fit(points(8), 2, callbacks=[ModelCheckpoint(tmp_path)], **OFF)
    (place,) = tmp_path.glob("*")
    for path in (place, tmp_path):
        found = start_of(learner(), start=path, strict=True)
        assert is_same(found, first.model.state_dict())


def test_fit_starts_from_the_folder_of_a_run(tmp_path: Path):
    tracker = {"runs_dir": tmp_path, "delivery": False}
    options = OFF | {"tracker": tracker, "callbacks": [ModelCheckpoint()]}
    first = learner().fit(points(8), 1, **options)
    assert first.run_path is not None
    found = start_of(learner(), start=first.run_path, strict=True)
    assert is_same(found, first.model.state_dict())
    for param in first.model.parameters():
        param.data.zero_()
    first.save(first.run_path / "model")
    found = start_of(learner(), start=first.run_path, strict=True)
    assert not found["head.weight"].any()


def test_other_head_is_new_and_the_report_says_so(tmp_path: Path, fitted, capsys):
    options = OFF | {"verbose": True, "tracker": {"runs_dir": tmp_path}}
    options["tracker"]["delivery"] = False
    first = First()
    second = learner(2).fit(
        (points(8)[0], points(8)[1] % 2),
        1,
        callbacks=[first],
        start=fitted,
        strict=False,
        **options,
    )
    assert torch.equal(first.state["body.0.weight"], fitted.model.body[0].weight)
    assert second.start.mismatched == ("head.weight", "head.bias")
    assert len(second.start.loaded) == 7
    assert not second.start.missing
    shown = capsys.readouterr().err
    assert "started from Net: 7 loaded; mismatched: head.weight, head.bias" in shown
    run = tracking.open(second.run_path)
    text = (run.path / "artifacts" / "start.txt").read_text()
    assert "loaded:\n  body.0.weight\n" in text
    assert "mismatched:\n  head.weight" in text


def test_rest_that_is_new_is_warned_of_unless_it_was_expected(fitted):
    with pytest.warns(
        UserWarning, match=r"fit\(start=Net\): .*mismatched: head.weight"
    ):
        learner(2).fit((points(8)[0], points(8)[1] % 2), 1, start=fitted, **OFF)


def prefixed(fitted: harness.Fitted) -> dict[str, Any]:
    return {f"module.{n}": value for n, value in fitted.model.state_dict().items()}


def save_code(folder: Path) -> Path:
    torch.save(Net(), folder / "w.pt")
    return folder / "w.pt"


REFUSED = {
    "other shapes": (
        lambda folder, fitted: ({"head.weight": torch.zeros(9, 9)}, None),
        r"fit\(start=a dict of 1\): expected weights that fit .*mismatched: head.weight",
    ),
    "strict": (
        lambda folder, fitted: ({"head.bias": torch.zeros(3)}, True),
        r"expected weights of this model, got 1 loaded; missing: body.0.weight",
    ),
    "no tensors": (lambda folder, fitted: ({"lr": 0.1}, None), r"such as .*got none"),
    "prefix": (
        lambda folder, fitted: (prefixed(fitted), None),
        r"got \['module\.body\.0.*Rename them: .*removeprefix\('module\.'\)",
    ),
    "no file": (
        lambda folder, fitted: (folder / "no", None),
        r"fit\(start='.*no'\): expected weights",
    ),
    "empty folder": (
        lambda folder, fitted: (folder, None),
        "got a folder without a model or checkpoint",
    ),
    "one tensor": (
        lambda folder, fitted: (
            torch.save(torch.ones(2), folder / "w.pt") or folder / "w.pt",  # type: ignore[func-returns-value]
            None,
        ),
        r"expected plain tensors, got TypeError\('a Tensor'\)",
    ),
    "code": (
        lambda folder, fitted: (save_code(folder), None),
        r"fit\(start='.*w.pt'\): expected plain tensors.*Save model.state_dict\(\)",
    ),
    "number": (lambda folder, fitted: (3, None), r"fit\(start\): expected .*, got 3"),
    "class": (lambda folder, fitted: (Net, None), r"fit\(start\): expected weights"),
    "strictness": (
        lambda folder, fitted: (fitted, "yes"),
        r"fit\(strict\): expected True, False or None, got 'yes'",
    ),
    "strict alone": (
        lambda folder, fitted: (None, False),
        r"fit\(strict\): expected start=\.\.\. with it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_start_without_weights_that_fit_is_refused(tmp_path: Path, fitted, name):
    make, match = REFUSED[name]
    start, strict = make(tmp_path, fitted)
    with pytest.raises((CheckpointError, TypeError, ValueError), match=match):
        learner().fit(points(8), 1, start=start, strict=strict, **OFF)


# ------------------------------------------------------------------------- with_model


def test_model_of_another_program_is_evaluated_predicted_and_trained_further():
    net = Line(w=2.0, b=1.0)
    made = harness.setup(lambda: net, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    found = made.set_opt_hparams(lr=0.01).with_model(net)
    assert found.evaluate(slope(4), verbose=False)["loss"] == pytest.approx(1.0)
    assert found.predict(torch.tensor([3.0])).tolist() == [7.0]
    assert "0 epochs" in str(found)
    assert found.records == {}
    second = found.fit(slope(4), 1, **OFF)
    assert net.b.item() == 1.0 != second.model.b.item()


def test_what_is_no_model_is_refused():
    with pytest.raises(TypeError, match=r"with_model\(model\): expected an nn.Module"):
        line_learner().with_model(Line)  # type: ignore[arg-type]


def test_loaded_model_without_an_optimizer_says_how_to_train_it(tmp_path: Path, fitted):
    fitted.save(tmp_path / "m")
    loaded = harness.load(tmp_path / "m")
    with pytest.raises(ValueError, match=r"learner.fit\(data, start=fitted\)"):
        loaded.fit(points(8), 1, **OFF)
    assert is_same(start_of(learner(), start=loaded), fitted.model.state_dict())
