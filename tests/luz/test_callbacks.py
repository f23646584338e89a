"""luz's cases about callbacks, but those that watch metrics or resume.

``test-callbacks``, ``-amp``, ``-interrupt``, ``-mixup``, ``-profile``, ``-tfevents`` and
``test_losses``.
"""

from __future__ import annotations

import itertools
import signal
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiplicativeLR, ReduceLROnPlateau
from torch.utils.data import IterableDataset
from torchmetrics.classification import MulticlassAccuracy

import harness
from harness.callbacks import (
    AutoResume,
    CSVLogger,
    GradientClip,
    LRScheduler,
    Mixup,
    MixupLoss,
    Progress,
    TensorBoard,
)
from harness.callbacks.augment.mixing import MixedTarget
from tests.harness.fakes import At
from tests.harness.terminal import frames, in_terminal, screen
from tests.luz.parts import Net, classes, linear, rows

# ---------------------------------------------------------------- mixed precision


def test_can_use_mixed_precision_callback():
    dtypes: dict[str, torch.dtype] = {}

    class Look(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            dtypes["forward"] = (x @ x.T).dtype
            return super().forward(x)

    def look(ctx: Any) -> None:
        dtypes["gradients"] = ctx.model.weight.grad.dtype
        dtypes["weights"] = ctx.model.weight.dtype

    learner = harness.setup(Look, loss=nn.MSELoss(), optimizer=torch.optim.Adam)
    learner = learner.set_hparams(in_features=10, out_features=1)
    accelerator = harness.accelerator(precision="bf16")
    seen = At("on_train_batch_before_step", look)
    learner.fit(
        rows(),
        1,
        valid_data=0.2,
        callbacks=[seen],
        accelerator=accelerator,
        tracker=False,
    )
    assert dtypes == {
        "forward": torch.bfloat16,
        "gradients": torch.float32,
        "weights": torch.float32,
    }


# ---------------------------------------------------------------------- interrupt


def test_callback_interrupt_works(learner):
    heard: list[int] = []
    press = At(
        "on_epoch_begin",
        lambda ctx: signal.raise_signal(signal.SIGINT) if ctx.epoch == 3 else None,
    )
    hear = At("on_interrupt", lambda ctx: heard.append(ctx.epoch))
    fitted = learner.fit(rows(), 25, callbacks=[press, hear], tracker=False)
    assert len(fitted.records["metrics"]["train"]) == 2
    assert heard == [3]
    assert fitted.is_interrupted


# -------------------------------------------------------------------------- mixup


def test_mixup_logic_works(learner):
    batches: list[Any] = []

    class Weigh(Mixup):
        def draw(self, count: int) -> Tensor:
            return torch.full((count,), 0.9)

    see = At(
        "on_train_batch_before_backward",
        lambda ctx: batches.append((ctx.input, ctx.target)),
    )
    x, y = torch.ones(10, 10), torch.ones(10, 1)
    learner.fit((x, y), 1, callbacks=[Weigh(auto_loss=True), see], tracker=False)
    ((mixed, target),) = batches
    assert torch.allclose(mixed, x)
    assert torch.equal(target.first, target.second)
    assert torch.allclose(target.weight, torch.tensor(0.9))


@pytest.mark.parametrize(
    ("size", "num_classes"),
    [((768,), 10), ((28, 28), 3), ((3, 28, 28), 33)],
    ids=["1d", "2d", "3d"],
)
def test_mixup_works_for_input(size, num_classes):
    loss = MixupLoss(nn.CrossEntropyLoss(ignore_index=222))
    learner = harness.setup(Net, loss=loss, optimizer=torch.optim.Adam)
    features = int(torch.tensor(size).prod())
    learner = learner.set_hparams(input_size=features, output_size=num_classes)
    data = classes(size=size, num_classes=num_classes)
    fitted = learner.fit(data, 2, data, callbacks=[Mixup()], tracker=False)
    losses = fitted.get_metrics()["value"]
    assert len(losses) == 4
    assert losses.notna().all()


def test_can_use_mixup_with_accuracy():
    metrics = harness.MetricSet(valid={"acc": MulticlassAccuracy(2, average="micro")})
    learner = linear(loss=nn.CrossEntropyLoss(reduction="none"), metrics=metrics)
    learner = learner.set_hparams(out_features=2).set_opt_hparams(lr=0.001)
    mixup = Mixup(auto_loss=True)
    data = classes(num_classes=2)
    fitted = learner.fit(data, 2, valid_data=0.2, callbacks=[mixup], tracker=False)
    frame = fitted.get_metrics()
    assert set(frame.query("metric == 'acc'")["set"]) == {"valid"}


def test_nn_mixup_loss_works_when_used_with_cross_entropy():
    pred = torch.randn(7, 4)
    first, second = torch.zeros(7, dtype=torch.long), torch.full((7,), 3)
    losses = [
        nn.functional.cross_entropy(pred, target, reduction="none")
        for target in (first, second)
    ]
    loss = MixupLoss(nn.CrossEntropyLoss(ignore_index=222))
    # The weight is the share of the first target; luz weighs the second.
    mixed = loss(pred, MixedTarget(first, second, torch.full((7,), 0.1)))
    assert torch.allclose(mixed, (0.1 * losses[0] + 0.9 * losses[1]).mean())
    whole = loss(pred, MixedTarget(first, second, torch.zeros(7)))
    assert torch.allclose(whole, losses[1].mean())


# ------------------------------------------------------------- profile, TensorBoard


def test_callback_profile(fitted):
    profile = fitted.records["profile"]
    counts = {name: len(profile[name]) for name in ("fit", "epoch", "train", "valid")}
    assert counts == {"fit": 1, "epoch": 5, "train": 5, "valid": 5}


class TwoOptimizers(nn.Linear):
    def set_optimizers(self, lr: float = 2e-4) -> dict[str, torch.optim.Optimizer]:
        return {
            "weight": torch.optim.Adam([self.weight], lr=lr, betas=(0.5, 0.999)),
            "bias": torch.optim.Adam([self.bias], lr=lr, betas=(0.5, 0.999)),
        }


class Writer:
    """Stands for TensorBoard's, which is not always installed."""

    def __init__(self) -> None:
        self.scalars: list[str] = []
        self.histograms: list[str] = []

    def add_scalar(self, tag: str, value: float, global_step: int) -> None:
        self.scalars.append(tag)

    def add_histogram(self, tag: str, values: Tensor, global_step: int) -> None:
        self.histograms.append(tag)

    def add_hparams(self, *args: Any, **options: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def test_metrics_are_correctly_saved():
    writer = Writer()
    learner = harness.setup(TwoOptimizers, loss=nn.MSELoss())
    learner = learner.set_hparams(in_features=10, out_features=1)
    board = TensorBoard(histograms=1, writer=writer)
    learner.fit(rows(), 10, valid_data=0.2, callbacks=[board], tracker=False)
    losses = [tag for tag in writer.scalars if "loss" in tag]
    assert len(losses) == 40  # 10 epochs, 2 sets, 2 optimizers
    weights = [tag for tag in writer.histograms if not tag.startswith("grad")]
    assert len(weights) == 20  # 10 epochs, 2 parameters


# ------------------------------------------------- schedules, CSV, progress, clipping


def test_callback_lr_scheduler(learner):
    halve = LRScheduler(MultiplicativeLR, lr_lambda=lambda epoch: 0.5)
    fitted = learner.fit(rows(), 5, callbacks=[halve], seed=1, tracker=False)
    rates = [item["opt"] for item in fitted.records["lr"]["train"]]
    assert rates == pytest.approx([1e-3 / 2**n for n in range(5)])

    plateau = LRScheduler(
        ReduceLROnPlateau, monitor="train/loss", patience=2, threshold=0.99
    )
    fitted = learner.fit(rows(), 9, callbacks=[plateau], seed=1, tracker=False)
    rates = [item["opt"] for item in fitted.records["lr"]["train"]]
    # Nothing is ever 100 times better: every third epoch after the first is one too many.
    assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 3 + [1e-5] * 2)


def test_csv_callback(learner, tmp_path):
    path = tmp_path / "metrics.csv"
    learner.fit(rows(), 5, callbacks=[CSVLogger(path)], tracker=False)
    frame = pd.read_csv(path)
    assert list(frame) == ["epoch", "set", "metric", "value"]
    assert list(frame["epoch"]) == [1, 2, 3, 4, 5]

    learner.fit(rows(), 5, rows(), callbacks=[CSVLogger(path)], tracker=False)
    frame = pd.read_csv(path)
    assert len(frame) == 10
    assert list(frame["set"]) == ["train", "valid"] * 5


class Impatient(Progress):
    """Draws each bar, as if every look at the clock took a quarter of a second."""

    clock = staticmethod(itertools.count(0.0, 0.25).__next__)


def test_progressbar_appears_with_training_and_validation(learner):
    options = {"callbacks": [Impatient()], "verbose": True, "tracker": False}
    text = in_terminal(lambda: learner.fit(rows(), 2, rows(), **options))
    drawn = "\n".join(frames(text))
    for title in ("1/2 train", "1/2 valid", "2/2 train", "2/2 valid"):
        assert f"epoch {title}" in drawn
    heading = next(line for line in screen(text) if "| train" in line)
    assert "| valid" in heading


def test_gradient_clip_works_correctly(learner):
    clip = GradientClip(max_norm=1e-30, record=False)
    data = rows(96)
    fitted = learner.fit(data, 2, data, callbacks=[clip], tracker=False)
    losses = fitted.get_metrics()["value"]
    assert len(losses) == 4
    assert list(losses) == pytest.approx([losses[0]] * 4)  # nothing is learned
    with pytest.raises(ValueError, match=r"GradientClip\(max_norm\): expected .* 0"):
        GradientClip(max_norm=0)
    for option in ("max_norm", "norm_type"):
        with pytest.raises(TypeError, match=rf"GradientClip\({option}\)"):
            GradientClip(**{option: "a"})


def test_improve_error_message_when_you_provide_an_uninitialized_callback(learner):
    with pytest.raises(TypeError, match=r"callbacks.*AutoResume"):
        learner.fit(rows(), callbacks=[AutoResume], tracker=False)


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Any:
        return zip(*rows(), strict=True)


def test_can_get_progress_when_using_iterable_datasets(learner):
    options = {"callbacks": [Impatient()], "verbose": True, "tracker": False}
    text = in_terminal(lambda: learner.fit(Stream(), 2, Stream(), **options))
    drawn = frames(text)
    assert any("epoch 1/2 train" in frame for frame in drawn)
    assert any("epoch 2/2 valid" in frame for frame in drawn)
    assert not any("%" in frame for frame in drawn)  # the length is not known
