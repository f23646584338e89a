#!/usr/bin/env python3
"""Cost of logging, compared with other loggers in one run.

    python scripts/bench/logging.py [--rounds 5] [--only calls stall disk export memory
                                     kill delivery] [--contenders run list ...]

Contenders that are not installed are left out. Ratios are to a bare list append of the
same tuple in the same round; figures are medians over the rounds.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

# This file must not hide the standard library's logging.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]

import argparse
import contextlib
import importlib
import importlib.util
import logging
import mmap
import os
import signal
import sqlite3
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

import tracking
from tracking.store import get_rank_dir

Loop = Callable[[int], object]


@dataclass(frozen=True)
class Contender:
    """A logger: how to make its loop of calls, and how to count the values that survive."""

    name: str
    calls: int
    points: int
    make: Callable[[Path], contextlib.AbstractContextManager[Loop]]
    count: Callable[[Path], int] | None = None
    needs: str = ""

    @property
    def is_there(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None


CONTENDERS: list[Contender] = []


def contender(name: str, calls: int, points: int = 1, needs: str = "", count=None):
    """Register a generator function that yields a loop."""

    def register(function):
        make = contextlib.contextmanager(function)
        CONTENDERS.append(Contender(name, calls, points, make, count, needs))
        return function

    return register


# ------------------------------------------------------------------------- contenders


@contender("list append", 200_000)
def list_append(folder: Path) -> Iterator[Loop]:
    rows: list[tuple] = []

    def loop(n):
        rows.clear()
        for i in range(n):
            rows.append(("metrics", "train", 0.5, i, None, i))

    yield loop


def count_arrow(folder: Path) -> int:
    path = folder / "x.arrow"
    with contextlib.suppress(pa.ArrowInvalid, OSError):
        return sum(batch.num_rows for batch in pa.ipc.open_stream(path.read_bytes()))
    return 0


@contender("Arrow, batches of 1024", 200_000, count=count_arrow)
def arrow_batches(folder: Path) -> Iterator[Loop]:
    schema = pa.schema(
        [
            ("what", "string"),
            ("set", "string"),
            ("value", "float64"),
            ("index", "int64"),
        ]
    )
    file = (folder / "x.arrow").open("wb")
    writer = pa.ipc.new_stream(file, schema)

    def loop(n):
        rows = []
        for i in range(n):
            rows.append(("metrics", "train", 0.5, i))
            if len(rows) == 1024:
                columns = [pa.array(c) for c in zip(*rows, strict=True)]
                writer.write_batch(pa.record_batch(columns, schema=schema))
                file.flush()
                rows.clear()

    yield loop
    writer.close()
    file.close()


def count_run(folder: Path) -> int:
    return tracking.list_runs(folder)[0].records(what="metrics").num_rows


def one_run(folder: Path, **options: Any) -> tracking.Run:
    return tracking.start(runs_dir=folder, delivery=False, **options)


@contender("Run.log, 1 scalar", 200_000, count=count_run)
def run_scalar(folder: Path) -> Iterator[Loop]:
    with one_run(folder) as run:

        def loop(n):
            for i in range(n):
                run.log("metrics", "train", 0.5, i, step=i)

        yield loop


@contender("Run.log, 10 scalars in a dict", 30_000, points=10)
def run_ten(folder: Path) -> Iterator[Loop]:
    values = {f"metric{i}": i + 0.5 for i in range(10)}
    with one_run(folder) as run:

        def loop(n):
            for i in range(n):
                run.log("metrics", "train", values, i, step=i)

        yield loop


@contender("Run.log_metric", 200_000)
def run_metric(folder: Path) -> Iterator[Loop]:
    with one_run(folder) as run:

        def loop(n):
            for i in range(n):
                run.log_metric("loss", 0.5, set="train", index=i, step=i)

        yield loop


@contender("ctx.log_metric", 100_000, needs="torch")
def context_metric(folder: Path) -> Iterator[Loop]:
    from harness.context import Context

    with one_run(folder) as run:
        context = Context(run=run)
        context.epoch = 1

        def loop(n):
            for _ in range(n):
                context.log_metric("loss", 0.5)

        yield loop


@contender("Run.log, string", 50_000)
def run_string(folder: Path) -> Iterator[Loop]:
    with one_run(folder) as run:

        def loop(n):
            for i in range(n):
                run.log("notes", "train", "a short text", i)

        yield loop


@contender("Run.log, CPU tensor", 30_000, needs="torch")
def run_tensor(folder: Path) -> Iterator[Loop]:
    import torch

    loss = torch.tensor(0.5)
    with one_run(folder) as run:

        def loop(n):
            for i in range(n):
                run.log("metrics", "train", loss, i)

        yield loop


@contender("Run.log, 1 scalar, durability='fsync'", 200)
def run_synced(folder: Path) -> Iterator[Loop]:
    with one_run(folder, durability="fsync") as run:

        def loop(n):
            for i in range(n):
                run.log("metrics", "train", 0.5, i, step=i)

        yield loop


def count_tensorboard(folder: Path) -> int:
    home = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = importlib.import_module(home)
    events = accumulator.EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "tensors": 0}
    )
    events.Reload()
    tags = events.Tags()
    return sum(len(events.Scalars(tag)) for tag in tags["scalars"])


@contender("TensorBoard", 5_000, needs="tensorboard", count=count_tensorboard)
def tensorboard(folder: Path) -> Iterator[Loop]:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:

        def loop(n):
            for i in range(n):
                writer.add_scalar("loss", 0.5, i)

        yield loop


def count_mlflow(folder: Path) -> int:
    with sqlite3.connect(folder / "mlflow.db") as database:
        return int(database.execute("select count(*) from metrics").fetchone()[0])


def mlflow_client(folder: Path):
    """An MLflow client and run in a new sqlite store."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.create_experiment("bench", str(folder / "artifacts"))
    return client, client.create_run(experiment).info.run_id


