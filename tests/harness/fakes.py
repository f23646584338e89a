"""Small real parts for tests: a two-parameter model, data, a tape of events, a run."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import harness
from harness.accelerators.single import SingleDevice
from harness.events import EVENTS
from harness.loop import FitContext
from harness.records import NullRun


class Line(nn.Module):
    """``y = w x + b`` from fixed starting values."""

    ctx: Any

    def __init__(self, w: float = 0.0, b: float = 0.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(w))
        self.b = nn.Parameter(torch.tensor(b))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.w + self.b


class Net(nn.Module):
    """A little of everything random: initial weights and dropout."""

    ctx: Any

    def __init__(self, hidden: int = 4, classes: int = 3, drop: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(2, hidden),
            nn.ReLU(),
            nn.Dropout(drop),
            nn.Linear(hidden, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def points(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs of two columns and a class in 0, 1, 2 for each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=generator)
    return x, torch.randint(0, 3, (rows,), generator=generator)


def slope(rows: int) -> tuple[Tensor, Tensor]:
    """Inputs 0, 1, 2, ... and twice that as targets."""
    x = torch.arange(float(rows))
    return x, 2 * x


def line_learner(**options: Any) -> harness.Learner:
    """A learner of a line by plain gradient descent on the squared error."""
    options.setdefault("loss", nn.MSELoss())
    options.setdefault("optimizer", torch.optim.SGD)
    return harness.setup(Line, **options).set_opt_hparams(lr=0.01)


def net_learner(**options: Any) -> harness.Learner:
    """A learner of the classifier."""
    options.setdefault("loss", nn.CrossEntropyLoss())
    options.setdefault("optimizer", torch.optim.SGD)
    return harness.setup(Net, **options).set_opt_hparams(lr=0.1)


def fit_context(**options: Any) -> FitContext:
    """The context of a fit of a line to four points."""
    model = options.pop("model", None) or Line()
    options = {
        "model": model,
        "optimizers": torch.optim.SGD(model.parameters(), lr=0.1),
        "loss_fn": nn.MSELoss(),
        "hparams": {"w": 0.0},
        "opt_hparams": {"lr": 0.1},
        "data": DataLoader(TensorDataset(*slope(4)), batch_size=2),
        "valid_data": None,
        "epochs": 3,
        "accelerator": SingleDevice("cpu"),
        "verbose": False,
    } | options
    return FitContext(**options)


class Tape(harness.Callback):
    """Writes down every event, before all other callbacks."""

    weight = -math.inf

    def __init__(self) -> None:
        self.events: list[str] = []


class At(harness.Callback):
    """Calls a function with the context at one event."""

    def __init__(self, event: str, function: Any, weight: float = 0) -> None:
        self.weight = weight
        setattr(self, event, MethodType(lambda self: function(self.ctx), self))


def _writer(event: str) -> Any:
    def write(self: Tape) -> None:
        self.events.append(event)

    return write


for _event in EVENTS:
    setattr(Tape, _event, _writer(_event))


class Ear(NullRun):
    """A run that remembers each call."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[dict[str, Any]] = []
        self.steps: list[tuple[Any, ...]] = []

    def log(
        self,
        what: str,
        set: str,
        value: Any,
        index: int | None = None,
        append: bool = True,
        *,
        epoch: int | None = None,
        step: int | None = None,
    ) -> None:
        said = {"what": what, "set": set, "value": copy.deepcopy(value)}
        self.heard.append(
            said | {"index": index, "append": append, "epoch": epoch, "step": step}
        )

    def log_step(
        self, values: Any, step: int, *, set: str = "train", epoch: int | None = None
    ) -> None:
        self.steps.append((set, dict(values), step, epoch))

    def position(self) -> int:
        return len(self.heard)


def is_running(pid: int) -> bool:
    """True for a process that is no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
