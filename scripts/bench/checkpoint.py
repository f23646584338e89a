"""Cost of a checkpoint: stall of the training thread, and time to resume.

    python scripts/bench/checkpoint.py [--sizes 10 100 1000] [--rounds 5] [--no-resume]

Stall: seconds that one save blocks the training thread, by MB of parameters in a few large
tensors, and of a model of 243 modules with 386 parameters (25 MB). It is compared
with ``torch.save`` of the same state and with ``save_checkpoint`` of a DeepSpeed engine
(ZeRO 0, one rank), alternating in one process. Resume: seconds from the start of the
command to the end of the first new step, compared with a fresh fit.
"""

from __future__ import annotations

# ruff: noqa: E402
import sys

# The logging.py in this folder must not hide the standard library's.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]

import argparse
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.single import SingleDevice
from harness.checkpoint.writer import CheckpointWriter
from harness.data.loaders import make_train_loader
from harness.data.train_pass import TrainPass
from harness.loop import FitContext

PIECE_MB = 4


class Net(nn.Module):
    """A model of the given size; a step uses little of it."""

    def __init__(self, size_mb: int = 10) -> None:
        super().__init__()
        count = max(1, size_mb // PIECE_MB)
        numbers = size_mb * 250_000 // count
        self.parts = nn.ParameterList(torch.zeros(numbers) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * sum(part[0] for part in self.parts)


class Block(nn.Module):
    """A residual block of five layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.batch_norm = nn.LayerNorm(width), nn.BatchNorm1d(width)
        self.wide, self.narrow = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.batch_norm(self.norm(self.narrow(self.wide(x).relu())))


def make_deep() -> nn.Module:
    return nn.Sequential(*(Block(256) for _ in range(48)), nn.Linear(256, 1))


def context(model: nn.Module) -> FitContext:
    """A fit in the middle of an epoch, as the checkpoint callback sees it."""
    ctx = FitContext(
        model=model,
        optimizers=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=nn.functional.mse_loss,
        hparams={},
        opt_hparams={},
        data=make_train_loader((torch.zeros(64), torch.zeros(64))),
        valid_data=None,
        epochs=1,
        accelerator=SingleDevice("cpu"),
        verbose=False,
    )
    ctx.epoch, ctx.trained = 1, 1
    ctx.train_pass = TrainPass(ctx.train_data, ctx.accelerator, 1)
    ctx.train_pass.start()
    return ctx


def stalls(
    make: Callable[[], nn.Module], rounds: int, folder: Path
) -> dict[str, list[float]]:
    """Seconds of each save, by method. Each waits for the background write of the last."""
    ctx = context(make())
    writer, engine = CheckpointWriter(folder / "saved", ctx), engine_of(make())
    found: dict[str, list[float]] = {"first": [], "harness": [], "torch": []}
    found["deepspeed"] = []
    writer.allocate()
    writer.wait()
    for turn in range(rounds + 1):
        began = time.perf_counter()
        assert writer.begin("train") is not None
        writer.save("train")
        took_s = time.perf_counter() - began
        found["harness" if turn else "first"].append(took_s)
        fault = writer.wait()
        assert fault is None, fault
        writer.prune(1, set())
        began = time.perf_counter()
        torch.save(ctx.accelerator.state_dict(), folder / "torch.pt")
        if turn:
            found["torch"].append(time.perf_counter() - began)
        began = time.perf_counter()
        engine.save_checkpoint(str(folder / "engine"), tag="last")
        if turn:
            found["deepspeed"].append(time.perf_counter() - began)
    return found


def engine_of(model: nn.Module) -> Any:
    """A DeepSpeed engine with a model."""
    accelerator = DeepSpeedAccelerator(
        {"zero_optimization": {"stage": 0}}, device="cpu"
    )
    accelerator.prepare(model, {"opt": torch.optim.SGD(model.parameters(), lr=0.1)})
    return accelerator._engines.deepspeed_engines["opt"]


def print_stalls(sizes: list[int], rounds: int) -> None:
    # Of a busy machine, only the ratio of the quickest rounds tells something.
    print(
        "stall of the training thread, s (median; ratio to torch.save, also of the best)"
    )
    names = ("first", "harness", "torch", "deepspeed")
    print(" ".join([f"{'MB':>6}", *(f"{n:>9}" for n in names), "  ratio    best"]))
    models: dict[str, Callable[[], nn.Module]] = {
        **{str(size_mb): partial(Net, size_mb) for size_mb in sizes},
        "deep": make_deep,
    }
    for title, make in models.items():
        with tempfile.TemporaryDirectory() as folder:
            found = stalls(make, rounds, Path(folder))
        median = {name: statistics.median(times) for name, times in found.items()}
        ratio = median["harness"] / median["torch"]
        times = " ".join(f"{median[name]:9.4f}" for name in found)
        best = min(found["harness"]) / min(found["torch"])
        print(f"{title:>6} {times} {ratio:7.3f} {best:7.3f}", flush=True)


# ------------------------------------------------------------------ time to resume


class Mark(harness.Callback):
    """Records when each step ended; interrupts a first fit after its second step."""

    def on_train_batch_end(self) -> None:
        with Path("marks").open("a") as file:
            file.write(f"{time.time()}\n")
        if self.ctx.step == 2 and Path("asked").exists():
            os.kill(os.getpid(), 15)


def experiment() -> harness.Experiment:
    """Ten MB of weights, a thousand steps an epoch."""
    data = (torch.zeros(32_000), torch.zeros(32_000))
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner = learner.set_opt_hparams(lr=0.1)
    return harness.Experiment(
        learner=learner, data=data, epochs=1, seed=1, callbacks=[Mark()]
    )


def timed(folder: Path, *words: str) -> tuple[float, str]:
    """Seconds from the start of a command to its first step, and its stderr."""
    (folder / "marks").unlink(missing_ok=True)
    began = time.time()
    process: Any = subprocess.Popen(
        [sys.executable, "-m", "harness.cli", *words],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not (folder / "marks").exists():
        time.sleep(0.005)
    if "asked" not in {path.name for path in folder.iterdir()}:
        process.terminate()
    said = process.communicate()[1]
    first = (folder / "marks").read_text().split()[0]
    return float(first) - began, said


def print_resume(rounds: int) -> None:
    fresh, resumed = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shutil.copy2(__file__, folder / "exp.py")
            (folder / "asked").touch()
            words = ("fit", "exp.py:experiment", "--quiet", "--no-deliver")
            took_s, said = timed(folder, *words)
            fresh.append(took_s)
            (folder / "asked").unlink()
            resumed.append(timed(folder, "resume", said.split()[-1])[0])
    one, two = statistics.median(fresh), statistics.median(resumed)
    print("from the command to the end of the first new step, s (median)")
    print(f"fresh {one:.2f}  resume {two:.2f}  ratio {two / one:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--rounds", type=int, default=5)
    # On busy cores, threads wait for each other, and a copy is many times slower.
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-resume", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print_stalls(options.sizes, options.rounds)
    if not options.no_resume:
        print_resume(options.rounds)


if __name__ == "__main__":
    main()
