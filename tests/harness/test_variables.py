"""State that code keeps beside its objects, in fits that are stopped and resumed."""

from __future__ import annotations

import functools
import gc
import itertools
import queue
import random
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum, Flag
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler, WeightedRandomSampler

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import LRScheduler, ModelCheckpoint, ResumeFromCheckpoint
from harness.checkpoint.format import list_checkpoints, read_rank
from harness.variables import find_globals
from tests.harness import stops
from tests.harness.stops import Line, StopAt, X, Y, sgd

CALLS, SEEN, EARLY = 0, [0], [0]
RANDOM: Any = None
FROZEN: Any = None
LOCAL = threading.local()


class Stage(Enum):
    EARLY = 1
    LATE = 2


def begin() -> None:
    """Set the variables of this module as when it was imported."""
    global CALLS, RANDOM, FROZEN
    CALLS, RANDOM, FROZEN = 0, np.random.default_rng(3), nn.Linear(50, 50)
    SEEN[:] = [0]
    Model.passes = 0
    Model.draws.seed(6)
    LOCAL.count = 0
    weigh.count = 0  # type: ignore[attr-defined]
    weigh.__defaults__ = ([],)


def weigh(seen: list[int] = []) -> float:  # noqa: B006  it keeps state
    """Called by the loss: state in an attribute, a default and this module."""
    global CALLS
    CALLS += 1
    weigh.count += 1  # type: ignore[attr-defined]
    seen.append(1)
    SEEN.append(CALLS)
    return 1 + 0.01 * (CALLS + len(seen) + len(SEEN)) + float(RANDOM.random())


@dataclass(slots=True)
class Slots:
    count: int = 0


class Model(Line):
    """State in a class, a hook, slots, and attributes that share memory."""

    passes = 0
    draws = random.Random(6)

    def __init__(self) -> None:
        super().__init__()
        self.slots, self.space = Slots(), types.SimpleNamespace(count=0)
        self.stage, self.text = Stage.EARLY, b""
        self.log: list[int] = []
        self.logs = {"all": self.log}
        self.one = torch.zeros(3)
        self.two = self.one[1:]
        self.late: Any = None
        self.part: Any = None
        self.view: Any = None
        self.fc.register_forward_hook(self.make_hook())

    @staticmethod
    def make_hook() -> Callable[..., torch.Tensor]:
        state = {"count": 0}
        noise = torch.Generator().manual_seed(5)

        def hook(module, inputs, output):
            state["count"] += 1
            noisy = torch.rand((), generator=noise)
            return output * (1 + 0.01 * state["count"] + 0.01 * noisy)

        return hook

    def forward(self, x):
        if self.training:
            Model.passes += 1
            LOCAL.count += 1
            self.slots.count, self.space.count = Model.passes, Model.passes
            self.stage = Stage.LATE if Model.passes > 1 else Stage.EARLY
            self.text += b"x"
            self.log.append(1)
            self.two += 1
            if self.view is None:
                self.seen: list[int] = []
                self.both = {"seen": [self.seen, 1]}
                self.view = self.fc.weight.detach()[:, 1:3]
                self.late = torch.zeros(2)
                self.part = self.late[:1]
            self.part += 1
            self.seen.append(1)
        pred = super().forward(x)
        if self.view is not None:
            pred = pred + 0.01 * (self.view.sum() + self.late.sum())
        counts = self.slots.count + self.space.count + len(self.logs["all"])
        counts += len(self.text) + self.stage.value + int(self.one.sum())
        counts += LOCAL.count + self.draws.random()
        return pred * (1 + 0.01 * counts)


def make_loss() -> Callable[..., torch.Tensor]:
    count, state = 0, {"mean": torch.zeros(())}
    draw = random.Random(4)

    def loss(pred, target):
        nonlocal count
        count += 1
        own = (pred - target).pow(2).mean() * weigh() * (1 + 0.1 * draw.random())
        state["mean"] = 0.9 * state["mean"] + 0.1 * own.detach()
        assert FROZEN is not None  # a module that the fit does not change
        return own / (1 + state["mean"] + 0.01 * count)

    return loss


def make_schedule() -> Callable[[int], float]:
    state = {"count": 0}

    def schedule(_: int) -> float:
        state["count"] += 1
        return 1 / state["count"]

    return schedule


class Shares(torch.optim.Optimizer):
    """Shares groups and state with the optimizer that it wraps."""

    def __init__(self, params, lr=0.05) -> None:
        self.base = torch.optim.Adam(params, lr=lr)
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.defaults = self.base.defaults

    def step(self, closure=None):
        self.base.step()


