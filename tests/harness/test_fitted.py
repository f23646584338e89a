"""What fit and evaluate give back: printed, drawn, saved, loaded; nothing loaded runs code."""

from __future__ import annotations

import copy
import json
import math
import pickle
import shutil
import struct
import sys
import types
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
    MulticlassRecall,
)
from torchmetrics.wrappers import ClasswiseWrapper, MinMaxMetric

import harness
from harness.checkpoint.weights import SAVED_MODEL, SAVED_WEIGHTS
from harness.fitted import format_metrics
from harness.records import format_value, metrics_frame
from tests.harness.fakes import Net, line_learner, net_learner, points, slope

DATA = points(40)


def hits(pred, target):
    return (pred.argmax(1) == target).float().mean()


@pytest.fixture(scope="module")
def fitted() -> harness.Fitted:
    learner = net_learner(metrics={"hits": hits})
    options = {"seed": 1, "tracker": False, "verbose": False}
    return learner.set_hparams(hidden=5).fit(DATA, 3, 0.25, **options)


@pytest.fixture
def saved(fitted, tmp_path) -> Path:
    fitted.save(tmp_path / "net")
    return tmp_path / "net"


def test_fitted_get_metrics_has_a_row_for_each_set_metric_and_epoch(fitted):
    frame = fitted.get_metrics()
    assert list(frame.columns) == ["set", "metric", "epoch", "value"]
    found = set(zip(frame["set"], frame["metric"], frame["epoch"], strict=True))
    expected = {
        (split, metric, epoch)
        for split in ("train", "valid")
        for metric in ("loss", "hits")
        for epoch in (1, 2, 3)
    }
    assert found == expected
    assert fitted.records["metrics"]["valid"][2]["loss"] == frame["value"][frame.index[
        (frame["set"] == "valid") & (frame["metric"] == "loss") & (frame["epoch"] == 3)
    ]].item()  # fmt: skip


def test_fitted_printed_names_model_size_epochs_and_last_values(fitted):
    text = str(fitted)
    # 2 x 5 + 5 in the first layer, 5 x 3 + 3 in the second.
    assert "Fitted Net, 33 parameters, 3 epochs" in text
    assert f"{fitted.records['metrics']['train'][-1]['loss']:.4g}" in text


@pytest.mark.filterwarnings("ignore:.*step. expected an optimizer step")
def test_fitted_printed_without_metrics_says_so():
    class Silent(Net):
        def step(self):
            self.ctx.pred = None

    learner = harness.setup(Silent, optimizer=torch.optim.SGD)
    fitted = learner.fit(DATA, 1, tracker=False, verbose=False)
    head, metrics = str(fitted).splitlines()
    assert head.startswith("Fitted Silent, 27 parameters, 0 epochs")
    assert metrics == "no metrics"
    with pytest.raises(ValueError, match="expected at least one numeric metric"):
        fitted.plot()


def test_fitted_printed_and_drawn_with_metrics_that_are_no_numbers(tmp_path):
    metrics = {
        "confusion": MulticlassConfusionMatrix(3),
        "each": MulticlassAccuracy(3, average=None),
    }
    fitted = net_learner(metrics=metrics).fit(DATA, 2, tracker=False, verbose=False)
    assert str(fitted.records["metrics"]["train"][1]["confusion"]) in str(fitted)
    titles = [axes.get_title() for axes in fitted.plot(tmp_path / "c.png").axes]
    assert titles == ["loss", "each/0", "each/1", "each/2"]


def test_fitted_printed_tells_its_run(tmp_path):
    tracker = {"runs_dir": tmp_path, "delivery": False}
    fitted = net_learner().fit(DATA, 1, tracker=tracker, verbose=False)
    assert f"run {fitted.run_id} in {fitted.run_path}" in str(fitted)


def test_fitted_model_is_plain_and_free(fitted):
    assert type(fitted.model) is Net
    assert not fitted.model.training
    assert not hasattr(fitted.model, "ctx")


def test_fitted_plot_writes_a_picture_with_a_chart_for_each_metric(fitted, tmp_path):
    figure = fitted.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [axes.get_title() for axes in figure.axes] == ["loss", "hits"]
    assert [line.get_label() for line in figure.axes[0].lines] == ["train", "valid"]
    train = [one["loss"] for one in fitted.records["metrics"]["train"]]
    assert list(figure.axes[0].lines[0].get_ydata()) == train


def test_evaluation_is_a_mapping_of_its_values(fitted):
    one = fitted.evaluate(DATA)
    assert dict(one) == one.records["metrics"]["valid"][0]
    assert one["valid/loss"] == one["loss"] == one.get("loss")
    two = fitted.evaluate({"a": DATA, "b": DATA})
    assert "a/loss" in two
    assert len(two) == 2 * len(one)


