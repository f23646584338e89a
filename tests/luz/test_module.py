"""luz's cases about fitting, predicting, evaluating, saving and showing a model.

``test-module``, ``test-module-plot``, ``test-module-print``, ``test-serialization``,
``test-utils`` and ``test-lr-finder``.
"""

from __future__ import annotations

import itertools
from typing import Any

import matplotlib.image
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError

import harness
from harness.callback import bind_context
from harness.callbacks import Progress
from tests.harness.fakes import At
from tests.harness.terminal import frames, in_terminal
from tests.luz.parts import Net, rows


def loader(seed: int = 0, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*rows(seed=seed)), batch_size=10, **options)


# ---------------------------------------------------------------------------- fit


def test_fully_managed(learner):
    assert isinstance(learner, harness.Learner)
    fitted = learner.fit(loader(), 2, loader(), tracker=False)
    assert isinstance(fitted, harness.Fitted)
    assert len(fitted.get_metrics()) == 4


def test_custom_optimizer():
    class Own(Net):
        def set_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=0.01)

    rates: list[float] = []
    see = At("on_fit_begin", lambda ctx: rates.append(ctx.opt.param_groups[0]["lr"]))
    learner = harness.setup(Own, loss=nn.MSELoss())
    learner = learner.set_hparams(input_size=10, output_size=1)
    fitted = learner.fit(loader(), 1, loader(), callbacks=[see], tracker=False)
    assert isinstance(fitted, harness.Fitted)
    assert rates == [0.01]


def test_multiple_optimizers():
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Net(10, 1), Net(10, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x)

        def set_optimizers(self) -> dict[str, torch.optim.Optimizer]:
            return {
                "one": torch.optim.Adam(self.first.parameters(), lr=0.01),
                "two": torch.optim.Adam(self.second.parameters(), lr=0.01),
            }

    fitted = harness.setup(Sum, loss=nn.MSELoss()).fit(
        loader(), 2, loader(), tracker=False
    )
    metrics = set(fitted.get_metrics()["metric"])
    assert metrics == {"loss/one", "loss/two"}


def test_can_train_without_a_validation_dataset(learner):
    fitted = learner.fit(loader(), 1, tracker=False)
    assert set(fitted.get_metrics()["set"]) == {"train"}


def test_valid_data_works(learner):
    fitted = learner.fit(rows(), 2, valid_data=0.1, tracker=False)
    assert "valid" in set(fitted.get_metrics()["set"])
    for fraction in (2, -1):
        with pytest.raises(ValueError, match=rf"fraction in \(0, 1\), got {fraction}"):
            learner.fit(rows(), valid_data=fraction, tracker=False)
    with pytest.raises(ValueError, match="expected data that can be split, got a Data"):
        learner.fit(loader(), valid_data=0.2, tracker=False)


def test_we_can_pass_dataloader_options(learner, fitted):
    iters: list[int] = []
    count = At("on_train_batch_end", lambda ctx: iters.append(ctx.iter))
    options = {"batch_size": 2, "shuffle": False}
    learner.fit(
        rows(),
        1,
        valid_data=0.1,
        dataloader_options=options,
        callbacks=[count],
        tracker=False,
    )
    assert len(iters) == 45
    with pytest.raises(ValueError, match="expected none with a DataLoader"):
        learner.fit(loader(), 1, dataloader_options=options, tracker=False)
    with pytest.warns(UserWarning, match="valid_data is a DataLoader"):
        learner.fit(rows(), 1, loader(), dataloader_options=options, tracker=False)

    options = {"batch_size": 45, "drop_last": True}
    assert fitted.predict(rows(), dataloader_options=options).shape == (90, 1)
    with pytest.warns(UserWarning, match="data is a DataLoader"):
        fitted.predict(loader(), dataloader_options=options)
    with pytest.warns(UserWarning, match=r"'shuffle'.* keep their order"):
        shuffled = fitted.predict(rows(), dataloader_options={"shuffle": True})
    assert torch.equal(shuffled, fitted.predict(rows()))


def test_custom_backward():
    epochs: list[int] = []

    class Own(Net):
        def backward(self, loss: Tensor) -> None:
            loss.backward()
            if self.ctx.iter == 1:
                epochs.append(self.ctx.epoch)

    learner = harness.setup(Own, loss=nn.MSELoss(), optimizer=torch.optim.Adam)
    learner = learner.set_hparams(input_size=10, output_size=1)
    learner.fit(loader(), 2, loader(), tracker=False)
    assert epochs == [1, 2]


def test_luz_module_has_a_device_arg(learner):
    seen: list[torch.device] = []
    see = At("on_fit_begin", lambda ctx: seen.append(ctx.device))
    accelerator = harness.accelerator(device="cpu")
    learner.fit(loader(), 1, callbacks=[see], accelerator=accelerator, tracker=False)
    assert seen == [torch.device("cpu")]

    class Own(Net):
        device = "hello"  # a model's own attribute stays

    own = harness.setup(Own, loss=nn.MSELoss(), optimizer=torch.optim.Adam)
    own = own.set_hparams(input_size=10, output_size=1)
    assert own.fit(loader(), 1, tracker=False).model.device == "hello"


# ------------------------------------------------------------ predict and evaluate


def test_predict_works_for_modules(fitted):
    first = fitted.predict(loader())
    assert first.shape == (100, 1)
    assert torch.equal(fitted.predict(loader()), first)
    other = fitted.predict(loader(seed=5))
    assert torch.equal(fitted.predict(loader(seed=5)), other)
    assert not torch.equal(first, other)