class Rows(Dataset):
    """Counts, keeps what it drew, and has a level that a callback changes."""

    def __init__(self) -> None:
        self.num_reads, self.level = 0, 1.0
        self.kept: dict[int, torch.Tensor] = {}
        self.names = [{"row": row} for row in range(5000)]

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        self.num_reads += 1
        if row not in self.kept:
            self.kept[row] = torch.rand(())
        noise = self.kept[row] + 0.001 * self.num_reads
        return X[row] * self.level + noise, Y[row]


class Order(Sampler[int]):
    """Another order in each epoch, from numbers of its own."""

    def __init__(self) -> None:
        self.epoch = 0

    def __len__(self) -> int:
        return len(X)

    def __iter__(self) -> Iterator[int]:
        self.epoch += 1
        draws = torch.Generator().manual_seed(self.epoch)
        own = RANDOM.integers(1 << 30)
        return iter(((torch.randperm(len(X), generator=draws) + own) % len(X)).tolist())


def make_levels(rows: Rows) -> harness.Callback:
    """A callback that changes the data and the context, and a number of its closure."""
    num = 0

    class Levels(harness.Callback):
        def on_train_batch_end(self) -> None:
            nonlocal num
            num += 1
            rows.level *= 0.95
            self.ctx.buffers["count"] = self.ctx.buffers.get("count", 0) + 1
            change = 0.001 * (num + self.ctx.buffers["count"])
            self.ctx.model.fc.bias.data += change

    return Levels()


def run(data: Any, *callbacks: Any, seed: int = 1) -> dict[str, Any]:
    """Fit, and tell the weights, the losses and what is kept elsewhere."""
    learner = harness.setup(Model, loss=make_loss(), optimizer=Shares)
    found: list[Any] = []

    class Look(harness.Callback):
        def on_fit_end(self) -> None:
            found.append(self.ctx.opt)

    fitted = learner.fit(
        data,
        4,
        callbacks=[
            LRScheduler(LambdaLR, lr_lambda=make_schedule()),
            Look(),
            *callbacks,
        ],
        accelerator=SingleDevice("cpu"),
        seed=seed,
        tracker=False,
        verbose=False,
    )
    model: Any = fitted.model
    opt = found[0]
    assert opt.state is opt.base.state
    assert opt.param_groups is opt.base.param_groups
    names = ("slots", "space", "stage", "text", "logs", "one", "two", "late", "part")
    return {
        "weights": {n: p.tolist() for n, p in model.state_dict().items()},
        "state": [
            own.tolist() for entry in opt.state.values() for own in entry.values()
        ],
        "records": fitted.records["metrics"],
        "module": (CALLS, SEEN, RANDOM.bit_generator.state, weigh.__defaults__),
        "model": {name: repr(getattr(model, name)) for name in names},
        "shared": [model.logs["all"] is model.log, model.both["seen"][0] is model.seen],
        "views": (
            model.view.data_ptr() - model.fc.weight.data_ptr(),
            model.part.data_ptr() - model.late.data_ptr(),
        ),
    }


def make_data(rows: Rows) -> DataLoader:
    return DataLoader(rows, 12, sampler=Order())


def stop_and_resume(folder: Path, stop: int) -> dict[str, Any]:
    begin()
    rows = Rows()
    save = ModelCheckpoint(folder, every_n_epochs=0)
    run(make_data(rows), make_levels(rows), save, StopAt(stop))
    begin()
    rows = Rows()
    resume = ResumeFromCheckpoint(folder, strict=True)
    found = run(make_data(rows), make_levels(rows), resume, seed=9)
    return {**found, "rows": [rows.num_reads, rows.level]}


@pytest.mark.parametrize("stop", [3, 4])
def test_resume_with_state_in_code_and_data_equals_the_unbroken_fit(tmp_path, stop):
    begin()
    rows = Rows()
    whole = run(make_data(rows), make_levels(rows))
    whole["rows"] = [rows.num_reads, rows.level]
    resumed = stop_and_resume(tmp_path, stop)
    for name, expected in whole.items():
        assert repr(resumed[name]) == repr(expected), name
    assert [(own.name, own.value) for own in Stage] == [("EARLY", 1), ("LATE", 2)]
    state = read_rank(list_checkpoints(tmp_path)[0], 0)
    assert "globals" not in state["held"]  # the frozen module has not changed
    assert state["not_kept"] == {}