@contender("MLflow, log_metric", 100, needs="mlflow", count=count_mlflow)
def mlflow_sync(folder: Path) -> Iterator[Loop]:
    client, run_id = mlflow_client(folder)

    def loop(n):
        for i in range(n):
            client.log_metric(run_id, "loss", 0.5, step=i)

    yield loop


@contender("MLflow, log_metric asynchronous", 300, needs="mlflow", count=count_mlflow)
def mlflow_async(folder: Path) -> Iterator[Loop]:
    client, run_id = mlflow_client(folder)

    def loop(n):
        for i in range(n):
            done = client.log_metric(run_id, "loss", 0.5, step=i, synchronous=False)
            waiting.append(done)

    waiting: list = []
    yield loop
    for done in waiting:
        done.wait()


@contender("MLflow, log_batch of 1000", 3_000, needs="mlflow", count=count_mlflow)
def mlflow_batch(folder: Path) -> Iterator[Loop]:
    client, run_id = mlflow_client(folder)
    from mlflow.entities import Metric

    def loop(n):
        metrics = []
        for i in range(n):
            metrics.append(Metric("loss", 0.5, time.time_ns() // 10**6, i))
            if len(metrics) == 1000:
                client.log_batch(run_id, metrics)
                metrics.clear()

    yield loop


@contender("trackio", 2_000, needs="trackio")
def trackio_log(folder: Path) -> Iterator[Loop]:
    os.environ["TRACKIO_DIR"] = str(folder)
    import trackio

    trackio.init(project="bench", embed=False)

    def loop(n):
        for i in range(n):
            trackio.log({"loss": 0.5}, step=i)

    yield loop
    trackio.finish()


@contender("W&B offline", 2_000, needs="wandb")
def wandb_log(folder: Path) -> Iterator[Loop]:
    import wandb

    run = wandb.init(project="bench", mode="offline", dir=str(folder))

    def loop(n):
        for _ in range(n):
            run.log({"loss": 0.5})

    yield loop
    run.finish(quiet=True)


@contender("swanlab offline", 2_000, needs="swanlab")
def swanlab_log(folder: Path) -> Iterator[Loop]:
    import swanlab

    swanlab.init(project="bench", mode="offline", logdir=str(folder))

    def loop(n):
        for i in range(n):
            swanlab.log({"loss": 0.5}, step=i)

    yield loop
    swanlab.finish()


@contender("aim", 1_000, needs="aim")
def aim_log(folder: Path) -> Iterator[Loop]:
    from aim import Run

    run = Run(repo=str(folder))

    def loop(n):
        for i in range(n):
            run.track(0.5, name="loss", step=i)

    yield loop
    run.close()


# --------------------------------------------------------------------------- sections


def calls(args: argparse.Namespace) -> None:
    print("\nOne call from a tight loop: median and best us, ratio to a list append")
    wanted = [c for c in CONTENDERS if c.is_there and chosen(c, args)]
    floor = CONTENDERS[0]
    for c in wanted:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
            bare = stack.enter_context(floor.make(Path(folder)))
            loop = stack.enter_context(c.make(Path(folder)))
            loop(max(c.calls // 20, 2))
            base, own = [], []
            for _ in range(args.rounds):
                time.sleep(0.3)  # what still goes on in the background
                base.append(timed(bare, floor.calls))
                own.append(timed(loop, c.calls))
        ratio = statistics.median(x / y for x, y in zip(own, base, strict=True))
        print(
            f"  {c.name:40} {statistics.median(own):10.2f} {min(own):10.2f} {ratio:10.1f}",
            flush=True,
        )


def timed(loop: Loop, number: int) -> float:
    """Microseconds per call of a loop."""
    start = time.perf_counter()
    loop(number)
    return (time.perf_counter() - start) / number * 1e6


def chosen(c: Contender, args: argparse.Namespace) -> bool:
    words = args.contenders
    return not words or c.name == "list append" or any(word in c.name for word in words)


def stall(args: argparse.Namespace) -> None:
    print("\nWorst stall of the calling thread, ms (500,000 calls, 30 blocks)")

    def worst(call: Callable[[int], object], count: int) -> list[float]:
        taken = np.empty(count)
        for i in range(count):
            start = time.perf_counter_ns()
            call(i)
            taken[i] = time.perf_counter_ns() - start
        return [float(np.quantile(taken, q)) / 1e6 for q in (0.999, 0.99999, 1)]

    with tempfile.TemporaryDirectory() as folder, one_run(Path(folder)) as run:
        rows: list[tuple] = []
        contestants: dict[str, Callable[[int], object]] = {
            "list append": lambda i: rows.append(("metrics", "train", 0.5, i)),
            "nothing": lambda i: None,
            "Run.log": lambda i: run.log("metrics", "train", 0.5, i),
        }
        for _ in range(args.rounds):
            for name, call in contestants.items():
                rows.clear()
                found = worst(call, 500_000)
                print(
                    f"  {name:14} 99.9 % {found[0]:8.4f}  99.999 % {found[1]:8.4f}"
                    f"  worst {found[2]:8.3f}"
                )


def disk(args: argparse.Namespace) -> None:
    print("\nBytes a point, sealed: loss curves of an MLP on the handwritten digits")
    import torch
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    for kind in ("float32 losses", "losses averaged in float64"):
        torch.manual_seed(0)
        net = torch.nn.Sequential(
            torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 10)
        )
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
        with tempfile.TemporaryDirectory() as folder:
            run = one_run(Path(folder))
            step, mean = 0, 0.0
            for epoch in range(1, 401):
                for at in torch.randperm(1797).split(32):
                    loss = torch.nn.functional.cross_entropy(
                        net(images[at]), labels[at]
                    )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    step += 1
                    value = loss.item()
                    mean = 0.9 * mean + 0.1 * value
                    logged = value if kind.startswith("float32") else mean
                    run.log_step({"loss": logged}, step, set="train", epoch=epoch)
                run.log("metrics", "train", {"loss": mean}, epoch, epoch=epoch)
            run.finish()
            files = list(get_rank_dir(run.path, 0).glob("*.arrow"))
            size = sum(file.stat().st_size for file in files)
            points = tracking.open(run.path).records().num_rows
            print(f"  {kind:28} {size / points:6.2f} ({points} points)")


def export(args: argparse.Namespace) -> None:
    print("\nA million rows, seconds")
    rng = np.random.default_rng(0)
    losses, norms = rng.random(250_000).tolist(), rng.random(250_000).tolist()
    with tempfile.TemporaryDirectory() as folder:
        run = one_run(Path(folder))
        start = time.perf_counter()
        for step in range(250_000):
            values = {"loss": losses[step], "norm": norms[step], "lr": 1e-3, "acc": 0.5}
            run.log_step(values, step, set="train", epoch=step // 1000)
        print(f"  logged by log_step             {time.perf_counter() - start:6.3f}")
        run.finish()
        path = Path(folder) / "x.parquet"
        past = tracking.open(run.path)
        for _ in range(args.rounds):
            start = time.perf_counter()
            tracking.export([past], path)
            exported = time.perf_counter() - start
            start = time.perf_counter()
            pyarrow.parquet.read_table(path)
            read = time.perf_counter() - start
            start = time.perf_counter()
            past.records()
            records = time.perf_counter() - start
            print(
                f"  to Parquet {exported:6.3f}   Parquet read as a table {read:6.3f}"
                f"   journal read as a table {records:6.3f}"
            )
        print(f"  Parquet: {path.stat().st_size / 1e6:.2f} bytes a row")


MEMORY = """
import os, sys, time
from pathlib import Path
import tracking
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
run = tracking.start(runs_dir=sys.argv[1], delivery=False)
start, shown = time.perf_counter(), []
for step in range(5_000_001):
    run.log_step({"loss": step / 7}, step)
    if step in (100_000, 1_000_000, 2_000_000, 3_000_000, 4_000_000, 5_000_000):
        shown.append(f"{step // 1000}k: {resident():.0f}")
print("  resident MB after", ", ".join(shown), f"({time.perf_counter() - start:.1f} s)")
run.finish()
"""


def memory(args: argparse.Namespace) -> None:
    print("\nMemory over five million rows of log_step")
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", MEMORY, folder], check=True)


def kill(args: argparse.Namespace) -> None:
    print("\nValues that survive SIGKILL right after the last call returned")
    for c in CONTENDERS:
        if not (c.is_there and c.count and chosen(c, args)):
            continue
        number = min(5_000, c.calls)
        with tempfile.TemporaryDirectory() as folder:
            done = mmap.mmap(-1, 1)
            pid = os.fork()
            if not pid:
                with c.make(Path(folder)) as loop:
                    loop(number)
                    done[0] = 1
                    time.sleep(60)
            while not done[0]:
                time.sleep(0.001)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            print(f"  {c.name:40} {c.count(Path(folder)):6} of {number}")


def delivery(args: argparse.Namespace) -> None:
    print("\nDelivery into a fresh sqlite store")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        run = tracking.start(runs_dir=Path(folder) / "runs")
        assert run.mlflow_run_id
        number = 100_000
        start = time.perf_counter()
        for step in range(number // 4):
            values = {"loss": 0.5 + step, "norm": 1.0, "lr": 1e-3, "acc": 0.5}
            run.log_step(values, step, set="train")
        logged = time.perf_counter() - start
        run.finish(wait_s=300)
        taken = time.perf_counter() - start
        print(f"  {number} rows logged in {logged:.2f} s, delivered in {taken:.1f} s")
        print(f"  {number / taken:.0f} points/s")


SECTIONS = {f.__name__: f for f in (kill, calls, stall, disk, export, memory, delivery)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[*SECTIONS])
    parser.add_argument("--contenders", nargs="+", default=[])
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    for name, section in SECTIONS.items():
        if name in args.only:
            section(args)


if __name__ == "__main__":
    main()
