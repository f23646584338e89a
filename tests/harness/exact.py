"""Fits that are stopped, resumed, and compared bit for bit with unbroken fits."""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    WeightedRandomSampler,
)
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC
from torchmetrics.wrappers import BootStrapper, ClasswiseWrapper, MinMaxMetric, Running

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import (
    EMA,
    AutoResume,
    CSVLogger,
    EarlyStopping,
    GradientClip,
    KeepBestModel,
    LRScheduler,
)
from harness.checkpoint.format import (
    Position,
    WrittenFiles,
    read_rank,
    verify_checkpoint,
    write_rank,
)
from harness.pytree import flatten
from harness.rng import get_rng_state
from tests.harness.checkpoint.newest import find_newest

ROWS, BATCH, EPOCHS = 22, 4, 2
BATCHES = 6  # the last one short


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Fixed random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


X, Y = numbers(ROWS, 4), torch.arange(ROWS) % 3
VALID = (numbers(9, 4, seed=1), torch.arange(9) % 3)


# ----------------------------------------------------------------------- models


class Net(nn.Module):
    """BatchNorm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


class KeepsMore(torch.optim.SGD):
    """Steps further each time; what it counts belongs to no parameter."""

    turns = 0

    def step(self, closure=None):
        kept = self.state.setdefault(("kept", 1), {"count": 0, "rates": torch.zeros(2)})
        kept["count"] += 1
        kept["rates"] += 0.001 * kept["count"]
        self.turns += 1
        for group in self.param_groups:
            group["lr"] = 0.05 + float(kept["rates"].sum()) + 0.001 * (self.turns % 5)
        return super().step(closure)


class TwoParts(Net):
    """Two named optimizers."""

    def set_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        body, head = self.body.parameters(), self.head.parameters()
        return {
            "body": torch.optim.RMSprop(body, lr=0.01, momentum=0.9),
            "head": torch.optim.SGD(head, lr=0.1, momentum=0.9),
        }


class OwnStep(Net):
    """Accumulates by itself, over three batches, and clears gradients late."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), False)

    def step(self) -> None:
        ctx = self.ctx
        ctx.pred = self(ctx.input)
        loss = nn.functional.cross_entropy(ctx.pred, ctx.target)
        ctx.loss = loss.detach()
        if ctx.training:
            if int(self.count) % 3 == 0:
                ctx.opt.zero_grad()
            (loss / 3).backward()
            self.count.add_(1)
            if int(self.count) % 3 == 0:
                ctx.opt.step()


class Conv(nn.Module):
    """Channels last, with its own generator and counter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 2)
        self.head = nn.Linear(5, 3)
        self.noise = torch.Generator().manual_seed(3)
        self.calls = 0
        self.to(memory_format=torch.channels_last)

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 1, 2, 2).expand(-1, 3, -1, -1)
        x = self.conv(x).flatten(1)
        if self.training:
            self.calls += 1
            x = x + 0.1 * self.calls * torch.randn(x.shape, generator=self.noise)
        return self.head(x)

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


# ------------------------------------------------------------------------- data


class Augmented(Dataset):
    """Noise from the generators of Python, NumPy and torch."""

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + np.random.random() + torch.rand(()).item()
        return X[row] + 0.1 * noise, Y[row]


class OwnGenerators(Dataset):
    """Noise from generators that belong to the data set."""

    def __init__(self) -> None:
        self.one, self.two = random.Random(1), np.random.default_rng(2)
        self.three, self.four = np.random.RandomState(3), torch.Generator()

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = self.one.random() + self.two.random() + self.three.random_sample()
        return X[row] + 0.1 * noise + torch.rand((), generator=self.four), Y[row]


class Stream(IterableDataset):
    """A stream shuffled on the way by torch's and Python's own generators."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        left = list(range(ROWS))
        while left:
            place = (int(torch.randint(len(left), ())) + random.randrange(99)) % len(
                left
            )
            row = left.pop(place)
            yield X[row] + random.random(), Y[row]