def test_weights_of_a_sampler_of_torch_are_resumed(tmp_path):
    class Favors(harness.Callback):
        def __init__(self, sampler: WeightedRandomSampler) -> None:
            self.sampler = sampler

        def on_epoch_end(self) -> None:
            self.sampler.weights[:3] *= 3

    def fit_weighted(*callbacks: Any) -> Any:
        sampler = WeightedRandomSampler(torch.ones(24), 24)  # type: ignore[arg-type]
        data = DataLoader(torch.utils.data.TensorDataset(X, Y), 12, sampler=sampler)
        own = [Favors(sampler), *callbacks]
        return sgd().fit(data, 3, callbacks=own, seed=1, tracker=False, verbose=False)

    whole = fit_weighted().model.fc.weight
    fit_weighted(ModelCheckpoint(tmp_path, every_n_epochs=0), StopAt(3))
    assert torch.equal(
        fit_weighted(ResumeFromCheckpoint(tmp_path)).model.fc.weight, whole
    )


class Untold(Line):
    """What a checkpoint cannot hold."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count()
        self.act: Callable[[torch.Tensor], torch.Tensor] = torch.tanh
        self.price = Decimal(1)
        self.queue: queue.Queue[int] = queue.Queue()

    @functools.lru_cache(maxsize=8)  # noqa: B019  a program of a user
    def noise(self, num: int) -> float:
        return float(torch.rand(()))

    def forward(self, x):
        self.price, self.act = self.price * 2, torch.relu
        self.queue.put(next(self.numbers))
        return self.act(super().forward(x)) + self.noise(len(x))


class Mode(Flag):
    ONE = 1
    TWO = 2


class Asked:
    """An object that fails whatever it is asked, as a proxy outside of its request does."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    @property  # type: ignore[misc]
    def __class__(self) -> Any:
        raise RuntimeError

    @property
    def __dict__(self) -> Any:
        raise RuntimeError

    def __eq__(self, other: object) -> bool:
        raise RuntimeError

    __hash__ = None  # type: ignore[assignment]


class Files(Mapping[str, bytes]):
    """A mapping that reads a file when it is asked for an item."""

    def __getitem__(self, name: str) -> bytes:
        raise OSError(name)

    def __len__(self) -> int:
        raise OSError

    def __iter__(self) -> Iterator[str]:
        raise OSError


ASKED: Any = Asked()
FILES: Any = Files()


def make_odd(num: int) -> dict[str, Any]:
    """Values that look plain, and that no checkpoint holds."""
    flat = torch.full((2, 2), float(num))
    return {
        "flags": Mode.ONE | Mode.TWO if num else Mode.ONE,
        "keys": {(Stage.EARLY, 1): num},
        "day": np.datetime64(num, "D"),
        "complex": np.complex64(num),
        "long": np.longdouble(num),
        "longs": np.full(2, num, np.longdouble),
        "bytes": np.full(2, num, ">f4"),
        "rows": flat.to_sparse_coo().to(torch.complex64),
        "list": [Decimal(num)],
    }


class Odd(Line):
    asked = ASKED

    def __init__(self) -> None:
        super().__init__()
        self.count, self.small, self.nan = 0, torch.zeros(2), torch.zeros(1)
        vars(self).update(make_odd(0))

    def forward(self, x):
        if self.training:
            self.count += 1
            self.small = torch.ones(2).to(torch.float8_e4m3fn)
            self.nan = torch.full((1,), float("nan"))
            vars(self).update(make_odd(self.count))
        return super().forward(x) if ASKED is not FILES else x


def test_odd_values_that_code_names_end_neither_a_fit_nor_its_resume(tmp_path):
    data: Any = (X, Y)
    sgd(Odd).fit(data, 1, callbacks=[ModelCheckpoint(tmp_path)], tracker=False)
    notes = read_rank(list_checkpoints(tmp_path)[0], 0)["not_kept"]
    assert {*notes} == {f"model.{name}" for name in make_odd(0)} - {"model.rows"}
    resume = ResumeFromCheckpoint(tmp_path)
    model: Any = sgd(Odd).fit(data, 1, callbacks=[resume], tracker=False).model
    assert model.count > 0
    assert model.small.float().tolist() == [1, 1]


@dataclass(frozen=True)
class Choice:
    name: str


ONE, TWO = Choice("one"), Choice("two")


class Chooses(harness.Callback):
    def on_train_batch_end(self) -> None:
        model: Any = self.ctx.model
        model.choice = TWO


class Chosen(Line):
    def __init__(self) -> None:
        super().__init__()
        self.choice = ONE


def test_resume_writes_into_no_object_that_the_fit_replaced(tmp_path):
    data: Any = (X, Y)
    own = [Chooses(), ModelCheckpoint(tmp_path)]
    sgd(Chosen).fit(data, 1, callbacks=own, tracker=False)
    resume = ResumeFromCheckpoint(tmp_path)
    model: Any = sgd(Chosen).fit(data, 1, callbacks=[resume], tracker=False).model
    assert (model.choice, ONE.name, TWO.name) == (TWO, "one", "two")


