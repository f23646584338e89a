"""Streams, data sets and samplers with a ``state_dict`` in a plain loader, resumed exactly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    TensorDataset,
)

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint
from harness.data.stateful import find_stateful
from harness.errors import CheckpointError
from tests.harness.exact import BATCH, ROWS, OwnPosition, X, Y, sgd

Row = tuple[torch.Tensor, torch.Tensor]


def row(number: int) -> Row:
    return X[number % ROWS], Y[number % ROWS]


class Stateful:
    """Its state is its plain attributes."""

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Endless(Stateful, IterableDataset):
    """A stream that continues in the next pass."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[Row]:
        while True:
            self.at += 1
            yield row(self.at * 7)


class Resets(Stateful, IterableDataset):
    """As in the documentation of torchdata, with something that changes in each pass."""

    def __init__(self) -> None:
        self.at = self.sum = 0

    def __iter__(self) -> Iterator[Row]:
        for number in range(self.at, ROWS):
            self.at, self.sum = self.at + 1, self.sum * 31 % 101 + 7
            yield row(number + self.sum)
        self.at = 0


class BeginsOnce(IterableDataset):
    """Begins once where it was told, as many do; its state stays that of the end."""

    def __init__(self) -> None:
        self.at = self.first = self.passes = 0

    def __iter__(self) -> Iterator[Row]:
        start, self.first = self.first, 0
        self.passes += start == 0
        for number in range(start, ROWS):
            self.at = number + 1
            yield row(number * self.passes)

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "passes": self.passes}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first, self.passes = state["at"], state["passes"]


class ByEpoch(IterableDataset):
    """As Hugging Face's streams: a state counts in its own epoch, and is None at first."""

    def __init__(self) -> None:
        self.epoch = 0
        self.now: Any = None
        self.start: Any = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[Row]:
        start: Any = self.start or {"epoch": -1}
        at = start["at"] if start["epoch"] == self.epoch else 0
        for number in range(at, ROWS):
            self.now = {"epoch": self.epoch, "at": number + 1}
            yield row(number * (self.epoch + 1))

    def state_dict(self) -> Any:
        return self.now

    def load_state_dict(self, state: Any) -> None:
        self.start = state


class Scaled(Stateful, Dataset):
    """Rows that a callback changes as it trains."""

    def __init__(self) -> None:
        self.scale = 1.0

    def __len__(self) -> int:
        return ROWS

    def __getitem__(self, number: int) -> Row:
        return X[number] * self.scale, Y[number]


class Walk(Stateful, Sampler[int]):
    def __init__(self) -> None:
        self.at = self.place = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < ROWS:
            self.at, self.place = self.at + 1, (self.place + 3) % ROWS
            yield self.place
        self.at = 0


class AsTorchdata(DataLoader):
    """As torchdata's: a pass after a state that is loaded costs a random number more."""

    def __init__(self) -> None:
        super().__init__(TensorDataset(X, Y), batch_size=BATCH)
        self.saved: Any = None
        self.now = {"seed": 0, "at": 0, "_iterator_finished": False}

    def __iter__(self) -> Any:
        saved, self.saved = self.saved, None
        drawn = int(torch.randint(99, ()))
        if saved is not None and saved["_iterator_finished"]:
            drawn = int(torch.randint(99, ()))
        is_new = saved is None or saved["_iterator_finished"]
        new = {"seed": drawn, "at": 0, "_iterator_finished": False}
        self.now = new if is_new else dict(saved)
        return self.read(self.now)

    def read(self, now: dict[str, Any]) -> Iterator[Any]:
        order = torch.randperm(
            ROWS, generator=torch.Generator().manual_seed(now["seed"])
        )
        for rows in order.split(BATCH)[now["at"] :]:
            now["at"] += 1
            yield [X[rows], Y[rows]]
        now["_iterator_finished"] = True

    def state_dict(self) -> dict[str, Any]:
        return dict(self.now)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.saved = state


class Scale(harness.Callback):
    def on_train_batch_end(self) -> None:
        data = getattr(self.ctx.train_data, "dataset", None)
        if isinstance(data, Scaled):
            data.scale += 0.1


class Report(harness.Callback):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def on_train_batch_begin(self) -> None:
        if not self.lines and self.resume is not None:
            self.lines = str(self.resume).splitlines()[1:]

    def on_fit_begin(self) -> None:
        self.resume = self.ctx.resume