class LazySampler(Sampler[int]):
    """Draws each row when it is asked for it."""

    def __init__(self) -> None:
        pass

    def __len__(self) -> int:
        return ROWS

    def __iter__(self) -> Iterator[int]:
        for _ in range(ROWS):
            yield int(torch.randint(ROWS, ()))


class OwnPosition(DataLoader):
    """A loader that saves its own position and order."""

    def __init__(self) -> None:
        super().__init__(harness_data(), batch_size=BATCH)
        self.passes, self.at, self.first = 0, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.at, self.first = self.first, 0
        self.passes += self.at == 0
        order = numbers(ROWS, seed=self.passes).argsort()
        for rows in order.split(BATCH)[self.at :]:
            self.at += 1
            yield [X[rows], Y[rows]]

    def __len__(self) -> int:
        raise TypeError("it has no length")

    def state_dict(self) -> dict[str, int]:
        return {"passes": self.passes, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.passes, self.first = state["passes"], state["at"]


def harness_data() -> Dataset:
    """The rows as a data set of torch's."""
    return torch.utils.data.TensorDataset(X, Y)


def loader(dataset: Any = None, **options: Any) -> DataLoader:
    """A loader of the user's own."""
    return DataLoader(dataset or harness_data(), batch_size=BATCH, **options)


# ------------------------------------------------------------------------ cases


class Unfreeze(harness.Callback):
    """Trains the body from the fourth step on."""

    def on_train_batch_begin(self) -> None:
        if self.ctx.step == 4:
            self.ctx.model.body.requires_grad_(True)

    def on_fit_begin(self) -> None:
        self.ctx.model.body.requires_grad_(False)


class CountsValidation(harness.Callback):
    """Counts and logs within validation."""

    def __init__(self) -> None:
        self.count = 0

    def on_valid_batch_end(self) -> None:
        self.count += 1
        self.ctx.log("seen", "valid", self.count)

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def adam(module: Any = Net, **options: Any) -> harness.Learner:
    """A learner with Adam, and metrics that sum, list and average."""
    metrics = {
        "accuracy": MulticlassAccuracy(num_classes=3),
        "auroc": MulticlassAUROC(num_classes=3),
        "top": lambda pred, target: pred.max(),
    }
    learner = harness.setup(
        module, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam, metrics=metrics
    )
    return learner.set_opt_hparams(lr=0.01, **options)


def wrapped() -> harness.Learner:
    """A learner whose metrics count in others below them, or over all epochs."""
    accuracy = MulticlassAccuracy(num_classes=3)
    metrics = {
        "classwise": ClasswiseWrapper(MulticlassAccuracy(num_classes=3, average=None)),
        "best": MinMaxMetric(accuracy),
        "resampled": BootStrapper(accuracy, num_bootstraps=3),
        "latest": Running(accuracy, window=3),
        "both": accuracy + MulticlassAUROC(num_classes=3),
    }
    return harness.setup(
        Net, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam, metrics=metrics
    )


def sgd(module: Any = Net, optimizer: Any = torch.optim.SGD) -> harness.Learner:
    """A learner with momentum and nothing to measure but the loss."""
    learner = harness.setup(module, loss=nn.CrossEntropyLoss(), optimizer=optimizer)
    return learner.set_opt_hparams(lr=0.05, momentum=0.9)


def one_cycle(**options: Any) -> LRScheduler:
    """A schedule by optimizer steps."""
    schedule = torch.optim.lr_scheduler.OneCycleLR
    return LRScheduler(
        schedule,
        call_on="on_train_batch_after_step",
        max_lr=0.1,
        total_steps=40,
        **options,
    )


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is trained, and how."""

    learner: Callable[[], harness.Learner] = sgd
    data: Callable[[], Any] = lambda: (X, Y)
    valid: Any = VALID
    epochs: int | None = EPOCHS
    accumulate: int = 1
    options: dict[str, Any] | None = field(
        default_factory=lambda: {"batch_size": BATCH, "drop_last": False}
    )
    callbacks: Callable[[Path], list[harness.Callback]] = lambda folder: []
    pace: dict[str, Any] = field(default_factory=dict)


def scheduled(folder: Path) -> list[harness.Callback]:
    return [one_cycle(), GradientClip(1.0)]


def stateful(folder: Path) -> list[harness.Callback]:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    return [
        KeepBestModel(min_delta=0.02),
        EarlyStopping(patience=2, baseline=-1.0),
        CSVLogger(folder / "log.csv"),
        LRScheduler(plateau, patience=0, threshold=0.5),
        CountsValidation(),
    ]


CASES = {
    "adam-onecycle-metrics": Case(learner=adam, callbacks=scheduled),
    "two-optimizers": Case(
        learner=lambda: harness.setup(TwoParts, loss=nn.CrossEntropyLoss()),
        accumulate=2,
        callbacks=lambda folder: [one_cycle(opt_name="head", cycle_momentum=False)],
    ),
    "wrapped-metrics": Case(learner=wrapped),
    "accumulation": Case(learner=adam, accumulate=4, callbacks=scheduled),
    "accumulation-unsized": Case(
        data=lambda: loader(Stream()), options=None, accumulate=4
    ),
    "own-step": Case(learner=lambda: sgd(OwnStep)),
    "own-optimizer": Case(learner=lambda: sgd(optimizer=KeepsMore)),
    "channels-last": Case(learner=lambda: adam(Conv, betas=(0.5, 0.6))),
    "augmented": Case(data=Augmented),
    "own-generators": Case(data=OwnGenerators),
    "own-loader": Case(
        data=lambda: loader(shuffle=True, generator=torch.Generator().manual_seed(5)),
        options=None,
        epochs=3,
    ),
    "weighted-sampler": Case(
        data=lambda: loader(sampler=WeightedRandomSampler([1.0] * ROWS, ROWS)),
        options=None,
    ),
    "lazy-sampler": Case(data=lambda: loader(sampler=LazySampler()), options=None),
    "own-position": Case(data=OwnPosition, options=None, accumulate=4),
    "stream": Case(data=lambda: loader(Stream()), options=None),
    "callbacks": Case(learner=adam, callbacks=stateful, epochs=3),
    "frozen": Case(callbacks=lambda folder: [Unfreeze()]),
}

SETS = {"clean": VALID, "shifted": (VALID[0] + 1, VALID[1])}


class CountsParts(CountsValidation):
    """Counts the parts of the training, and sets of validation data, too."""

    def on_train_begin(self) -> None:
        self.count += 100

    def on_valid_end(self) -> None:
        self.count += 10000
        self.ctx.log("seen", self.ctx.split, float(torch.rand(())))


def watching_steps(folder: Path) -> list[harness.Callback]:
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    step = torch.optim.lr_scheduler.StepLR
    watched = {"monitor": "shifted/loss"}
    return [
        KeepBestModel(**watched),
        EarlyStopping(patience=3, baseline=-1.0, **watched),
        CSVLogger(folder / "log.csv"),
        LRScheduler(plateau, patience=0, threshold=0.5, **watched),
        LRScheduler(step, step_size=1),
        EMA(0.9),
        CountsParts(),
    ]


def sometimes() -> harness.Learner:
    """A learner with a metric that every second validation has."""
    learner = adam()
    metrics = replace_every(learner.metrics, {"auroc": 2})
    return replace(learner, metrics=metrics)


def replace_every(metrics: Any, every: dict[str, int]) -> harness.MetricSet:
    return harness.MetricSet(metrics.train, every=every)


BY_STEPS = {
    "sets": Case(
        learner=sometimes,
        valid=SETS,
        callbacks=watching_steps,
        pace={"valid_every": "4 steps", "max_steps": 11},
    ),
    "two-optimizers": replace(CASES["two-optimizers"], pace={"valid_every": "2 steps"}),
    "own-step": replace(CASES["own-step"], pace={"valid_every": "1 steps"}),
    "stream": Case(
        data=lambda: loader(Stream()),
        options=None,
        accumulate=2,
        epochs=None,
        pace={"valid_every": "2 steps", "max_steps": 5},
    ),
    "own-position": Case(
        data=OwnPosition,
        options=None,
        accumulate=2,
        pace={"valid_every": "1 step", "limit_batches": {"train": 5, "valid": 1}},
    ),
}

WITH_WORKERS = {
    "workers": Case(
        data=lambda: loader(Augmented(), shuffle=True, num_workers=2), options=None
    ),
    "workers-persistent": Case(
        data=lambda: loader(shuffle=True, num_workers=2, persistent_workers=True),
        options=None,
    ),
    "workers-stream": Case(
        data=lambda: loader(Stream(), num_workers=2), options=None, accumulate=2
    ),
}


# ------------------------------------------------------------------------- fits


class Stop(harness.Callback):
    """Stop a fit by a signal, as a person or a job scheduler would."""

    def __init__(
        self, event: str | None, after: int, signum: int = signal.SIGINT
    ) -> None:
        self.after, self.count, self.signum = after, 0, signum
        if event is not None:
            setattr(self, event, self._count)

    def _count(self) -> None:
        self.count += 1
        if self.count == self.after:
            signal.raise_signal(self.signum)


class Look(harness.Callback):
    """Keep the complete final state of a fit."""

    weight = 30  # before KeepBestModel puts other weights in

    def __init__(self) -> None:
        self.state: dict[str, Any] = {}

    def on_fit_end(self) -> None:
        accelerator = self.ctx.accelerator
        assert accelerator is not None
        plan, tensors = flatten([accelerator.state_dict(), get_rng_state()])
        copies = {name: value.clone() for name, value in tensors.items()}
        self.state = {"plan": plan, "tensors": copies}


def fit(
    case: Case, folder: Path, stop: tuple[str, int] | None = None, tracker: Any = False
) -> dict[str, Any]:
    """Fit, or resume from the checkpoints in a folder; return the complete final state."""
    look = Look()
    own = [*case.callbacks(folder), look, AutoResume(folder / "saved")]
    is_first = not (folder / "saved").exists()
    fitted = case.learner().fit(
        case.data(),
        case.epochs,
        case.valid,
        **case.pace,
        callbacks=[*own, Stop(*stop)] if stop else own,
        accelerator=SingleDevice("cpu", accumulate=case.accumulate),
        dataloader_options=case.options,
        seed=7 if is_first else 1234,
        tracker=tracker,
        verbose=False,
    )
    records = {what: v for what, v in fitted.records.items() if what != "profile"}
    counts = [
        row and row["batches"]
        for row in fitted.records.get("profile", {}).get("train", [])
    ]
    log = folder / "log.csv"
    return {
        **look.state,
        "weights": fitted.model.state_dict(),
        "records": records,
        "batches": counts,
        "csv": log.read_text() if log.exists() else "",
        "signum": fitted.signum,
    }


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    """Names of the values whose bits differ."""
    found = [
        key
        for key in ("records", "batches", "csv", "plan")
        if repr(one[key]) != repr(two[key])
    ]
    for kind in ("tensors", "weights"):
        names = one[kind].keys() | two[kind].keys()
        found += [
            f"{kind}/{name}"
            for name in sorted(names)
            if name not in one[kind]
            or name not in two[kind]
            or not same_bits(one[kind][name], two[kind][name])
        ]
    return found


def same_bits(one: Any, two: Any) -> bool:
    """Whether values are equal bit for bit, NaN and signed zeros included."""
    if not isinstance(one, Tensor):
        return repr(one) == repr(two)
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return one.numpy().tobytes() == two.numpy().tobytes()


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Change the state in the newest checkpoint; its manifest matches again afterwards."""
    place, _ = find_newest(folder)
    assert place is not None
    manifest = verify_checkpoint(place)
    state = read_rank(place, 0)
    change(state)
    plan, tensors = flatten(state)
    write_rank(place, 0, plan, {n: t.clone() for n, t in tensors.items()})
    done = place / "rank-0.done"
    files = msgspec.json.decode(done.read_bytes(), type=WrittenFiles).files
    done.unlink()
    position = Position(**state["position"])
    replace(manifest, files=files, position=position).write(place)
    return place
