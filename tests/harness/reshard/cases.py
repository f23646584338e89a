"""Fits that are broken off on some ranks and go on on another number of them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC

import harness
from harness.callbacks import AutoResume, ResumeFromCheckpoint
from harness.reshard.consolidated import ConsolidatedState
from tests.harness.accelerators.cases import Lab

ROWS, EPOCHS = 45, 2
X = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
X[:, 0] = torch.arange(ROWS) / ROWS
Y = torch.arange(ROWS) % 3


class BrokenOff(Exception):
    """What ends a fit on all ranks alike."""


class Net(nn.Module):
    """Two named optimizers, two groups, a single number, a buffer, and what nobody trains."""

    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fixed = nn.Linear(4, 4)
        self.fixed.requires_grad_(False)
        self.body = nn.Linear(4, 8)
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.head = nn.Linear(8, 3)
        self.register_buffer("batches", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.batches.add_(1)
        hidden = torch.tanh(self.body(x + self.fixed(x)))
        return self.head(hidden * self.scale)

    def set_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        groups = [
            {"params": self.fixed.parameters()},  # left out at ZeRO 1 to 3
            {"params": [self.body.weight]},
            {"params": [self.body.bias], "weight_decay": 0.0},
            {"params": [self.scale], "lr": 0.001},  # too little for two ranks
        ]
        return {
            "body": torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1),
            "head": torch.optim.SGD(self.head.parameters(), lr=0.1, momentum=0.9),
        }


class Look(harness.Callback):
    """Keeps the rows of each batch, and what the model said of them; may break off."""

    weight = 1000

    def __init__(self, after: int = 0) -> None:
        self.left = after
        self.seen: dict[int, list[Tensor]] = {}
        self.begun: ConsolidatedState | None = None

    def on_train_batch_begin(self) -> None:
        assert self.ctx.accelerator is not None
        if self.begun is None and self.ctx.accelerator.world_size == 1:
            state = copy.deepcopy(dict(self.ctx.accelerator.state_dict()))
            self.begun = ConsolidatedState([state])

    def on_train_batch_end(self) -> None:
        ctx = self.ctx
        assert ctx.accelerator is not None
        assert ctx.epoch is not None
        rows = ctx.accelerator.counted
        pred, number = ctx.pred.detach(), (ctx.input[:, :1] * ROWS).round()
        both = torch.cat([number, pred], 1)[:rows]
        self.seen.setdefault(ctx.epoch, []).append(both)
        ctx.log("looked", "train", {"rows": len(both)})
        self.left -= 1
        if self.left == 0:
            raise BrokenOff


def learner() -> harness.Learner:
    """What is trained in each shape."""
    metrics = {
        "accuracy": MulticlassAccuracy(num_classes=3, average="micro"),
        "auroc": MulticlassAUROC(num_classes=3),
    }
    return harness.setup(Net, loss=nn.CrossEntropyLoss(), metrics=metrics)


def fit(
    folder: Path, accelerator: Any, batch_size: int, after: int = 0
) -> tuple[Any, Look]:
    """Fit with a checkpoint at every second step, or go on from there."""
    torch.set_num_threads(1)
    look = Look(after)
    fitted = None
    try:
        fitted = learner().fit(
            (X, Y),
            EPOCHS,
            callbacks=[look, AutoResume(folder / "saved", every_n_steps=2)],
            accelerator=accelerator,
            dataloader_options={"batch_size": batch_size, "drop_last": False},
            seed=7,
            tracker={"runs_dir": folder / "runs", "delivery": False, "all_ranks": True},
            verbose=False,
        )
    except BrokenOff:
        assert after
    return fitted, look


def begun(
    folder: Path, accelerator: Any, make: Any = Net, **options: Any
) -> ConsolidatedState:
    """What a fit begins with that takes a part of what lies in the folder."""
    look = Look(after=1)
    resume = ResumeFromCheckpoint(folder / "saved", **options)
    with contextlib.suppress(BrokenOff):
        harness.setup(make, loss=nn.CrossEntropyLoss()).fit(
            (X, Y),
            EPOCHS,
            callbacks=[look, resume],
            accelerator=accelerator,
            dataloader_options={"batch_size": 8},
            tracker=False,
            verbose=False,
        )
    assert look.begun is not None
    return look.begun


def note(folder: Path, name: str, fitted: Any, look: Look, rank: int) -> None:
    """Write down what a fit ended with, for the test to compare."""
    found = {f"seen-{epoch}": torch.cat(rows) for epoch, rows in look.seen.items()}
    if fitted is not None:
        found |= dict(fitted.model.state_dict())
        for epoch, values in enumerate(fitted.records["metrics"]["train"], start=1):
            found[f"loss-{epoch}"] = torch.tensor(values["loss"]["head"])
            for what in ("accuracy", "auroc"):
                found[f"{what}-{epoch}"] = torch.tensor(values[what])
    save_file(found, folder / f"{name}-{rank}.safetensors")


def ended(lab: Lab, name: str) -> None:
    """A fit from its begin, or one that goes on with what lies in the folder."""
    fitted, look = fit(lab.folder, lab.make(), 4)
    note(lab.folder, name, fitted, look, lab.rank)


def broken_off(lab: Lab, name: str, batch_size: int = 4) -> None:
    """A fit that other ranks or another stage are to go on with."""
    _, look = fit(lab.folder, lab.make(), batch_size, after=3)
    note(lab.folder, name, None, look, lab.rank)


def other_stage(lab: Lab) -> None:
    """A fit goes on at another stage."""
    broken_off(lab, "first")
    assert lab.stage is not None
    ended(replace(lab, stage=(lab.stage + 1) % 4), "last")


CASES: dict[str, Callable[[Lab], None]] = {
    "whole": partial(ended, name="whole"),
    "broken": partial(broken_off, name="broken"),
    "gone_on": partial(ended, name="gone_on"),
    "other_stage": other_stage,
    "two": partial(broken_off, name="two", batch_size=6),
    "three": partial(ended, name="three"),
}
"""Every case, by name."""

PAIRS = ["whole", "broken", "gone_on", "other_stage"]
"""Those of two ranks."""
