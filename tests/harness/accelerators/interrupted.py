"""An experiment that a signal ends: short passes, and loaders with workers.

Each rank writes a file when it trains. With a file ``finish`` in the working folder, the
fit ends after the present epoch.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import harness
from harness.errors import EarlyStop


class Slow(nn.Module):
    """A line that takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.05)
        return self.line(x)


class Note(harness.Callback):
    """Writes down which rank trains, and then finishes when asked to."""

    def __init__(self) -> None:
        self.has_trained = False

    def on_train_batch_end(self) -> None:
        accelerator = self.ctx.accelerator
        assert accelerator is not None
        path = Path(f"rank-{accelerator.rank}-of-{accelerator.world_size}")
        path.write_text(str(os.getpid()))
        self.has_trained = True

    def on_epoch_end(self) -> None:
        if Path("finish").exists() and self.has_trained:
            raise EarlyStop


def experiment(workers: int = 0) -> harness.Experiment:
    """Four batches a pass on each of two ranks."""
    generator = torch.Generator().manual_seed(0)
    data = torch.randn(64, 8, generator=generator), torch.zeros(64, 1)
    learner = harness.setup(Slow, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    return harness.Experiment(
        learner=learner.set_opt_hparams(lr=0.01),
        data=data,
        valid_data=data,
        epochs=1000,
        dataloader_options={"batch_size": 8, "num_workers": workers},
        callbacks=[Note()],
        seed=1,
    )