class Early(harness.Callback):
    """Changes a global variable at the first batch alone."""

    def on_train_batch_end(self) -> None:
        if self.ctx.step == 1:
            EARLY[0] += 7


def test_later_checkpoints_hold_what_a_resume_in_the_same_process_restored(tmp_path):
    EARLY[0] = 0
    for epochs, callbacks in [(1, []), (2, [ResumeFromCheckpoint(tmp_path)])]:
        save = ModelCheckpoint(tmp_path)
        data: Any = (X, Y)
        own = [Early(), save, *callbacks]
        sgd().fit(data, epochs, callbacks=own, tracker=False)
    EARLY[0] = 0  # as in a new process
    resume = ResumeFromCheckpoint(tmp_path)
    sgd().fit(data, 2, callbacks=[Early(), resume], tracker=False)
    assert EARLY == [7]


def test_class_of_a_model_dies_after_its_fit(tmp_path):
    class Own(Line):
        def forward(self, x):
            return super().forward(x)  # its closure holds the class

    save, data = ModelCheckpoint(tmp_path), (X, Y)
    sgd(Own).fit(data, 1, callbacks=[save], tracker=False)  # type: ignore[arg-type]
    ref = weakref.ref(Own)
    del Own
    gc.collect()
    assert ref() is None


class Replaces(harness.Callback):
    def on_train_batch_end(self) -> None:
        self.ctx.loss_fn = nn.L1Loss()


def test_state_that_no_checkpoint_holds_is_named(tmp_path):
    data: Any = (X, Y)
    own = [Replaces(), ModelCheckpoint(tmp_path)]
    sgd(Untold).fit(data, 1, callbacks=own, tracker=False, verbose=False)
    notes = read_rank(list_checkpoints(tmp_path)[0], 0)["not_kept"]
    place, cannot = f"globals {__name__}", "a checkpoint cannot hold a value of type"
    assert notes == {
        "model.numbers": "nothing tells the position of an iterator; keep a count instead",
        "model.price": f"{cannot} Decimal; keep a number or a text",
        "model.act": f"{cannot} builtin_function_or_method; keep a number or a text",
        "model.queue": "it is a Queue of queue, without state_dict",
        f"{place}.Untold.noise": "it keeps results, which will be computed again",
        "ctx.loss_fn": "the fit replaced it by another L1Loss",
    }


def test_report_names_another_loss_order_and_validation(tmp_path, capsys):
    def train(epochs: int, loss: Any, valid: Any, *callbacks: Any, **options: Any):
        data: Any = (X, Y)
        sgd(loss=loss).fit(
            data,
            epochs,
            valid,
            callbacks=callbacks,
            dataloader_options=options,
            tracker=False,
            verbose=True,
        )

    train(1, nn.MSELoss(), (X, Y), ModelCheckpoint(tmp_path))
    resume = ResumeFromCheckpoint(tmp_path)
    train(2, nn.functional.l1_loss, None, resume, shuffle=False)
    report = " ".join(capsys.readouterr().err.split())
    assert "loss differs saved 'MSELoss', now 'l1_loss'" in report
    assert "sampler differs saved 'RandomSampler', now 'SequentialSampler'" in report
    assert "validation differs saved {'valid': 24}, now {}" in report


def test_variables_of_other_modules_are_found_where_code_names_them():
    def use() -> Any:
        return stops.fit, np.zeros, CALLS

    names = {f"{place}.{name}" for place, _, name in find_globals(use)}
    assert {f"{stops.__name__}.fit", f"{__name__}.CALLS", f"{__name__}.stops"} <= names
    assert not any(name.startswith("numpy.") for name in names)


class Signs(nn.Linear):
    """A layer whose table changes only by a sign and a type."""

    def __init__(self) -> None:
        super().__init__(3, 1)
        self.table = {"a": [0.0, 1]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.table["a"] = [-0.0, True]
        return super().forward(x)


def test_tables_that_change_by_a_sign_or_a_type_alone_are_kept(tmp_path):
    learner = harness.setup(Signs, loss=nn.MSELoss(), optimizer=torch.optim.Adam)
    data = torch.ones(8, 3), torch.ones(8, 1)
    learner.fit(data, 1, callbacks=[ModelCheckpoint(tmp_path)], tracker=False)
    resume = ResumeFromCheckpoint(tmp_path)
    fitted = learner.fit(data, 1, callbacks=[resume], tracker=False)
    assert str(fitted.model.table) == "{'a': [-0.0, True]}"
