"""A training on several ranks that goes wrong as asked.

``faulty.py FOLDER HOW``; each rank writes its process id into the folder first.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import harness
from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator

STEPS = {"well": 4, "wait": 10_000}


def boom() -> None:
    raise ValueError("boom on purpose")


class Raise(harness.Callback):
    """Raises on one rank alone, some batches into the fit."""

    def on_train_batch_end(self) -> None:
        accelerator = self.ctx.accelerator
        assert accelerator is not None
        is_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        if self.ctx.iter == 5 and accelerator.rank == 1 and not is_again:
            boom()


class Stop(harness.Callback):
    """Holds the interpreter's lock on one rank for a while, and later stops the process."""

    def on_train_batch_end(self) -> None:
        accelerator = self.ctx.accelerator
        assert accelerator is not None
        if self.ctx.iter == 3 and accelerator.rank == 1:
            ctypes.PyDLL(None).sleep(14)
        (self.folder / f"batch-{accelerator.rank}").write_text(str(self.ctx.iter))
        if self.ctx.iter == 5 and accelerator.rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    def __init__(self, folder: Path) -> None:
        self.folder = folder


class Skip(harness.Callback):
    """Skips the epoch on one rank alone."""

    def on_train_batch_after_loss(self) -> None:
        assert self.ctx.accelerator is not None
        if self.ctx.iter == 3 and self.ctx.accelerator.rank == 1:
            raise harness.SkipEpoch


def alone(how: str) -> None:
    """A fit, and then something that one rank does alone."""
    learner = harness.setup(
        lambda: torch.nn.Linear(3, 1),
        loss=torch.nn.MSELoss(),
        optimizer=torch.optim.SGD,
    )
    data = torch.randn(64, 3), torch.randn(64, 1)
    fitted = learner.fit(
        data,
        epochs=1,
        callbacks=[Skip()] if how == "skip" else [],
        dataloader_options={"batch_size": 4},
        tracker=False,
        verbose=False,
    )
    if how == "evaluate" and os.environ["RANK"] == "0":
        fitted.evaluate(data)
    if how == "branch":
        one = torch.zeros(1)
        if os.environ["RANK"] == "0":
            dist.all_reduce(one)
        else:
            dist.all_gather([torch.zeros(1), torch.zeros(1)], one)
    if how == "sizes":
        dist.all_reduce(torch.zeros(1 if os.environ["RANK"] == "0" else 1000))
    dist.barrier()


class FailsToGather(DeepSpeedAccelerator):
    """Rank 1 cannot gather the weights at the end of a fit."""

    def finish(self, *, failed: bool = False, keep: bool = True) -> None:
        if self.rank == 1 and not failed and self.has_trained:
            boom()
        super().finish(failed=failed, keep=keep)

    @property
    def has_trained(self) -> bool:
        """Whether a step was made; ``prepare`` finishes what was before it."""
        return any(self.steps.values())


def in_a_fit(folder: Path, how: str) -> None:
    """A tracked fit that saves checkpoints; it fails in training, or at its end."""
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    learner = harness.setup(
        lambda: torch.nn.Linear(3, 1),
        loss=torch.nn.MSELoss(),
        optimizer=torch.optim.AdamW,
    )
    kind = FailsToGather if how == "gather" else DeepSpeedAccelerator
    resume = harness.callbacks.AutoResume(folder / "saved", every_n_steps=2)
    callbacks: list[harness.Callback] = [resume]
    if how in {"fit", "restart"}:
        callbacks.append(Raise())
    elif how == "stop":
        callbacks.append(Stop(folder))
    x, y = (
        torch.randn(80, 3, generator=torch.Generator().manual_seed(0)),
        torch.ones(80, 1),
    )
    fitted = learner.fit(
        (x, y),
        epochs=1,
        callbacks=callbacks,
        accelerator=kind({"zero_optimization": {"stage": 3}}, device="cpu"),
        dataloader_options={"batch_size": 4},
        seed=1,
        tracker={"runs_dir": folder / "runs", "delivery": False},
        verbose=False,
    )
    if how in {"restart", "finish"} and os.environ["RANK"] == "0":
        weights = {n: value.tolist() for n, value in fitted.model.state_dict().items()}
        sys.stdout.write(f"weights {weights}\n")


def main(folder: Path, how: str) -> None:
    if how in {"fit", "gather", "finish", "restart", "stop"}:
        in_a_fit(folder, how)
        return
    if how in {"skip", "evaluate", "branch", "sizes"}:
        (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
        alone(how)
        return
    stage = 7 if how == "config" else 2
    rank = os.environ["RANK"]
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    accelerator = DeepSpeedAccelerator(
        {"zero_optimization": {"stage": stage}}, device="cpu"
    )
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)
    opt = torch.optim.AdamW(model.parameters(), lr=0.1)
    accelerator.prepare(model, {"opt": opt})
    for step in range(STEPS.get(how, 10_000)):
        accelerator.backward(model(torch.full((2, 3), float(accelerator.rank))).mean())
        accelerator.step()
        (folder / f"steps-{rank}").write_text(str(step + 1))
        if how == "wait":
            time.sleep(0.05)
        if step == 2 and accelerator.rank == 1:
            if how == "raise":
                boom()
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
    weights = accelerator.full_state_dict(model)
    if accelerator.is_main:
        total = sum(float(value.sum()) for value in weights.values())
        sys.stdout.write(f"sum {total:.6f}\n")
    accelerator.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