def train(
    make: Any, *callbacks: harness.Callback, accumulate: int = 1, **options: Any
) -> harness.Fitted:
    return sgd().fit(
        make(),
        2,
        callbacks=[Scale(), *callbacks],
        accelerator=SingleDevice("cpu", accumulate=accumulate),
        tracker=False,
        verbose=False,
        seed=1,
        **options,
    )


def check_resumes(make: Any, folder: Path, **options: Any) -> list[str]:
    """Resume from each checkpoint of a fit; return the first lines of the reports."""
    saves = ModelCheckpoint(folder, every_n_steps=2, keep_last=99)
    whole = train(make, saves, **options)
    lines = []
    for path in sorted(folder.iterdir())[:-1]:
        report = Report()
        resumed = train(make, ResumeFromCheckpoint(path), report, **options)
        lines += report.lines[:1]
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, whole.model.state_dict()[name]), path.name
    return lines


def load(part: Any, **options: Any) -> DataLoader:
    return DataLoader(part, batch_size=BATCH, **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: load(Endless()), {"limit_batches": 5, "accumulate": 2}),
        (lambda: load(Resets()), {}),
        (lambda: load(BeginsOnce()), {"accumulate": 2}),
        (lambda: load(ByEpoch()), {}),
        (lambda: load(Scaled(), shuffle=True), {}),
        (lambda: load(TensorDataset(X, Y), sampler=Walk()), {}),
        (OwnPosition, {}),
        (AsTorchdata, {}),
    ],
    ids=[
        "endless",
        "resets",
        "begins",
        "epochs",
        "scaled",
        "sampler",
        "loader",
        "torchdata",
    ],
)
def test_part_of_a_loader_with_a_state_resumes_exactly(
    make: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    lines = check_resumes(make, tmp_path, **options)
    parts = [
        line for line in lines if line.split()[0] in {"dataset", "sampler", "loader"}
    ]
    assert not any(" differs " in line or " missing " in line for line in parts)


@pytest.mark.slow
def test_stream_with_a_state_that_workers_read_resumes_exactly(tmp_path: Path) -> None:
    check_resumes(lambda: load(BeginsOnce(), num_workers=2), tmp_path)


def test_resume_says_first_which_state_it_cannot_restore(tmp_path: Path) -> None:
    def make(kind: Any) -> Any:
        return lambda: load(kind(), num_workers=1, persistent_workers=True)

    class Odd(Scaled):
        def state_dict(self) -> dict[str, Any]:
            return {"lock": object()}

    train(lambda: load(Odd()), ModelCheckpoint(tmp_path / "odd"))
    report = Report()
    (*_, first) = sorted((tmp_path / "odd").iterdir())
    with pytest.raises(CheckpointError, match="its state could not be saved"):
        train(lambda: load(Odd()), ResumeFromCheckpoint(first, strict=True), report)

    train(make(Resets), ModelCheckpoint(tmp_path / "late", keep_last=9))
    path = min((tmp_path / "late").iterdir())
    train(make(Resets), ResumeFromCheckpoint(path), report)
    assert report.lines[0].split()[:3] == ["dataset", "Resets", "missing"]
    assert "persistent workers had its state" in report.lines[0]


def test_resume_continues_a_stream_by_its_state_where_reading_again_leads_elsewhere(
    tmp_path: Path,
) -> None:
    """A limit ended the pass before, so its state looks like one to continue from."""
    limit = {"limit_batches": 4}
    saves = ModelCheckpoint(tmp_path, every_n_epochs=0, every_n_steps=6)
    whole = train(lambda: load(BeginsOnce()), saves, **limit)
    (path,) = tmp_path.iterdir()
    report = Report()
    resume = ResumeFromCheckpoint(path)
    resumed = train(lambda: load(BeginsOnce()), resume, report, **limit)
    assert "dataset BeginsOnce   differs" in report.lines[0]
    assert torch.equal(resumed.model.head.weight, whole.model.head.weight)


def test_find_stateful_names_parts_by_their_place() -> None:
    both = ConcatDataset([Scaled(), TensorDataset(X, Y), Scaled()])
    found = find_stateful(load(both, sampler=Walk()))
    assert [*found] == ["sampler", "dataset.datasets.0", "dataset.datasets.2"]
    assert find_stateful(OwnPosition()) == {}
