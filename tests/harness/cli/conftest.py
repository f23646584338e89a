"""A small experiment in a folder, and ways to run the command on it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from harness.cli.main import main

SCRIPT = """
import signal
import sys
import time
import torch
from torch import nn
import harness

class Breaks(harness.Callback):
    def __init__(self, way):
        self.way = way
    def on_train_batch_begin(self):
        if self.ctx.epoch == 2 and self.ctx.iter == 2:
            if self.way == "error":
                raise ArithmeticError("no such number")
            for _ in range(int(self.way)):
                signal.raise_signal(signal.SIGINT)

class Slow(harness.Callback):
    def __init__(self, pause):
        self.pause = pause
    def on_train_batch_begin(self):
        if self.pause and self.ctx.epoch == 3 and self.ctx.iter == 1:
            print("in epoch 3", file=sys.stderr, flush=True)
    def on_train_batch_end(self):
        time.sleep(self.pause)

class Net(nn.Module):
    def __init__(self, hidden=2):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, hidden), nn.Dropout(0.5), nn.Linear(hidden, 1))
    def forward(self, x):
        return self.body(x)

def experiment(hidden: int = 2, pause: float = 0.0, fail: bool = False, way: str = "0"):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 3, generator=generator)
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    learner = learner.set_hparams(hidden=hidden).set_opt_hparams(lr=0.1)
    return harness.Experiment(
        learner=learner, data=(x, torch.zeros(40, 2 if fail else 1).T if fail else x[:, :1]),
        valid_data=0.25, epochs=4, seed=3, callbacks=[Slow(pause), Breaks(way)],
        dataloader_options={"batch_size": 10}, name="line",
    )
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with the experiment in it."""
    (tmp_path / "exp_cli.py").write_text(SCRIPT)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("exp_cli", None)
    if str(tmp_path) in sys.path:
        sys.path.remove(str(tmp_path))


@pytest.fixture
def call() -> Callable[..., Result]:
    """Runs the command in this process."""

    def run(*words: str) -> Result:
        return CliRunner().invoke(main, list(words), catch_exceptions=False)

    return run


@pytest.fixture
def start(root: Path) -> Callable[..., subprocess.Popen[str]]:
    """Starts the command in a separate process."""

    def run(*words: str) -> subprocess.Popen[str]:
        environment: dict[str, Any] = {**os.environ, "PYTHONPATH": str(root)}
        return subprocess.Popen(
            [sys.executable, "-m", "harness.cli", *words],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    return run
