#!/usr/bin/env python3
"""Speed of delivery to MLflow, compared with MLflow's own bulk call for the same points.

    python scripts/bench/delivery.py [--points 20000] [--rounds 3] [--fits 40]

Measures bare ``log_batch`` calls of 1000 points into a sqlite database, our delivery of the
same number of points from a journal, the time until a run's page exists, what training
on one core takes while a process delivers what it logs, compared with no delivery, and
many short fits in a program of their own, until MLflow has them all.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

# The logging.py in this folder must not hide the standard library's.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]

import os

# Before NumPy is imported: training leaves the other core to the delivery process.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import contextlib
import gc
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

import tracking
from tracking.delivery import worker as delivery_worker
from tracking.delivery.worker import DeliveryWorker, lower_priority
from tracking.mlflow_store.client import Point, StoreClient, prepare_environment
from tracking.mlflow_store.runs import RunResolver

KEYS = 10


def journal(folder: Path, num_points: int) -> Path:
    """A run with this many points, of ten metrics."""
    run = tracking.start(runs_dir=folder / "runs", delivery=False)
    for i in range(num_points // KEYS):
        values = {f"m{k}": 1.0 / (1 + i + k) for k in range(KEYS)}
        run.log("metrics", "train", values, index=i)
    run.finish()
    return run.path


def bare_s(folder: Path, cache: Path, num_points: int) -> float:
    """Seconds of ``log_batch`` alone."""
    remote = StoreClient(f"sqlite:///{folder}/bare.db", cache)
    run = remote.create_run(remote.experiment_id("bench"), "bare", 1, {})
    now = time.time_ns() // 1_000_000
    points = [
        Point(f"train/m{k}", 1.0 / (1 + i + k), now + i, i)
        for i in range(num_points // KEYS)
        for k in range(KEYS)
    ]
    start = time.perf_counter()
    for first in range(0, num_points, 1000):
        remote.send(run.run_id, points[first : first + 1000])
    return time.perf_counter() - start


def delivered_s(folder: Path, cache: Path, num_points: int) -> float:
    """Seconds of a delivery, from the journal to the finished MLflow run."""
    path = journal(folder, num_points)
    uri = f"sqlite:///{folder}/delivered.db"
    remote = StoreClient(uri, cache)
    worker = DeliveryWorker(
        path,
        RunResolver(path, uri, lambda _: remote),
        patience_s=0,
    )
    start = time.perf_counter()
    worker.deliver()
    seconds = time.perf_counter() - start
    assert worker.num_sent == num_points
    return seconds


def page_s(folder: Path) -> float:
    """Seconds from the start of a run to its page in a new store."""
    with contextlib.chdir(folder):
        start = time.perf_counter()
        with tracking.start(experiment="bench", runs_dir="runs") as run:
            assert run.mlflow_run_id
            return time.perf_counter() - start


def training_s(folder: Path, num_steps: int, *, delivery: bool) -> float:
    """Seconds of steps that compute for half a millisecond and log a value."""
    matrix = np.random.default_rng(0).random((180, 180))
    with contextlib.chdir(folder):
        options = {"experiment": "beside", "runs_dir": "runs", "delivery": delivery}
        with tracking.start(**options) as run:
            if delivery:
                assert run.mlflow_run_id  # MLflow is imported
            start = time.perf_counter()
            for step in range(num_steps):
                run.log_step(
                    {"loss": float((matrix @ matrix)[0, 0]) / (step + 1)}, step
                )
            seconds = time.perf_counter() - start
        run.wait()
    return seconds


FITS = """
import os, sys, time
import torch, harness
from torch import nn
from tracking.delivery import waiting

torch.set_num_threads(1)
x = torch.randn(64, 8)
learner = harness.setup(lambda: nn.Linear(8, 1), loss=nn.MSELoss(), optimizer=torch.optim.SGD)
options = {"valid_data": None, "verbose": False, "dataloader_options": {"batch_size": 32}}
learner.fit((x, x[:, :1]), 1, tracker=False, **options)
start = time.perf_counter()
for seed in range(int(sys.argv[1])):
    learner.fit((x, x[:, :1]), 12, seed=seed, **options)
fitted = time.perf_counter() - start
waiting.wait_at_end()
delivered = time.perf_counter() - start
ticks = os.sysconf("SC_CLK_TCK")
busy = 0.0
for process in waiting._deliveries._processes:
    with open(f"/proc/{process.pid}/stat") as file:
        busy += sum(map(int, file.read().rpartition(")")[2].split()[11:13])) / ticks
assert not waiting._deliveries.list_unsent()
print(fitted, delivered, time.process_time(), busy)
"""
"""A program of short fits: prints seconds of the fits and until MLflow has all, and
processor seconds of this process, imports included, and of its delivery."""


def fits_s(folder: Path, num_fits: int) -> list[float]:
    """Seconds of a program of short fits; see `FITS`."""
    command = [sys.executable, "-c", FITS, str(num_fits)]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root}
    output = subprocess.check_output(
        command, cwd=folder, env=environment, stderr=subprocess.DEVNULL, text=True
    )
    return [float(word) for word in output.split()]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--points", type=int, default=20_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8_000, help="of training")
    parser.add_argument("--fits", type=int, default=40, help="in one program")
    options = parser.parse_args()
    prepare_environment()
    collecting = gc.get_threshold()
    words = ("bare log_batch", "delivery", "page", "alone", "beside")
    times: dict[str, list[float]] = {word: [] for word in words}
    fits: list[list[float]] = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        os.environ["XDG_CACHE_HOME"] = name
        cache = Path(name) / "luz-harness"
        for number in range(options.rounds + 1):
            folder = Path(name) / str(number)
            folder.mkdir()
            bare = bare_s(folder, cache, options.points)
            lower_priority(0)  # as the process does
            delivered = delivered_s(folder, cache, options.points)
            gc.unfreeze()
            gc.set_threshold(*collecting)
            delivery_worker._tune_process.cache_clear()  # for the next round
            page = page_s(folder)
            alone = training_s(folder, options.steps, delivery=False)
            beside = training_s(folder, options.steps, delivery=True)
            fits.append(fits_s(folder, options.fits))
            if number:  # the first round warms up
                found = (bare, delivered, page, alone, beside)
                for word, seconds in zip(words, found, strict=True):
                    times[word].append(seconds)
    print(
        f"{options.points} points of {KEYS} metrics, median of {options.rounds} rounds"
    )
    for word in ("bare log_batch", "delivery"):
        rates = [options.points / seconds for seconds in times[word]]
        print(f"{word:>16}: {statistics.median(rates):8,.0f} points/s")
    ratios = [
        a / b for a, b in zip(times["delivery"], times["bare log_batch"], strict=True)
    ]
    print(f"{'delivery / bare':>16}: {statistics.median(ratios):8.2f} of its time")
    ratios = [a / b for a, b in zip(times["beside"], times["alone"], strict=True)]
    print(
        f"{'training beside':>16}: {statistics.median(ratios):8.2f} of training alone"
    )
    print(f"{'page after':>16}: {statistics.median(times['page']):8.2f} s")
    names = ("fitted", "in MLflow", "processor time", "of delivery")
    best = map(min, zip(*fits, strict=True))
    shown = ", ".join(f"{n} {s:.2f} s" for n, s in zip(names, best, strict=True))
    print(f"{options.fits} short fits, quickest of each: {shown}")


if __name__ == "__main__":
    main()
