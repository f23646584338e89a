#!/usr/bin/env python3
"""Cost of the loop: Learner.fit compared with a hand-written loop, in one run.

    python scripts/bench/loop.py [--rounds 7] [--epochs 10]

The work is an MLP 64-128-10 on scikit-learn's digits: batches of 32, validation after each
epoch, one thread. The hand-written loop computes loss and accuracy itself and tracks nothing.
harness runs with a torchmetrics accuracy, with and without a journal and a progress bar
(drawn on a pseudo-terminal). Each ratio is to the raw loop of the same round; the figure is
the median.
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
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import harness
import tracking

digits = load_digits()
IMAGES = torch.tensor(digits.data, dtype=torch.float32) / 16
LABELS = torch.tensor(digits.target)
TRAIN = TensorDataset(IMAGES[:1437], LABELS[:1437])
VALID = TensorDataset(IMAGES[1437:], LABELS[1437:])


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def loaders() -> tuple[DataLoader, DataLoader]:
    train = DataLoader(TRAIN, 32, shuffle=True, drop_last=True)
    return train, DataLoader(VALID, 32)


def raw(epochs: int) -> None:
    torch.manual_seed(0)
    net = Net()
    opt, loss_fn = torch.optim.AdamW(net.parameters()), nn.CrossEntropyLoss()
    train, valid = loaders()
    for _ in range(epochs):
        net.train()
        total, right, rows = 0.0, 0, 0
        for x, y in train:
            pred = net(x)
            loss = loss_fn(pred, y)
            opt.zero_grad()
            loss.backward()
            opt.step()
            total += loss.item() * len(y)
            right += int((pred.argmax(1) == y).sum())
            rows += len(y)
        net.eval()
        with torch.no_grad():
            for x, y in valid:
                pred = net(x)
                total += loss_fn(pred, y).item() * len(y)
                right += int((pred.argmax(1) == y).sum())


LEARNER = harness.setup(
    Net,
    loss=nn.CrossEntropyLoss(),
    optimizer=torch.optim.AdamW,
    metrics={"accuracy": MulticlassAccuracy(num_classes=10)},
)


def own_loader(epochs: int, run: object, verbose: bool) -> None:
    train, valid = loaders()
    LEARNER.fit(train, epochs, valid, seed=0, tracker=run, verbose=verbose)


def tensors(epochs: int, run: object, verbose: bool) -> None:
    LEARNER.fit(TRAIN, epochs, VALID, seed=0, tracker=run, verbose=verbose)


def seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def drain(number: int) -> None:
    try:
        while os.read(number, 65536):
            pass
    except OSError:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=10)
    options = parser.parse_args()
    torch.set_num_threads(1)
    reader, writer = pty.openpty()
    threading.Thread(target=drain, args=(reader,), daemon=True).start()
    terminal, epochs = os.fdopen(writer, "w"), options.epochs
    ratios: dict[str, list[float]] = {}
    steps = epochs * (len(TRAIN) // 32)
    raws = []
    with tempfile.TemporaryDirectory() as folder:
        run = tracking.start(runs_dir=folder, delivery=False)
        quiet = [
            ("quiet, no tracking", False, False),
            ("tracking + progress", run, True),
        ]
        for number in range(options.rounds + 1):
            base = seconds(lambda: raw(epochs))
            for text, tracker, verbose in quiet:
                for name, work in (
                    ("own DataLoader", own_loader),
                    ("tensors", tensors),
                ):
                    errors, sys.stderr = sys.stderr, terminal if verbose else sys.stderr
                    took = seconds(lambda: work(epochs, tracker, verbose))  # noqa: B023
                    sys.stderr = errors
                    if number:
                        ratios.setdefault(f"{name}, {text}", []).append(took / base)
            if number:
                raws.append(base)
        run.finish()
    print(f"raw loop: {statistics.median(raws) / steps * 1e6:.0f} us per training step")
    for name, found in ratios.items():
        low, high = min(found), max(found)
        print(f"{name:36} {statistics.median(found):.2f}  ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
