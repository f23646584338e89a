#!/usr/bin/env python3
"""What each part of a step costs, in nanoseconds, beside the plainest thing of its kind.

    python scripts/bench/parts.py [--rounds 5]

All parts are measured inside of one running fit: an MLP 64-128-10, batches of 32, one thread,
tracked without delivery. Figures are the processor time of the training thread, medians of
interleaved rounds, each the best of 20 short ones: what else the machine does hardly shows.
"""

from __future__ import annotations

# ruff: noqa: E402
import sys

# The logging.py in this folder must not hide the standard library's.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torchmetrics.classification import MulticlassAccuracy

import harness
from harness.callbacks import Progress
from harness.data.batch import move
from harness.metrics.loss import LossAverage

ROWS, BATCH = 2048, 32
Parts = dict[str, tuple[int, Callable[[], object]]]


class Plain:
    """An object whose fields are set as those of any other."""

    def __init__(self) -> None:
        self.loss: object = None


class Heard(harness.Callback):
    """Declares an event that nobody hears, and one that it hears itself."""

    events = ("on_nothing", "on_something")

    def on_something(self) -> None:
        """Do nothing."""


class Measure(harness.Callback):
    """Measures the parts of the fit that it belongs to, at the end of an epoch's training."""

    def __init__(self, rounds: int) -> None:
        self.rounds = rounds
        self.found: dict[str, list[float]] = {}

    def on_train_batch_end(self) -> None:
        if self.ctx.iter == ROWS // BATCH:
            for number in range(self.rounds + 1):
                for name, (calls, call) in make_parts(self.ctx).items():
                    took = measure(calls, call)
                    if number:
                        self.found.setdefault(name, []).append(took)


def measure(calls: int, call: Callable[[], object]) -> float:
    """Nanoseconds of a call, in processor time of this thread: the best of short rounds."""
    found = []
    for _ in range(20):
        began = time.thread_time_ns()
        for _ in range(calls // 20):
            call()
        found.append((time.thread_time_ns() - began) / (calls // 20))
    return min(found)


def make_parts(ctx: Any) -> Parts:
    """Return the parts: how often each is called, and the call."""
    plain, loss = Plain(), ctx.loss
    accuracy = MulticlassAccuracy(num_classes=10)
    pred, target = ctx.pred.detach(), ctx.target
    metrics, average = ctx.metrics["train"], LossAverage()
    progress = next(one for one in ctx.callbacks if isinstance(one, Progress))
    rows: list[object] = []

    def set_plain() -> None:
        plain.loss = loss

    def set_field() -> None:
        ctx.loss = loss

    def update_plain() -> None:
        metrics.update(pred, target, loss, BATCH)

    return {
        "a call of an empty function": (100_000, lambda: None),
        "event without listener": (100_000, lambda: ctx.call_callbacks("on_nothing")),
        "event with one listener": (50_000, lambda: ctx.call_callbacks("on_something")),
        "field of a plain object": (100_000, set_plain),
        "field of the context": (100_000, set_field),
        "append to a list": (
            100_000,
            lambda: rows.append(("metrics", "train", 0.5, 1)),
        ),
        "ctx.log_step of one number": (20_000, lambda: ctx.log_step({"x": 0.5})),
        "ctx.run.log_metric": (
            50_000,
            lambda: ctx.run.log_metric("x", 0.5, set="train"),
        ),
        "torchmetrics' own update": (500, lambda: accuracy.update(pred, target)),
        "metrics and loss of a batch": (2_000, update_plain),
        "loss of a batch": (5_000, lambda: average.update(loss, BATCH)),
        "progress of a batch, no bar drawn": (50_000, progress.on_train_batch_end),
        "moving a batch that is there": (50_000, lambda: move(ctx.batch, ctx.device)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    learner = harness.setup(
        lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
        loss=nn.CrossEntropyLoss(),
        optimizer=torch.optim.SGD,
        metrics={"accuracy": MulticlassAccuracy(num_classes=10)},
    ).set_opt_hparams(lr=0.1)
    data = torch.randn(ROWS, 64), torch.randint(10, (ROWS,))
    measured = Measure(options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        learner.fit(
            data,
            epochs=1,
            callbacks=[Heard(), measured],
            tracker={"runs_dir": folder, "delivery": False},
            verbose=False,
        )
    for name, found in measured.found.items():
        low, high = min(found), max(found)
        print(
            f"{name:36} {statistics.median(found):9,.0f} ns  ({low:,.0f} to {high:,.0f})"
        )


if __name__ == "__main__":
    main()
