#!/usr/bin/env python3
"""Cost of the loop: Learner.fit compared with a hand-written loop, epoch by epoch in one run.

    python scripts/bench/loop.py [--epochs 40]

The work is an MLP 64-128-10 on scikit-learn's digits: batches of 32, validation after each
epoch, one thread. The hand-written loop adds up loss and hits as tensors, reads them once an
epoch, and tracks nothing. harness runs with a torchmetrics accuracy, with and without a journal
and a progress bar (drawn on a pseudo-terminal), on three forms of the same data:

- rows: a ``DataLoader`` of a data set that gives one row at a time, for both loops;
- tensors in a loader: a ``DataLoader`` of a ``TensorDataset``, for both loops;
- tensors: the harness gets the tensors, the raw loop the loader of them.

After each epoch of the fit the hand-written loop runs one epoch, so that what else the machine
does meets both. A ratio is that of an epoch of the fit to the epoch of the raw loop after it:
the median, and that of the quickest epochs. Where others compute, the processor time of the
training thread says more than the clock. "once" is the processor time of a fit of one epoch,
less that epoch. "calls" are the Python functions that a training step calls, torch's own
included; they are the same in each run, and the hand-written loop has its own line.
"""

from __future__ import annotations

# ruff: noqa: E402
import sys

# The logging.py in this folder must not hide the standard library's.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]

import argparse
import os
import pty
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from types import FrameType

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import harness
import tracking

digits = load_digits()
IMAGES = torch.tensor(digits.data, dtype=torch.float32) / 16
LABELS = torch.tensor(digits.target)
TRAIN = TensorDataset(IMAGES[:1437], LABELS[:1437])
VALID = TensorDataset(IMAGES[1437:], LABELS[1437:])
STEPS = len(TRAIN) // 32


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Rows(Dataset):
    """Rows that are made one by one, as most data sets make them."""

    def __init__(self, tensors: TensorDataset) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.tensors[row]


def loaders(train: Dataset, valid: Dataset) -> tuple[DataLoader, DataLoader]:
    shuffled = DataLoader(train, 32, shuffle=True, drop_last=True)
    return shuffled, DataLoader(valid, 32)


class Raw:
    """The loop by hand, an epoch at a time."""

    def __init__(self, train: DataLoader, valid: DataLoader) -> None:
        torch.manual_seed(0)
        self.train, self.valid = train, valid
        self.net, self.loss_fn = Net(), nn.CrossEntropyLoss()
        self.opt = torch.optim.AdamW(self.net.parameters())

    def run_epoch(self) -> list[float]:
        return [*self.run_split(self.train), *self.run_split(self.valid)]

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def run_split(self, split: DataLoader) -> tuple[float, float]:
        net, opt, loss_fn = self.net, self.opt, self.loss_fn
        is_training = split is self.train
        net.train(is_training)
        total, right, rows = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
        with torch.set_grad_enabled(is_training):
            for x, y in split:
                pred = net(x)
                loss = loss_fn(pred, y)
                if is_training:
                    opt.zero_grad()
                    self.backward(loss)
                    opt.step()
                total += loss.detach() * len(y)
                right += (pred.argmax(1) == y).sum()
                rows += len(y)
        return total.item() / rows, right.item() / rows


LEARNER = harness.setup(
    Net,
    loss=nn.CrossEntropyLoss(),
    optimizer=torch.optim.AdamW,
    metrics={"accuracy": MulticlassAccuracy(num_classes=10)},
)

Times = tuple[int, int]
"""Nanoseconds of the training thread's processor time, and of the clock."""


def now() -> Times:
    return time.thread_time_ns(), time.perf_counter_ns()


def since(began: Times) -> Times:
    cpu, wall = now()
    return cpu - began[0], wall - began[1]