def test_evaluation_by_hand(fitted):
    with torch.no_grad():
        pred = fitted.model(DATA[0])
    loss = nn.functional.cross_entropy(pred, DATA[1]).item()
    hits = (pred.argmax(1) == DATA[1]).float().mean().item()
    found = fitted.evaluate(DATA, verbose=False)
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["hits"] == pytest.approx(hits, rel=1e-6)
    assert "hits" in str(found)
    assert isinstance(found.get_metrics(), pd.DataFrame)


def test_load_gives_the_same_model_records_and_hparams(fitted, saved):
    again = harness.load(saved)
    assert torch.equal(again.predict(DATA[0]), fitted.predict(DATA[0]))
    assert again.records == fitted.records
    assert again.hparams == {"hidden": 5}
    assert again.opt_hparams == {"lr": 0.1}


def test_load_class_given_is_used(saved):
    class Other(Net):
        pass

    assert type(harness.load(saved, module=Other).model) is Other


class Judging(Net):
    def loss(self, pred, target):
        return nn.functional.cross_entropy(pred, target)


def test_load_with_a_loss_of_the_models_own_is_evaluated(fitted, saved):
    found = harness.load(saved, module=Judging).evaluate(DATA, verbose=False)
    assert found["loss"] == fitted.evaluate(DATA, verbose=False)["loss"]


def test_load_without_a_loss_tells_how_to_evaluate(tmp_path):
    learner = net_learner(
        loss=lambda pred, target: nn.functional.cross_entropy(pred, target),
        metrics={"hits": hits, "other": lambda pred, target: 0.0},
    )
    fitted = learner.fit(DATA, 1, tracker=False, verbose=False)
    with pytest.warns(UserWarning, match=r"only text for \['loss', 'other'\]"):
        fitted.save(tmp_path / "net")
    again = harness.load(tmp_path / "net")
    assert again.learner.metrics.valid == {"hits": hits}
    with pytest.raises(
        ValueError, match=r"evaluate\(Net\): expected a loss, .*Pass setup\(loss="
    ):
        again.evaluate(DATA)


class Weighted(nn.Module):
    """A loss with a state and a parameter."""

    def __init__(self, power):
        super().__init__()
        self.power = power
        self.register_buffer("factor", torch.tensor(3.0))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, pred, target):
        error = nn.functional.cross_entropy(pred, target)
        return (error * self.factor * self.scale) ** self.power


