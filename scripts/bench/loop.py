#!/usr/bin/env python3
"""Cost of the loop: Learner.fit compared with a hand-written loop, in one run.

    python scripts/bench/loop.py [--rounds 7] [--epochs 10]

The work is an MLP 64-128-10 on scikit-learn's digits: batches of 32, validation after each
epoch, one thread. The hand-written loop adds up loss and hits as tensors, reads them once an
epoch, and tracks nothing. harness runs with a torchmetrics accuracy, with and without a journal
and a progress bar (drawn on a pseudo-terminal), on three forms of the same data:

- rows: a ``DataLoader`` of a data set that gives one row at a time, for both loops;
- tensors in a loader: a ``DataLoader`` of a ``TensorDataset``, for both loops;
- tensors: the harness gets the tensors, the raw loop the loader of them.

Each fit is made with `epochs` and with twice as many: the difference is the cost per step, and
what is left the cost once. A ratio is to the raw loop of the same round and form; the figures
are medians.
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
from torch.utils.data import DataLoader, Dataset, TensorDataset
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


def raw(train: DataLoader, valid: DataLoader, epochs: int) -> list[float]:
    torch.manual_seed(0)
    net = Net()
    opt, loss_fn = torch.optim.AdamW(net.parameters()), nn.CrossEntropyLoss()
    figures = []
    for _ in range(epochs):
        for split in (train, valid):
            is_training = split is train
            net.train(is_training)
            total, right, rows = torch.zeros(()), torch.zeros((), dtype=torch.int64), 0
            with torch.set_grad_enabled(is_training):
                for x, y in split:
                    pred = net(x)
                    loss = loss_fn(pred, y)
                    if is_training:
                        opt.zero_grad()
                        loss.backward()
                        opt.step()
                    total += loss.detach() * len(y)
                    right += (pred.argmax(1) == y).sum()
                    rows += len(y)
            figures += [total.item() / rows, right.item() / rows]
    return figures


LEARNER = harness.setup(
    Net,
    loss=nn.CrossEntropyLoss(),
    optimizer=torch.optim.AdamW,
    metrics={"accuracy": MulticlassAccuracy(num_classes=10)},
)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def two_lengths(work: Callable[[int], object], epochs: int) -> tuple[float, float]:
    """Seconds of the work for so many epochs, and for twice as many."""
    return seconds(lambda: work(epochs)), seconds(lambda: work(2 * epochs))


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
    rows = loaders(Rows(TRAIN), Rows(VALID))
    tensors = loaders(TRAIN, VALID)
    forms = {
        "rows": (rows, rows),
        "tensors in a loader": (tensors, tensors),
        "tensors": (tensors, (TRAIN, VALID)),
    }
    figures: dict[str, list[tuple[float, float]]] = {}
    bases: dict[str, list[float]] = {}
    steps = epochs * (len(TRAIN) // 32)
    with tempfile.TemporaryDirectory() as folder:
        run = tracking.start(runs_dir=folder, delivery=False)
        ways = {
            "quiet, no tracking": (False, False),
            "tracking + progress": (run, True),
        }

        def fit(data: object, valid: object, epochs: int, way: str) -> None:
            tracker, verbose = ways[way]
            errors, sys.stderr = sys.stderr, terminal if verbose else sys.stderr
            LEARNER.fit(data, epochs, valid, seed=0, tracker=tracker, verbose=verbose)
            sys.stderr = errors

        for number in range(options.rounds + 1):
            for form, (for_raw, data) in forms.items():
                short, long = two_lengths(lambda n: raw(*for_raw, n), epochs)  # noqa: B023
                base = long - short
                if number:
                    bases.setdefault(form, []).append(base)
                for way in ways:
                    short, long = two_lengths(lambda n: fit(*data, n, way), epochs)  # noqa: B023
                    ratio = (long - short) / base
                    once = short - (long - short)
                    if number:
                        found = figures.setdefault(f"{form}, {way}", [])
                        found.append((ratio, once))
        run.finish()
    for form, took in bases.items():
        per_step = statistics.median(took) / steps * 1e6
        print(f"raw loop, {form:20} {per_step:.0f} us a step")
    print(f"{'':40} {'per step':>8} {'':16} {'once':>8}")
    for name, pairs in figures.items():
        ratios, onces = zip(*pairs, strict=True)
        spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
        shown = f"{statistics.median(onces) * 1e3:.1f} ms"
        print(f"{name:40} {statistics.median(ratios):8.2f} {spread:16} {shown:>8}")


if __name__ == "__main__":
    main()
