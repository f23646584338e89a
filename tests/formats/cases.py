"""What the kept files contain; nothing here depends on how the packages are arranged."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

TIME_US = 1_764_000_000_000_000
"""Time of the first row; each further one is logged 1,500 us later."""

VALUES: list[tuple[str, str, Any, dict[str, int]]] = [
    ("metrics", "train", 0.5, {"index": 1, "epoch": 1, "step": 10}),
    ("metrics", "train", {"loss": 0.1, "more": {"a": -0.0, "b": 5e-324}}, {"index": 1}),
    ("metrics", "valid", {"loss": math.nan, "up": math.inf, "down": -math.inf}, {}),
    (
        "metrics",
        "valid",
        {"loss": 2**53 + 1, "count": -7, "is_best": True},
        {"step": 3},
    ),
    ("params", "", {"lr": 1e-3, "name": "Größe \U0001f98a", "empty": {}}, {}),
    ("params", "", {"layers": [64, None, math.nan, {"$numberDouble": "1"}]}, {}),
    ("tags", "", {"note": "", "surrogate-free": '\x00\n"quoted"'}, {}),
    ("other", "s", {"array": np.arange(6.0).reshape(2, 3), "int8": np.int8(-3)}, {}),
    ("other", "s", {"int": 10**30, "minus": -(10**400), "none": None}, {"epoch": 2}),
    ("metrics", "train", {"loss": 1 / 3}, {"index": 2, "epoch": 2, "step": 2**40}),
]
"""``what``, ``set``, value and counts of the logged values of the small journal."""

NUM_MANY = 5000
"""Rows of the larger journal, whose segment has two batches."""


def many_rows() -> list[tuple[str, float]]:
    """Return name and value of the rows of the larger journal."""
    return [(f"n{i % 3}", (i % 97) / 8) for i in range(NUM_MANY)]


MANIFEST: dict[str, Any] = {
    "id": "20261122-235901-digits-amber-fox-3f2a",
    "name": "digits-amber-fox",
    "path": "/home/ada/digits/runs/20261122-235901-digits-amber-fox-3f2a",
    "keys": 2,
    "num_fits": 1,
    "experiment": "Größe",
    "note": None,
    "created": "2026-11-22T23:59:01.000250+00:00",
    "ended": "2026-11-23T00:10:00+00:00",
    "status": "failed",
    "error": {"type": "ValueError", "message": 'expected "a"\nor b'},
    "command": ["train.py", "--lr", "0.1"],
    "cwd": "/home/ada/digits",
    "host": "engine",
    "user": "ada",
    "pid": 1815,
    "python": "3.11.7",
    "platform": "Linux-6.1-x86_64",
    "devices": ["cpu"],
    "packages": {"torch": "2.13.0"},
    "git": {"commit": "0" * 40, "branch": "main", "dirty": True, "remote": None},
    "mlflow": {"run_id": "abc", "borrowed": True},
    "deliver": True,
    "delivery": {"max_points": 1000},
    "resumed": [{"time": "2026-11-23T00:05:00+00:00", "status": "killed"}],
    "extra": {"harness": {"fits": 1}, "best": math.inf, "seed": 2**80},
}

DELIVERY: dict[str, Any] = {
    "phase": "waiting",
    "run_path": "/runs/x",
    "tracking_uri": "http://localhost:5000",
    "experiment_id": "3",
    "mlflow_run_id": "0123456789abcdef",
    "page": "http://localhost:5000/#/experiments/3/runs/0123456789abcdef",
    "delivered": 4711,
    "behind": 12,
    "error": "the server does not answer: Größe",
    "pid": 1815,
    "updated": "2026-11-22T23:59:02+00:00",
    "flags": {"steps out of range": 3, "names": ["a", "b"]},
    "names": {"train/loss-1a2b": ["metrics", "train", "loss "]},
    "superseded": ["fedcba9876543210"],
}


class Grid(nn.Module):
    """A model whose arithmetic is exact in float32 on any processor.

    Inputs are multiples of 1/2 and targets of 1/8; the gradient of the absolute error is
    a sign times an input, and the learning rate a power of two. So weights, momenta and
    losses are multiples of small powers of two with few bits, every sum of them is exact,
    and neither the order of additions nor a fused multiply-add can change a result.
    """

    __module__ = "formats"  # recorded in the checkpoint

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -0.25, 1.0, 0.75]))
        self.bias = nn.Parameter(torch.tensor(0.125))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).sum(-1) + self.bias

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        return (pred - target).abs().mean()


def grid_data() -> tuple[Tensor, Tensor]:
    """Return 16 inputs and targets."""
    n = torch.arange(64, dtype=torch.float32)
    x = ((n * 7) % 9 - 4).reshape(16, 4) / 2
    return x, ((torch.arange(16) * 5) % 11 - 5).float() / 8


FIT: dict[str, Any] = {"epochs": 2, "seed": 7, "verbose": False}
LOADER: dict[str, Any] = {"batch_size": 4}
OPT: dict[str, Any] = {"lr": 2.0**-4, "momentum": 0.5}
