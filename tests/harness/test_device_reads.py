"""A step reads no number from its device, which on a GPU would wait for all steps before it."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.classification import MulticlassAccuracy

import harness
from harness.callbacks import EMA, GradientClip, LRScheduler, StepMetrics

ATEN = torch.ops.aten
READS = {
    ATEN._local_scalar_dense.default,
    ATEN.equal.default,
    ATEN.is_nonzero.default,
    ATEN.nonzero.default,
}
BY_TORCH = ("/torch/optim/", "/torch/amp/")
BY_KEEPING_A_LOSS = "keep_number"
"""The harness keeps the loss of each step as a number, but only where it is on the CPU."""


class Reads(TorchDispatchMode):
    """Lists where numbers are read while it is `on`."""

    def __init__(self) -> None:
        super().__init__()
        self.on, self.places = False, []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if self.on and func in READS:
            stack = traceback.extract_stack()[:-1]
            is_by_torch = any(
                part in frame.filename for frame in stack for part in BY_TORCH
            )
            if not is_by_torch and all(f.name != BY_KEEPING_A_LOSS for f in stack):
                self.places.append([f"{f.filename}:{f.lineno}" for f in stack[-4:]])
        return func(*args, **(kwargs or {}))


class Steady(harness.Callback):
    """Turns the watch on for all but the first batches of an epoch."""

    weight = -10_000

    def __init__(self, reads: Reads) -> None:
        self.reads, self.num_batches = reads, 0

    def on_train_batch_begin(self) -> None:
        self.reads.on = self.ctx.iter > 2
        self.num_batches += self.reads.on

    def on_train_end(self) -> None:
        self.reads.on = False


class Reading(harness.Callback):
    """What must not happen."""

    def on_train_batch_after_loss(self) -> None:
        self.ctx.loss["opt"].item()


def one_cycle() -> harness.Callback:
    return LRScheduler(
        torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1, total_steps="auto"
    )


def fit(
    folder: Path, callbacks: list[harness.Callback], rate: object, **options: Any
) -> Reads:
    reads = Reads()
    steady = Steady(reads)
    learner = harness.setup(
        lambda: nn.Linear(4, 3),
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.Adam,
        metrics={"accuracy": MulticlassAccuracy(num_classes=3)},
    ).set_opt_hparams(lr=rate)
    drawn = torch.Generator().manual_seed(0)
    data = torch.randn(64, 4, generator=drawn), torch.randint(3, (64,), generator=drawn)
    with reads:
        learner.fit(
            data,
            epochs=2,
            callbacks=[steady, *callbacks],
            dataloader_options={"batch_size": 8},
            tracker={"runs_dir": folder, "delivery": False},
            **options,
        )
    assert steady.num_batches == 12
    return reads


@pytest.mark.parametrize(
    ("make", "rate", "precision"),
    [
        (list, 0.1, "fp32"),
        (
            lambda: [GradientClip(1.0), StepMetrics(), one_cycle(), EMA(0.9)],
            0.1,
            "bf16",
        ),
        (lambda: [StepMetrics()], torch.tensor(0.1), "fp32"),
    ],
    ids=["defaults", "callbacks", "rate on the device"],
)
def test_steady_step_reads_no_number(
    make: Callable[[], list[harness.Callback]],
    rate: object,
    precision: str,
    tmp_path: Path,
) -> None:
    accelerator = harness.accelerator(device="cpu", precision=precision)
    reads = fit(tmp_path, make(), rate, accelerator=accelerator)
    assert reads.places == []


def test_read_in_a_step_is_seen(tmp_path: Path) -> None:
    assert len(fit(tmp_path, [Reading()], 0.1).places) == 12