class Beside(harness.Callback):
    """Runs an epoch of the raw loop after each of the fit, and takes the times of both."""

    weight = float("inf")

    def __init__(self, raw: Raw) -> None:
        self.raw = raw
        self.ours: list[Times] = []
        self.theirs: list[Times] = []
        self.left: Times = (0, 0)

    def on_epoch_end(self) -> None:
        if self.ctx.epoch > 1:
            self.ours.append(since(self.left))
        began = now()
        self.raw.run_epoch()
        if self.ctx.epoch > 1:
            self.theirs.append(since(began))
        self.left = now()


class Calls(harness.Callback):
    """Counts the Python functions that the steps in the middle of an epoch call."""

    weight = float("inf")

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self) -> None:
        if self.ctx.iter == 2:
            sys.setprofile(self.note)
        if self.ctx.iter == STEPS - 2:
            sys.setprofile(None)

    def note(self, frame: FrameType, event: str, arg: object) -> None:
        self.count += event == "call"

    @property
    def per_step(self) -> float:
        return self.count / (STEPS - 4)


def count_raw(train: DataLoader) -> float:
    """Python functions that a step of the raw loop calls."""
    calls, raw = Calls(), Raw(train, train)
    raw.run_epoch()
    sys.setprofile(calls.note)
    raw.run_split(train)
    sys.setprofile(None)
    return calls.count / len(train)


def drain(number: int) -> None:
    try:
        while os.read(number, 65536):
            pass
    except OSError:
        pass


def describe(ours: Sequence[int], theirs: Sequence[int]) -> str:
    """The median ratio, and that of the quickest epochs."""
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    return f"{statistics.median(ratios):7.2f} {min(ours) / min(theirs):7.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader, writer = pty.openpty()
    threading.Thread(target=drain, args=(reader,), daemon=True).start()
    terminal = os.fdopen(writer, "w")
    rows = loaders(Rows(TRAIN), Rows(VALID))
    tensors = loaders(TRAIN, VALID)
    forms = {
        "rows": (rows, rows),
        "tensors in a loader": (tensors, tensors),
        "tensors": (tensors, (TRAIN, VALID)),
    }
    titles = ("cpu", "best", "wall", "best", "raw us", "once ms", "calls")
    print(f"{'':40} {' '.join(f'{title:>7}' for title in titles)}")
    with tempfile.TemporaryDirectory() as folder:
        run = tracking.start(runs_dir=folder, delivery=False)
        ways = {
            "quiet, no tracking": (False, False),
            "tracking + progress": (run, True),
        }

        def fit(data: tuple, epochs: int, way: str, *callbacks: harness.Callback):
            (train, valid), (tracker, verbose) = data, ways[way]
            errors, sys.stderr = sys.stderr, terminal if verbose else sys.stderr
            LEARNER.fit(
                train,
                epochs,
                valid,
                callbacks=callbacks,
                seed=0,
                tracker=tracker,
                verbose=verbose,
            )
            sys.stderr = errors

        for form, (for_raw, data) in forms.items():
            print(f"{f'raw loop, {form}':40} {count_raw(for_raw[0]):55.0f}")
            for way in ways:
                beside, calls, onces = Beside(Raw(*for_raw)), Calls(), []
                fit(data, options.epochs + 1, way, beside)
                fit(data, 1, way, calls)
                for _ in range(5):
                    began = now()
                    fit(data, 1, way)
                    onces.append(since(began)[0])
                (cpu, wall), (raw_cpu, raw_wall) = (
                    zip(*times, strict=True) for times in (beside.ours, beside.theirs)
                )
                once_ms = (min(onces) - min(cpu)) / 1e6
                ratios = f"{describe(cpu, raw_cpu)} {describe(wall, raw_wall)}"
                rest = f"{min(raw_cpu) / STEPS / 1e3:7.0f} {once_ms:7.1f}"
                print(f"{f'{form}, {way}':40} {ratios} {rest} {calls.per_step:7.0f}")
        run.finish()


if __name__ == "__main__":
    main()