def test_predict_can_use_a_progress_bar(learner, monkeypatch):
    # Every look at the clock takes a quarter of a second, so each bar is drawn.
    clock = itertools.count(0.0, 0.25).__next__
    monkeypatch.setattr(Progress, "clock", staticmethod(clock))
    fitted = learner.set_opt_hparams(lr=1e-3).fit(loader(), 1, tracker=False)
    text = in_terminal(lambda: fitted.predict(loader(), verbose=True))
    assert any("predict" in frame and "%" in frame for frame in frames(text))
    assert fitted.hparams["input_size"] == 10
    assert fitted.opt_hparams["lr"] == 1e-3


@pytest.fixture(scope="module")
def measured(learner: harness.Learner) -> harness.Fitted:
    metrics = {
        "mae": MeanAbsoluteError(),
        "mse": MeanSquaredError(),
        "rmse": MeanSquaredError(squared=False),
    }
    learner = harness.setup(
        Net, loss=nn.MSELoss(), optimizer=torch.optim.Adam, metrics=metrics
    )
    learner = learner.set_hparams(input_size=10, output_size=1)
    options = {"batch_size": 10, "shuffle": False}
    return learner.fit(rows(), 2, rows(), dataloader_options=options, tracker=False)


def test_evaluate_works(measured):
    found = measured.evaluate(rows())
    frame = found.get_metrics()
    assert list(frame["metric"]) == ["loss", "mae", "mse", "rmse"]
    x, y = rows()
    error = measured.predict(x) - y
    assert found["mae"] == pytest.approx(float(error.abs().mean()), rel=1e-5)
    assert found["rmse"] == pytest.approx(float((error**2).mean().sqrt()), rel=1e-5)
    shown = str(found)
    for name, value in zip(frame["metric"], frame["value"], strict=True):
        assert name in shown
        assert f"{value:.4g}" in shown


def test_evaluate_allows_setting_metrics_for_it(measured):
    first = measured.evaluate(rows()).get_metrics()
    one = measured.evaluate(rows(), metrics={"mae": MeanAbsoluteError()})
    again = measured.evaluate(rows()).get_metrics()
    assert first.equals(again)
    expected = first[first["metric"].isin(["loss", "mae"])].reset_index(drop=True)
    assert one.get_metrics().equals(expected)


# ----------------------------------------------------------------- show and search


def test_plot_works(measured, tmp_path):
    path = tmp_path / "curves.png"
    figure = measured.plot(path)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == 4  # the loss and three metrics
    assert all(len(axes.get_lines()) >= 2 for axes in panels)  # train and valid
    assert matplotlib.image.imread(path).ndim == 3


def test_print_module_generator(learner, fitted):
    shown = str(learner)
    assert "Net" in shown
    assert "input_size" in shown
    shown = str(fitted)
    assert "Fitted Net, 11 parameters, 5 epochs" in shown
    assert " s an epoch)" in shown


def test_lr_finder_works(learner, tmp_path):
    found = harness.lr_finder(learner, loader(), start_lr=1e-7, end_lr=0.1)
    frame = found.to_frame()
    assert len(frame) == 100
    assert list(frame) == ["lr", "loss", "smoothed"]
    assert frame["lr"].iloc[[0, -1]].tolist() == pytest.approx([1e-7, 0.1])
    assert "100 steps from 1e-07 to 0.1" in str(found)
    found.plot(tmp_path / "lr.png")
    assert matplotlib.image.imread(tmp_path / "lr.png").ndim == 3


# ---------------------------------------------------------------------------- save


def test_serialization_works_as_expected(learner, tmp_path):
    fitted = learner.fit(loader(), 1, tracker=False)
    expected = fitted.predict(loader(seed=4))
    fitted.save(tmp_path / "model")
    weights = {name: w.clone() for name, w in fitted.model.state_dict().items()}
    del fitted
    loaded = harness.load(tmp_path / "model")
    assert all(
        torch.equal(weight, weights[name])
        for name, weight in loaded.model.state_dict().items()
    )
    assert torch.equal(loaded.predict(loader(seed=4)), expected)


class Asks(nn.Module):
    """Looks at the context in forward."""

    ctx: Any

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(10, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        one = torch.ones_like if self.ctx.training else torch.zeros_like
        return self.fc(one(x))


def test_serialization_works_when_model_uses_ctx_in_forward(tmp_path):
    learner = harness.setup(Asks, loss=nn.MSELoss(), optimizer=torch.optim.Adam)
    fitted = learner.fit(loader(), 1, tracker=False)
    assert torch.equal(fitted.predict(loader()), torch.zeros(100, 1))
    fitted.save(tmp_path / "model")
    loaded = harness.load(tmp_path / "model")
    assert torch.equal(loaded.predict(loader()), torch.zeros(100, 1))


def test_save_and_load_model_weights(learner, tmp_path):
    fitted = learner.fit(loader(), 1, tracker=False)
    before = {name: w.clone() for name, w in fitted.model.state_dict().items()}
    fitted.save_weights(tmp_path / "weights.safetensors")
    with torch.no_grad():
        fitted.model.fc.weight += 5
    assert not torch.equal(fitted.model.fc.weight, before["fc.weight"])
    report = fitted.load_weights(tmp_path / "weights.safetensors")
    assert set(report.loaded) == {"fc.bias", "fc.weight"}
    assert torch.equal(fitted.model.fc.weight, before["fc.weight"])
    assert torch.equal(fitted.model.fc.bias, before["fc.bias"])


# ------------------------------------------------------------------------- context


def test_bind_context_works_for_more_complicated_classes():
    class Base(Net):
        def look(self) -> Any:
            return self.ctx.epoch

    class Derived(Base):
        pass

    model = Derived(10, 1)
    ctx = harness.Context(training=False)
    ctx.epoch = 3
    bind_context(model, ctx)
    assert model.look() == 3