LOSSES = {
    "options": nn.CrossEntropyLoss(
        weight=torch.tensor([1.0, 2.0, 3.0]), label_smoothing=0.1
    ),
    "function": nn.functional.cross_entropy,
    "partial": partial(nn.functional.cross_entropy, label_smoothing=0.2),
    "own": Weighted(power=2),
}
METRICS = {
    "hits": hits,
    "f1": MulticlassF1Score(num_classes=3, average=None),
    "auroc": MulticlassAUROC(num_classes=3, thresholds=5),
    "best": MinMaxMetric(MulticlassAccuracy(num_classes=3)),
    "by_class": ClasswiseWrapper(MulticlassAccuracy(num_classes=3, average=None)),
    "sum": MulticlassAccuracy(num_classes=3) + MulticlassRecall(num_classes=3),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_load_keeps_loss_and_metrics(loss, tmp_path):
    metrics = harness.MetricSet(METRICS, valid={"only": MulticlassAccuracy(3)})
    fitted = net_learner(loss=LOSSES[loss], metrics=metrics).fit(
        DATA, 1, tracker=False, verbose=False
    )
    fitted.save(tmp_path / "net")
    again = harness.load(tmp_path / "net")
    assert again.evaluate(DATA).records == fitted.evaluate(DATA).records
    assert set(again.learner.metrics.train) == set(METRICS)


def test_load_runs_no_constructor_of_a_loss(saved):
    content = json.loads((saved / SAVED_MODEL).read_text())
    content["loss"]["$module"] = f"{__name__}:Trap"
    (saved / SAVED_MODEL).write_text(json.dumps(content))
    assert type(harness.load(saved).learner.loss) is Trap


class Trap(nn.CrossEntropyLoss):
    def __new__(cls, *_):
        raise AssertionError("built")

    def __init__(self, *_):
        raise AssertionError("built")


HOSTILE_LOSSES = {
    "function": {"$import": "os:system"},
    "text": {"$partial": [{"$import": "builtins:exec"}, ["raise SystemExit"], {}]},
    "class": {"$module": "builtins:object"},
    "absent": {"$module": "never_imported_anywhere:Loss"},
}


@pytest.mark.parametrize("kind", HOSTILE_LOSSES)
def test_load_takes_no_function_that_a_hostile_folder_names(kind, saved):
    content = json.loads((saved / SAVED_MODEL).read_text())
    content["loss"] = HOSTILE_LOSSES[kind]
    content["metrics"]["valid"] = {"hits": HOSTILE_LOSSES[kind]}
    (saved / SAVED_MODEL).write_text(json.dumps(content))
    learner = harness.load(saved).learner
    assert learner.loss is None
    assert learner.metrics.valid == {}


def test_fitted_and_learner_can_be_pickled_and_copied(fitted, saved):
    expected = fitted.evaluate(DATA).records
    for one in (fitted, harness.load(saved)):
        for again in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
            assert again.evaluate(DATA).records == expected
            assert again.records == fitted.records
            assert again.model is not one.model
            assert again.learner.hparams == {"hidden": 5}
            with pytest.raises(TypeError, match="does not support item assignment"):
                again.learner.hparams["hidden"] = 3  # type: ignore[index]
            again.learner.set_opt_hparams(lr=1.0)


def test_save_of_values_that_are_special_goes_round(tmp_path):
    class Odd(harness.Callback):
        def on_epoch_end(self):
            values = {"a": [math.nan, -math.inf], "b": None, "c": torch.tensor([1, 2])}
            self.ctx.log("notes", "train", values | {"d": {"é": True}})

    fitted = net_learner().fit(DATA, 1, callbacks=[Odd()], tracker=False, verbose=False)
    fitted.save(tmp_path / "net")
    assert repr(harness.load(tmp_path / "net").records) == repr(fitted.records)


@pytest.mark.filterwarnings("ignore:.*step. expected an optimizer step")
def test_save_of_tied_and_low_precision_weights_goes_round(tmp_path):
    fitted = harness.setup(Tied, loss=nn.MSELoss(), optimizer=torch.optim.SGD).fit(
        torch.ones(2, 2), 1, tracker=False, verbose=False
    )
    fitted.save(tmp_path / "tied")
    again = harness.load(tmp_path / "tied", module=Tied).model
    assert again.one.weight is again.two.weight
    for name, value in fitted.model.state_dict().items():
        assert again.state_dict()[name].dtype == value.dtype
        assert torch.equal(again.state_dict()[name], value)


def test_load_is_evaluated_by_a_learner(fitted, saved):
    found = net_learner().evaluate(harness.load(saved), DATA, verbose=False)
    assert found["loss"] == fitted.evaluate(DATA, verbose=False)["loss"]


def test_save_replaces_an_earlier_model_only(fitted, saved, tmp_path):
    fitted.save(saved)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("mine")
    with pytest.raises(harness.CheckpointError, match="earlier saved model, got a f"):
        fitted.save(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net", "thesis"]


def own_act(x):
    return x.clamp(min=0)


class Level(Enum):
    LOW = 1


class AnyHparams(nn.Module):
    """Keeps its hparams as they come."""

    def __init__(self, **hparams) -> None:
        super().__init__()
        self.fc, self.kept = nn.Linear(2, 3), hparams

    def forward(self, x):
        return self.fc(x)


REBUILT = {
    "kind": nn.GELU,
    "own_function": own_act,
    "c_function": torch.tanh,
    "functional": nn.functional.relu,
    "enum": Level.LOW,
    "path": Path("a/b"),
    "set": {"a", "b"},
    "nested": {"sizes": (1, 2), 3: [frozenset({1.5})]},
    "partial": partial(own_act, nn.ReLU),
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "nan": math.inf,
}


def is_same(one, two) -> bool:
    if isinstance(one, partial):
        return (one.func, one.args, one.keywords) == (two.func, two.args, two.keywords)
    return one is two or (type(one) is type(two) and one == two)


def test_hparams_of_any_kind_are_checkpointed_saved_and_rebuilt(tmp_path):
    learner = harness.setup(
        AnyHparams, loss=nn.functional.cross_entropy, optimizer=torch.optim.SGD
    ).set_hparams(**REBUILT, weights=torch.tensor([0.5, 2.0]))
    save = harness.callbacks.ModelCheckpoint(tmp_path / "c")
    fitted = learner.fit(DATA, 1, callbacks=[save], tracker=False, verbose=False)
    fitted.save(tmp_path / "net")
    kept: Any = harness.load(tmp_path / "net").model.kept
    assert {
        name: is_same(REBUILT[name], kept[name]) for name in REBUILT
    } == dict.fromkeys(REBUILT, True)
    assert torch.equal(kept["weights"], torch.tensor([0.5, 2.0]))
    again = harness.callbacks.ResumeFromCheckpoint(tmp_path / "c", strict=True)
    learner.fit(DATA, 2, callbacks=[again], tracker=False, verbose=False)


def test_hparams_that_cannot_be_rebuilt_are_told_at_the_save(tmp_path):
    learner = harness.setup(
        AnyHparams, loss=nn.functional.cross_entropy, optimizer=torch.optim.SGD
    ).set_hparams(act=lambda x: x, layer=nn.Linear(1, 1), size=2)
    fitted = learner.fit(DATA, 1, tracker=False, verbose=False)
    with pytest.warns(UserWarning, match=r"got only text for \['act', 'layer'\]"):
        fitted.save(tmp_path / "net")
    with pytest.raises(harness.CheckpointError, match=r"text for \['act', 'layer'\]"):
        harness.load(tmp_path / "net")
    again = harness.load(tmp_path / "net", module=lambda **_: AnyHparams())
    assert torch.equal(again.predict(DATA[0]), fitted.predict(DATA[0]))


def test_hparam_that_names_a_function_of_another_package_is_not_found(fitted, saved):
    about = json.loads((saved / SAVED_MODEL).read_text())
    about["hparams"]["hidden"] = {"$import": "shutil:rmtree"}
    (saved / SAVED_MODEL).write_text(json.dumps(about))
    with pytest.raises(harness.CheckpointError, match=r"text for \['hidden'\]"):
        harness.load(saved)


def test_save_of_a_model_from_a_function_tells_that_load_needs_it(tmp_path):
    learner = harness.setup(
        lambda: Net(), loss=nn.functional.cross_entropy, optimizer=torch.optim.SGD
    )
    fitted = learner.fit(DATA, 1, tracker=False, verbose=False)
    with pytest.warns(UserWarning, match=r"can be imported, .* will need module="):
        fitted.save(tmp_path / "net")


class Odd(Net):
    """A complex buffer, extra state, and a buffer that grows."""

    queue: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.polar(torch.ones(3), torch.arange(3.0)))
        self.register_buffer("queue", torch.zeros(0))
        self.count = 0

    def forward(self, x):
        if self.training:
            self.count += 1
            self.queue = torch.cat([self.queue, torch.ones(1)])
        return super().forward(x)

    def get_extra_state(self):
        return {"count": self.count}

    def set_extra_state(self, state):
        self.count = state["count"]


def test_complex_buffers_extra_state_and_grown_buffers_are_saved(tmp_path):
    learner = harness.setup(
        Odd, loss=nn.functional.cross_entropy, optimizer=torch.optim.SGD
    )
    fitted = learner.fit(DATA, 2, tracker=False, verbose=False)
    fitted.save(tmp_path / "net")
    fitted.save_weights(tmp_path / "net.safetensors")
    again: Any = harness.load(tmp_path / "net").model
    assert torch.equal(again.freqs, fitted.model.freqs)
    assert (again.count, len(again.queue)) == (2, 2)
    assert fitted.load_weights(tmp_path / "net.safetensors").is_complete


class Canary:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Tied(nn.Module):
    """Two names for one weight, and a buffer of half precision."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2), nn.Linear(2, 2)
        self.two.weight = self.one.weight
        self.register_buffer("pair", torch.tensor([1.5, math.pi], dtype=torch.bfloat16))

    def forward(self, x):
        return self.two(self.one(x))

    def step(self):
        self.ctx.pred = self(self.ctx.input)

    ctx: Any


def edit(place: Path, **changes: object) -> None:
    about = json.loads((place / SAVED_MODEL).read_text())
    (place / SAVED_MODEL).write_text(json.dumps(about | changes))


def forge_header(place: Path) -> None:
    header = json.dumps(
        {"x": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ).encode()
    (place / SAVED_WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


HARMS = {
    "missing": (shutil.rmtree, "got a path that does not exist"),
    "no weights": (lambda p: (p / SAVED_WEIGHTS).unlink(), "expected complete weights"),
    "torn weights": (
        lambda p: (p / SAVED_WEIGHTS).write_bytes(
            (p / SAVED_WEIGHTS).read_bytes()[:-7]
        ),
        "expected complete weights",
    ),
    "pickled weights": (
        lambda p: (p / SAVED_WEIGHTS).write_bytes(pickle.dumps(Canary(p / "ran"))),
        "expected complete weights",
    ),
    "absurd size": (forge_header, "expected complete weights"),
    "torn json": (
        lambda p: (p / SAVED_MODEL).write_text((p / SAVED_MODEL).read_text()[:-20]),
        "could not read it",
    ),
    "no json": (
        lambda p: (p / SAVED_MODEL).write_bytes(b"\x80\x04K\x01."),
        "could not read",
    ),
    "other json": (
        lambda p: (p / SAVED_MODEL).write_text("[]"),
        "in the whole file, got array",
    ),
    "deep json": (
        lambda p: (p / SAVED_MODEL).write_text("[" * 10**6),
        "could not read it",
    ),
    "no hparams": (lambda p: edit(p, hparams=[1]), "object in field 'hparams'"),
    "no records": (
        lambda p: edit(p, records=5),
        "expected object in field 'records', got int",
    ),
    "module above": (lambda p: edit(p, module="..os:path"), "that is imported"),
    "newer format": (lambda p: edit(p, format=99), "expected format 1, got 99"),
    "no class": (lambda p: edit(p, module="os:nothing"), "expected to import"),
    "no model": (lambda p: edit(p, module="os:system"), r"to be an nn\.Module class"),
    "other model": (
        lambda p: edit(p, module="torch.nn:Identity", hparams={}),
        "expected weights that fit",
    ),
    "other hparams": (lambda p: edit(p, hparams={"hidden": 9}), "weights that fit"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_load_torn_or_hostile_is_refused_and_runs_nothing(harm, saved):
    damage, match = HARMS[harm]
    damage(saved)
    with pytest.raises(harness.CheckpointError, match=match):
        harness.load(saved)
    assert not (saved / "ran").exists()


def test_load_imports_no_module_unless_trusted(saved, tmp_path, monkeypatch):
    (tmp_path / "far_net.py").write_text(
        "import pathlib\n"
        "pathlib.Path(__file__).with_name('ran').touch()\n"
        "from tests.harness.fakes import Net as Base\n"
        "class Net(Base): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    edit(saved, module="far_net:Net")
    with pytest.raises(harness.CheckpointError, match=r"module=, or trust=True"):
        harness.load(saved)
    assert not (tmp_path / "ran").exists()
    assert "far_net" not in sys.modules
    assert type(harness.load(saved, module=Net).model) is Net
    try:
        assert type(harness.load(saved, trust=True).model).__module__ == "far_net"
    finally:
        sys.modules.pop("far_net", None)


@pytest.mark.parametrize("name", ["lazy:Net", "lazy:sub.Net", "lazy"])
def test_load_asks_no_module_for_names_it_makes_up(name, saved):
    asked = []
    lazy = types.ModuleType("lazy")
    vars(lazy)["__getattr__"] = asked.append
    sys.modules["lazy"] = lazy
    edit(saved, module=name)
    try:
        with pytest.raises(harness.CheckpointError, match="expected to import"):
            harness.load(saved)
    finally:
        del sys.modules["lazy"]
    assert asked == []


def test_results_show_themselves_shortly_in_a_notebook():
    learner = line_learner()
    fitted = learner.fit(slope(4), 30, slope(4), tracker=False)
    assert repr(fitted) == str(fitted)
    assert len(repr(fitted)) < 500  # not its records
    shown = fitted._repr_html_()
    loss = fitted.records["metrics"]["valid"][-1]["loss"]
    assert f"<th>valid/loss</th><td>{loss:.4g}</td>" in shown
    assert fitted.plot()._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]
    assert repr(learner).startswith("<Learner of Line")
    assert "2 parameters" in learner._repr_html_()
    evaluation = fitted.evaluate(slope(4))
    assert "Evaluation" in evaluation._repr_html_()
    found = harness.lr_finder(learner, slope(64))
    assert len(repr(found)) < 100
    assert "<img src=" in found._repr_html_()


@pytest.mark.parametrize("index", [None, 1, 2, 9])
def test_table_of_metrics_is_the_one_of_pandas(index: int | None) -> None:
    first = {"loss": 0.5, "a/b": {"deep": 1e-9}, "long name of a metric": math.nan}
    valid = [None, {"loss": [[10, 0], [7, 3]], "": True, "tab\tline\n": "x"}]
    records = {"metrics": {"train": [first, {"loss": -1}], "v": valid, "none": []}}
    frame = metrics_frame(records)
    if index is not None:
        frame = frame[frame["epoch"] == index]
    last = frame.drop_duplicates(["metric", "set"], keep="last")
    wide = last.assign(value=[format_value(value) for value in last["value"]])
    wide = wide.pivot(index="metric", columns="set", values="value").fillna("")
    wide = wide.reindex(index=frame["metric"].unique(), columns=frame["set"].unique())
    expected = "no metrics" if frame.empty else wide.to_string()
    assert format_metrics(records, index) == expected
