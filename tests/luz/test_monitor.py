"""luz's cases about callbacks that watch a metric: ``test-callbacks-monitor-metrics``."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MeanAbsoluteError

import harness
from harness.callbacks import CSVLogger, EarlyStopping, KeepBestModel, ModelCheckpoint
from harness.checkpoint.format import list_checkpoints
from tests.harness.fakes import At
from tests.luz.parts import Net, rows


def count_epochs(
    learner: harness.Learner, *callbacks: Any, epochs: Any = 25, **options: Any
) -> int:
    """Epochs that a fit runs with early stopping on the training loss."""
    early = EarlyStopping("train/loss", **options)
    callbacks = (early, *callbacks)
    fitted = learner.fit(rows(), epochs, callbacks=callbacks, seed=1, tracker=False)
    return len(fitted.records["metrics"]["train"])


@pytest.mark.parametrize(
    ("epochs", "options", "expected"),
    [
        (25, {"patience": 1, "min_delta": 100}, 2),
        (25, {"patience": 2, "min_delta": 100}, 3),
        ((5, 25), {"patience": 2, "min_delta": 100}, 5),
        ((1, 25), {"patience": 1, "baseline": 0.0}, 1),
    ],
    ids=["one", "two", "min_epochs", "baseline"],
)
def test_early_stopping_with_patience_1(learner, epochs, options, expected):
    assert count_epochs(learner, epochs=epochs, **options) == expected


def test_early_stopping(learner, capsys):
    heard: list[int] = []
    hear = At("on_early_stopping", lambda ctx: heard.append(ctx.epoch))
    # The loss never gets below the baseline, so the first five epochs are the patience.
    assert count_epochs(learner, hear, patience=5, baseline=1e-3) == 5
    assert heard == [5]

    learner = harness.setup(
        Net,
        loss=nn.MSELoss(),
        optimizer=torch.optim.Adam,
        metrics={"mae": MeanAbsoluteError()},
    ).set_hparams(input_size=10, output_size=1)
    early = EarlyStopping("train/mae", patience=2, baseline=0.1, min_delta=0.01)
    fitted = learner.fit(rows(), 25, callbacks=[early], verbose=True, tracker=False)
    assert len(fitted.records["metrics"]["train"]) == 2
    assert "stopped early after epoch 2" in capsys.readouterr().err


def test_model_checkpoint_callback_works(learner, tmp_path):
    every = ModelCheckpoint(tmp_path / "all", keep_last=5)
    best = ModelCheckpoint(
        tmp_path / "best", keep_last=0, keep_best=1, monitor="train/loss"
    )
    fitted = learner.fit(rows(), 5, callbacks=[every, best], seed=1, tracker=False)
    saved = sorted(list_checkpoints(tmp_path / "all"))
    assert len(saved) == 5
    assert len(list_checkpoints(tmp_path / "best")) == 1

    x, _ = rows(10, seed=3)
    trained = fitted.predict(x)
    fitted.load_weights(saved[0])
    assert not torch.allclose(fitted.predict(x), trained)
    fitted.load_weights(saved[-1])
    assert torch.equal(fitted.predict(x), trained)


def test_early_stopping_and_csv_logger(learner, tmp_path):
    path = tmp_path / "metrics.csv"
    callbacks = [EarlyStopping("train/loss", min_delta=100), CSVLogger(path)]
    fitted = learner.fit(rows(), 25, callbacks=callbacks, tracker=False)
    assert len(pd.read_csv(path)) == len(fitted.get_metrics()) == 2


class Constant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(100.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.ones_like(x) * self.w


def test_use_best_model_callback():
    learner = harness.setup(Constant, loss=nn.MSELoss(), optimizer=torch.optim.Adam)
    keep = KeepBestModel("train/loss", mode="max")
    data = torch.rand(100), torch.zeros(100)
    learner = learner.set_opt_hparams(lr=1.0)
    fitted = learner.fit(data, 10, callbacks=[keep], tracker=False)
    assert fitted.model.w > 90  # the loss is largest in the first epoch
    assert fitted.best_epoch == 1
