#!/usr/bin/env python3
"""How cost grows with rows, names, steps, epochs and runs.

    python scripts/bench/scale.py [--small] [--only rows --only names ...]

Each size is measured in a process of its own: seconds of processor time, microseconds for each
row, name, step, epoch or run, and how much the memory of the process grew at its highest. The
ratio is to the time for each unit at the smallest size: what is linear has 1 or less, and what
is quadratic has the ratio of the sizes. Ends with 1 if a ratio at the largest size is above 3.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys

# The logging.py in this folder must not hide the standard library's.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]

import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

import tracking

LIMIT = 3.0
EPOCHS = 20

Times = dict[str, float]


@contextmanager
def timed(times: Times, word: str) -> Iterator[None]:
    """Add the seconds of processor time of the block, with those of its threads and commands."""
    start = time.process_time() + sum(os.times()[2:4])
    yield
    times[word] = time.process_time() + sum(os.times()[2:4]) - start


def rows(number: int, folder: Path) -> Times:
    """Rows of one step each: logged, continued, summed up and exported."""
    times: Times = {}
    run = tracking.start(runs_dir=folder, delivery=False)
    with timed(times, "log"):
        for step in range(number):
            run.log_step({"loss": 1 / (1 + step)}, step)
    run.finish()
    with timed(times, "continue"):
        tracking.start(runs_dir=folder, run_id=run.id, delivery=False).finish()
    past = tracking.open(run.path)
    with timed(times, "summary"):
        past.summary()
    with timed(times, "export"):
        tracking.export([past], folder / "rows.parquet")
    return times


def names(number: int, folder: Path) -> Times:
    """Metrics of 20 epochs: logged, read as a wide table, described and drawn."""
    from tracking.cli.describe import collect_charts, describe_run
    from tracking.curves.plot import plot_charts

    times: Times = {}
    values = {f"metric {n}": n / 7 for n in range(number)}
    run = tracking.start(runs_dir=folder, delivery=False)
    with timed(times, "log"):
        for epoch in range(1, EPOCHS + 1):
            run.log("metrics", "train", values, index=epoch, epoch=epoch)
    run.finish()
    past = tracking.open(run.path)
    with timed(times, "wide"):
        past.wide()
    with timed(times, "show"):
        read = past.snapshot()
        describe_run(past, read)
    with timed(times, "picture"):
        plot_charts(collect_charts(read), folder / "curves.png")
    return times


def steps(number: int, folder: Path) -> Times:
    """Steps of one epoch, whose losses are recorded."""
    import harness

    times: Times = {}
    with timed(times, "fit"):
        fit(
            folder,
            num_rows=number,
            epochs=1,
            callbacks=[harness.callbacks.StepMetrics()],
        )
    return times


def epochs(number: int, folder: Path) -> Times:
    """Epochs of one batch, with the callbacks that look back."""
    import harness

    times: Times = {}
    callbacks = [
        harness.callbacks.EarlyStopping(patience=number),
        harness.callbacks.KeepBestModel(),
        harness.callbacks.CSVLogger(folder / "metrics.csv"),
        harness.callbacks.ModelCheckpoint(
            folder / "checkpoints", every_n_epochs=max(number // 10, 1)
        ),
    ]
    with timed(times, "fit"):
        fitted = fit(folder, num_rows=1, epochs=number, callbacks=callbacks)
    with timed(times, "get_metrics"):
        fitted.get_metrics()
    with timed(times, "print"):
        str(fitted)
        fitted._repr_html_()
    with timed(times, "plot"):
        fitted.plot(folder / "curves.png")
    return times


def fit(folder: Path, *, num_rows: int, epochs: int, callbacks: list) -> Any:
    """Train a linear model, with one row in a batch."""
    import torch

    import harness

    torch.set_num_threads(1)
    x = torch.randn(num_rows, 2)
    learner = harness.setup(
        torch.nn.Linear, loss=torch.nn.MSELoss(), optimizer=torch.optim.SGD
    )
    learner = learner.set_hparams(in_features=2, out_features=1).set_opt_hparams(
        lr=1e-3
    )
    return learner.fit(
        (x, x[:, :1]),
        epochs,
        valid_data=(x[:1], x[:1, :1]),
        dataloader_options={"batch_size": 1},
        callbacks=callbacks,
        verbose=False,
        tracker={"runs_dir": folder / "runs", "delivery": False},
    )


def runs(number: int, folder: Path) -> Times:
    """Runs of 80 values: listed, found by name, and exported.

    The last runs of 2 s, and so all of a few, are read each time that all are listed.
    """
    with tracking.start(name="base", runs_dir=folder / "runs", delivery=False) as run:
        for epoch in range(1, EPOCHS + 1):
            for split in ("train", "valid"):
                run.log("metrics", split, {"loss": 1 / epoch, "hits": epoch}, epoch)
    manifest = json.loads((run.path / "run.json").read_text())
    for place in range(number - 1):
        copy = folder / "runs" / f"{20200101 + place // 86400}-{place % 86400:06d}-run"
        shutil.copytree(run.path / "records", copy / "records")
        own = manifest | {"id": copy.name, "name": f"run {place} of {number}"}
        (copy / "run.json").write_text(json.dumps(own, indent=2))
    shown: dict[str, Callable[[], object]] = {
        "runs list": lambda: command("runs", "list"),
        "list all first": lambda: command("runs", "list", "--limit", "0"),
        "list all again": lambda: command("runs", "list", "--limit", "0"),
        "list_runs": lambda: tracking.list_runs(folder / "runs"),
        "open by name": lambda: tracking.open(
            f"run {number // 2 - 1} of", folder / "runs"
        ),
    }
    os.environ["HARNESS_RUNS"] = str(folder / "runs")
    times: Times = {}
    for word, call in shown.items():
        with timed(times, word):
            call()
    found = [one.name for one in tracking.list_runs()]
    with timed(times, "export by name"):
        tracking.export(found, folder / "runs.parquet")
    return times


def command(*words: str) -> None:
    """Run a command of ``harness``."""
    script = "from harness.cli.main import main; main()"
    subprocess.run(
        [sys.executable, "-c", script, *words], check=True, capture_output=True
    )


SECTIONS: dict[str, tuple[Callable[[int, Path], Times], tuple[int, ...]]] = {
    "rows": (rows, (10_000, 100_000, 1_000_000, 10_000_000)),
    "names": (names, (10, 100, 1_000, 10_000)),
    "steps": (steps, (100, 1_000, 10_000, 100_000)),
    "epochs": (epochs, (100, 1_000, 10_000, 100_000)),
    "runs": (runs, (10, 100, 1_000, 10_000)),
}


def peak_mb() -> float:
    """Memory of this process at its highest, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(section: str, number: int) -> dict[str, float]:
    """Seconds of each part, and peak memory, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, __file__, "--one", section, str(number), folder]
        done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def print_section(section: str, sizes: tuple[int, ...]) -> bool:
    """Print the lines of one section; returns whether all of it is linear."""
    click.echo(f"\n| {section} | part | s | us for each | ratio | peak MB |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    first: dict[str, float] = {}
    ratio, is_linear = 1.0, True
    for number in sizes:
        found = measure(section, number)
        peak = found.pop("peak_mb")
        for part, seconds in found.items():
            each = seconds / number * 1e6
            ratio = each / max(first.setdefault(part, each), 1e-3)
            memory = f"{peak:.0f}" if part == [*found][-1] else ""
            click.echo(
                f"| {number:,} | {part} | {seconds:.3f} | {each:,.2f} | {ratio:.2f} | {memory} |"
            )
            if number == sizes[-1]:
                is_linear &= ratio <= LIMIT
    return is_linear


@click.command(help=__doc__, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--small", is_flag=True, help="Leave out the largest size of each section."
)
@click.option("--only", multiple=True, type=click.Choice([*SECTIONS]), help="Sections.")
@click.option("--one", nargs=3, hidden=True)
def main(small: bool, only: tuple[str, ...], one: tuple[str, str, str] | None) -> None:
    """Measure and print."""
    if one is not None:
        section, number, folder = one
        before = peak_mb()
        times = SECTIONS[section][0](int(number), Path(folder))
        click.echo(json.dumps(times | {"peak_mb": peak_mb() - before}))
        return
    is_linear = True
    for section in only or SECTIONS:
        sizes = SECTIONS[section][1]
        is_linear &= print_section(section, sizes[: -1 if small else None])
    sys.exit(0 if is_linear else 1)


if __name__ == "__main__":
    main()
