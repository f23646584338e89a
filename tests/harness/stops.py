"""Fits that are stopped after a step and resumed, to be compared with unbroken ones."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint
from harness.fitted import Fitted

X = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
Y = X.sum(1, keepdim=True)


class Line(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(x)


class StopAt(harness.Callback):
    """Ends the fit by a signal after some optimizer steps."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self) -> None:
        if self.ctx.step == self.step:
            signal.raise_signal(signal.SIGINT)


def sgd(module: Any = Line, loss: Any = None, **options: float) -> harness.Learner:
    """A learner with momentum."""
    options = {"lr": 0.05, "momentum": 0.9, **options}
    learner = harness.setup(
        module, loss=loss or nn.MSELoss(), optimizer=torch.optim.SGD
    )
    return learner.set_opt_hparams(**options)


def fit(
    learner: harness.Learner,
    callbacks: Sequence[harness.Callback] = (),
    *,
    epochs: int = 3,
    seed: int = 1,
    accumulate: int = 1,
    valid: bool = False,
    **options: Any,
) -> Fitted:
    """Fit on two batches an epoch, or four to be validated too."""
    return learner.fit(
        (X, Y),
        epochs,
        (X[:8], Y[:8]) if valid else None,
        callbacks=callbacks,
        accelerator=SingleDevice("cpu", accumulate=accumulate),
        dataloader_options={"batch_size": 12 // accumulate},
        seed=seed,
        tracker=False,
        verbose=False,
        **options,
    )


def fit_with_stop(
    make: Callable[[], harness.Learner],
    stop: int,
    folder: Path,
    make_callbacks: Callable[[], list[harness.Callback]] = list,
    *,
    strict: bool = True,
    **options: Any,
) -> tuple[Fitted, list[harness.Callback]]:
    """Fit until a step, and resume with another seed."""
    save = ModelCheckpoint(folder, every_n_epochs=0)
    fit(make(), [*make_callbacks(), save, StopAt(stop)], **options)
    callbacks = make_callbacks()
    resume = ResumeFromCheckpoint(folder, strict=strict)
    return fit(make(), [*callbacks, resume], **options | {"seed": 9}), callbacks
