from __future__ import annotations

import copy
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.regression import R2Score

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import LRScheduler, ModelCheckpoint, ResumeFromCheckpoint
from harness.checkpoint.format import list_checkpoints
from harness.errors import CheckpointError
from tests.harness.exact import (
    BATCHES,
    BY_STEPS,
    CASES,
    EPOCHS,
    VALID,
    WITH_WORKERS,
    Case,
    Conv,
    Net,
    OwnPosition,
    Stream,
    X,
    Y,
    differences,
    fit,
    loader,
    rewritten,
    scheduled,
    sgd,
)
from tests.harness.fakes import At, Tape

STOPS = [("on_train_batch_end", 5), ("on_train_batch_end", 3)]
"""Where the quick form stops, and stops again: within windows of both epochs."""


def check_exact(
    case: Case,
    tmp_path: Path,
    stops: list[tuple[str, int]],
    unbroken: Any = None,
) -> None:
    if unbroken is None:
        unbroken = fit(case, tmp_path / "unbroken")
    for event, after in stops:
        folder = tmp_path / f"{event}-{after}"
        broken = fit(case, folder, (event, after))
        assert broken["signum"] == signal.SIGINT
        resumed = fit(case, folder)
        assert resumed["signum"] is None
        assert differences(resumed, unbroken) == [], f"stopped at {event} {after}"


class Made:
    """Fits of the cases that several tests look at, each made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._unbroken: dict[str, Any] = {}

    def fit_unbroken(self, name: str) -> Any:
        """Outcome of the whole fit."""
        if name not in self._unbroken:
            self._unbroken[name] = fit(CASES[name], self.folder / "unbroken" / name)
        return self._unbroken[name]

    def copy_stopped(self, name: str, folder: Path) -> None:
        """Copy what a fit leaves that stops, is resumed, and stops again."""
        stopped = self.folder / "stopped" / name
        if not stopped.exists():
            for stop in STOPS:
                assert fit(CASES[name], stopped, stop)["signum"] == signal.SIGINT
        shutil.copytree(stopped, folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.mark.parametrize("name", CASES)
def test_resume_after_some_batches_equals_the_unbroken_fit(
    name: str, tmp_path: Path, made: Made
) -> None:
    made.copy_stopped(name, tmp_path / "stopped")
    resumed = fit(CASES[name], tmp_path / "stopped")
    assert resumed["signum"] is None
    assert differences(resumed, made.fit_unbroken(name)) == []


@pytest.mark.parametrize(
    "name", ["adam-onecycle-metrics", "accumulation", "wrapped-metrics"]
)
def test_resume_at_the_ends_of_epochs_equals_the_unbroken_fit(
    name: str, tmp_path: Path, made: Made
) -> None:
    ends = [("on_train_batch_end", k) for k in (BATCHES, EPOCHS * BATCHES)]
    check_exact(CASES[name], tmp_path, ends, made.fit_unbroken(name))


class Optimizes(Net):
    """A step that fires the events of a step."""

    def step(self) -> None:
        pred = self(self.ctx.input)
        self.ctx.optimize(nn.functional.cross_entropy(pred, self.ctx.target))


def test_resume_of_an_epoch_without_batches_left_warns_of_no_silent_listener(
    tmp_path: Path,
) -> None:
    case = Case(learner=lambda: sgd(Optimizes), callbacks=scheduled)
    check_exact(case, tmp_path, [("on_train_batch_end", BATCHES)])


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *WITH_WORKERS])
def test_resume_after_any_batch_equals_the_unbroken_fit(
    name: str, tmp_path: Path
) -> None:
    stops = [("on_train_batch_end", k) for k in range(1, EPOCHS * BATCHES + 1)]
    check_exact((CASES | WITH_WORKERS)[name], tmp_path, stops)


@pytest.mark.parametrize("name", WITH_WORKERS)
def test_resume_with_worker_processes_equals_the_unbroken_fit(
    name: str, tmp_path: Path
) -> None:
    check_exact(WITH_WORKERS[name], tmp_path, [("on_train_batch_end", 9)])


@pytest.mark.parametrize("name", ["adam-onecycle-metrics", "callbacks"])
def test_resume_after_a_stop_in_validation_equals_the_unbroken_fit(
    name: str, tmp_path: Path, made: Made
) -> None:
    stops = [("on_valid_batch_end", k) for k in (1, 3, 6)]
    check_exact(CASES[name], tmp_path, stops, made.fit_unbroken(name))


@pytest.mark.parametrize("name", BY_STEPS)
def test_resume_of_a_fit_that_validates_by_steps_equals_the_unbroken_fit(
    name: str, tmp_path: Path
) -> None:
    # Batch 4 is one after which a validation follows, batch 7 lies between two.
    stops = [("on_train_batch_end", 4), ("on_valid_batch_end", 2)]
    check_exact(BY_STEPS[name], tmp_path, stops)


class StartsAnew(DataLoader):
    """A loader whose state after its last batch is that of the next pass, as torchdata's is."""

    def __init__(self) -> None:
        super().__init__(TensorDataset(X, Y), batch_size=4)
        self.at = self.first = 0

    def __iter__(self) -> Any:
        self.at, self.first = self.first, 0
        while self.at < BATCHES:
            self.at += 1
            rows = slice(4 * self.at - 4, 4 * self.at)
            yield [X[rows], Y[rows]]
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["at"]


@pytest.mark.parametrize(
    ("data", "accumulate", "every"),
    [(StartsAnew, 1, "4 steps"), (StartsAnew, 4, "1 step"), (Stream, 2, "2 steps")],
)
def test_resume_of_a_finished_fit_trains_and_validates_nothing_again(
    data: Any, accumulate: int, every: str, tmp_path: Path
) -> None:
    def train(*callbacks: harness.Callback) -> tuple[harness.Fitted, list[str]]:
        tape = Tape()
        loader = data() if data is StartsAnew else DataLoader(data(), 4)
        fitted = sgd().fit(
            loader,
            1,
            VALID,
            valid_every=every,
            callbacks=[*callbacks, tape],
            accelerator=SingleDevice("cpu", accumulate=accumulate),
            tracker=False,
            verbose=False,
            seed=1,
        )
        return fitted, tape.events

    saves = ModelCheckpoint(tmp_path, every_n_steps=1, keep_last=9)
    whole, _ = train(saves)
    *_, last_batch, last = sorted(tmp_path.iterdir())
    for path in (last_batch, last):
        resumed, events = train(ResumeFromCheckpoint(path))
        assert "on_train_batch_begin" not in events
        assert ("on_valid_begin" in events) == (path == last_batch)
        assert repr(resumed.get_metrics()) == repr(whole.get_metrics())
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, whole.model.state_dict()[name])


def test_lower_limit_ends_the_resumed_epoch_and_strict_refuses_it(
    tmp_path: Path,
) -> None:
    def train(limit: int, *callbacks: harness.Callback, epochs: int = 1) -> list[str]:
        tape = Tape()
        sgd().fit(
            StartsAnew(),
            epochs,
            limit_batches=limit,
            callbacks=[*callbacks, tape],
            tracker=False,
            verbose=False,
        )
        return tape.events

    train(5, ModelCheckpoint(tmp_path, every_n_epochs=0, every_n_steps=4))
    (path,) = tmp_path.iterdir()
    assert train(5, ResumeFromCheckpoint(path)).count("on_train_batch_end") == 1
    assert "on_train_batch_end" not in train(3, ResumeFromCheckpoint(path))
    later = train(4, ResumeFromCheckpoint(path), epochs=2)  # begins at the first row
    assert later.count("on_train_batch_end") == 4
    with pytest.raises(CheckpointError, match=r"limit_batches: saved .*5.*now .*3"):
        train(3, ResumeFromCheckpoint(path, strict=True))


def test_metric_whose_state_takes_its_shape_from_the_first_batch_resumes(
    tmp_path: Path,
) -> None:
    def train(*callbacks: harness.Callback) -> harness.Fitted:
        learner = harness.setup(
            nn.Linear,
            loss=nn.MSELoss(),
            optimizer=torch.optim.SGD,
            metrics={"r2": harness.on(R2Score(), pred=torch.abs)},
        ).set_hparams(in_features=4, out_features=1)
        return learner.set_opt_hparams(lr=0.01).fit(
            (X, X.sum(1, keepdim=True)),
            1,
            callbacks=callbacks,
            dataloader_options={"batch_size": 4},
            tracker=False,
            verbose=False,
            seed=1,
        )

    saves = ModelCheckpoint(tmp_path, every_n_epochs=0, every_n_steps=3)
    whole = train(saves)
    (path,) = tmp_path.iterdir()
    resumed = train(ResumeFromCheckpoint(path))
    assert resumed.get_metrics().equals(whole.get_metrics())


@pytest.mark.slow
@pytest.mark.parametrize("name", BY_STEPS)
def test_resume_at_any_batch_between_validations_equals_the_unbroken_fit(
    name: str, tmp_path: Path
) -> None:
    stops = [("on_train_batch_end", k) for k in range(1, 10)]
    stops += [("on_valid_batch_end", k) for k in range(1, 9 if name == "sets" else 3)]
    check_exact(BY_STEPS[name], tmp_path, stops)


@pytest.mark.parametrize("saves", [False, True])
def test_validation_is_marked_where_something_saves(
    saves: bool, tmp_path: Path
) -> None:
    marks: list[bool] = []
    look = At("on_valid_begin", lambda ctx: marks.append(ctx.valid_start is not None))
    save = [harness.callbacks.ModelCheckpoint(tmp_path)] if saves else []
    sgd().fit((X, Y), 2, VALID, callbacks=[look, *save], tracker=False, verbose=False)
    assert marks == [saves] * 2


# ------------------------------------------------ without one piece the result differs

State = dict[str, Any]


def drop(*path: str, value: Any = None) -> Callable[[State], None]:
    """Put an empty value, or `value`, in the place of one piece of the state."""

    def change(state: State) -> None:
        *above, last = path
        for key in above:
            state = state[key]
        if value is None:
            state.pop(last)
        else:
            state[last] = copy.deepcopy(value)

    return change


def both(*changes: Callable[[State], None]) -> Callable[[State], None]:
    """Change two pieces of the state."""

    def change(state: State) -> None:
        for one in changes:
            one(state)

    return change


def zero_buffers(state: State) -> None:
    for name, tensor in state["accelerator"]["model"].items():
        if "running" in name:
            tensor.zero_()


def other_generator(place: int, value: Any) -> Callable[[State], None]:
    def change(state: State) -> None:
        state["random"]["generators"][place] = value

    return change


def earlier(state: State) -> None:
    state["position"]["iter"] -= 1


def no_moments(state: State) -> None:
    for group in state["accelerator"]["optimizers"].values():
        group["state"] = {}


def other_rate(state: State) -> None:
    state["accelerator"]["optimizers"]["opt"]["param_groups"][0]["lr"] *= 2


NEW = torch.Generator().manual_seed(99).get_state()
PIECES = {
    "weights": ("stream", lambda s: s["accelerator"]["model"]["head.bias"].zero_()),
    "buffers": ("frozen", zero_buffers),
    "extra state": ("channels-last", drop("extra", "")),
    "frozen": ("frozen", drop("accelerator", "frozen", value=["head.bias"])),
    "optimizer state": ("augmented", no_moments),
    "optimizer options": ("augmented", other_rate),
    "one of two optimizers": ("two-optimizers", no_moments),
    "gradients": ("accumulation", drop("accelerator", "grads", value={})),
    "gradients of an own step": ("own-step", drop("accelerator", "grads", value={})),
    "place in the window": (
        "accumulation",
        drop("accelerator", "done", value={"opt": 0}),
    ),
    "size of the window": ("own-position", drop("pass", "window", value=1)),
    "batches fetched ahead": ("accumulation-unsized", drop("pass", "ahead", value=1)),
    "steps": ("frozen", drop("accelerator", "steps", value={"opt": 0})),
    "scheduler": ("adam-onecycle-metrics", drop("callbacks", "LRScheduler")),
    "metrics": ("adam-onecycle-metrics", drop("callbacks", "Metrics")),
    "profile": ("augmented", drop("callbacks", "Profile")),
    "best weights": ("callbacks", drop("callbacks", "KeepBestModel")),
    "patience": ("callbacks", drop("callbacks", "EarlyStopping")),
    "plateau": ("callbacks", drop("callbacks", "LRScheduler")),
    "a user's callback": ("callbacks", drop("callbacks", "CountsValidation")),
    "records": (
        "augmented",
        drop("records", value={"metrics": {"train": [], "valid": []}}),
    ),
    "Python's generator": (
        "augmented",
        drop("random", "python", value=random.Random(9).getstate()),
    ),
    "NumPy's generator": (
        "augmented",
        drop("random", "numpy", value=np.random.RandomState(9).get_state()),
    ),
    "torch's generator": ("own-loader", drop("random", "torch", value=NEW)),
    "a loader's generator": ("own-loader", other_generator(0, NEW)),
    "a model's generator": ("channels-last", other_generator(0, NEW)),
    "a data set's generator 1": (
        "own-generators",
        other_generator(0, random.Random(9).getstate()),
    ),
    "a data set's generator 2": (
        "own-generators",
        other_generator(1, np.random.default_rng(9).bit_generator.state),
    ),
    "a data set's generator 3": (
        "own-generators",
        other_generator(2, np.random.RandomState(9).get_state()),
    ),
    "a data set's generator 4": ("own-generators", other_generator(3, NEW)),
    "order": ("adam-onecycle-metrics", drop("pass", "began", "torch", value=NEW)),
    "order of a stream": ("stream", drop("pass", "began", "torch", value=NEW)),
    # Either of them is enough for a sampler without a memory.
    "order of a lazy sampler": (
        "lazy-sampler",
        both(drop("pass", "began", "torch", value=NEW), drop("pass", "draws")),
    ),
    "order of a weighted sampler": (
        "weighted-sampler",
        drop("pass", "began", "torch", value=NEW),
    ),
    "order by a loader's generator": (
        "own-loader",
        drop("pass", "began", "generators", value=[NEW]),
    ),
    "position": ("stream", earlier),
    "a loader's own position": (
        "own-position",
        drop("pass", "loader", value={"passes": 0, "at": 0}),
    ),
}


class Averages(harness.Callback):
    """Validates with averaged weights, as people write it."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.own: dict[str, Tensor] = {}

    def on_train_batch_end(self) -> None:
        for name, value in self.ctx.model.state_dict().items():
            mean = self.mean.setdefault(name, value.clone())
            if value.is_floating_point():
                mean.lerp_(value, 0.1)

    def on_valid_begin(self) -> None:
        self.own = copy.deepcopy(self.ctx.model.state_dict())
        self.ctx.model.load_state_dict(self.mean)

    def on_valid_end(self) -> None:
        self.ctx.model.load_state_dict(self.own)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean = state["mean"]


class CountsInValidation(Conv):
    """Extra state that changes in validation."""

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def decay_in_validation(folder: Path) -> list[harness.Callback]:
    decay = torch.optim.lr_scheduler.ExponentialLR
    return [LRScheduler(decay, gamma=0.5, call_on="on_valid_batch_end")]


CHANGES_IN_VALIDATION = {
    "rates": Case(callbacks=decay_in_validation),
    "extra-state": Case(learner=lambda: sgd(CountsInValidation)),
    "weights": Case(callbacks=lambda folder: [Averages()]),
}


@pytest.mark.parametrize("name", CHANGES_IN_VALIDATION)
def test_resume_after_a_batch_of_a_validation_that_changes_the_fit_is_exact(
    name: str, tmp_path: Path
) -> None:
    check_exact(CHANGES_IN_VALIDATION[name], tmp_path, [("on_valid_batch_end", 2)])


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer, and saves its state in a form of its own."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        self.base = torch.optim.SGD(params, lr, momentum=0.9)
        super().__init__(self.base.param_groups, {"lr": lr})
        self.param_groups, self.state = self.base.param_groups, self.base.state
        self.num_steps = 0
        self.slow = [p.detach().clone() for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.base.step()
        self.num_steps += 1
        if self.num_steps % 3 == 0:
            params = [p for group in self.param_groups for p in group["params"]]
            for param, slow in zip(params, self.slow, strict=True):
                slow.lerp_(param, 0.5)
                param.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {"base": self.base.state_dict(), "num_steps": self.num_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.base.load_state_dict(state["base"])
        self.num_steps = state["num_steps"]


def test_resume_of_an_optimizer_whose_state_has_a_form_of_its_own_is_exact(tmp_path):
    def build() -> harness.Learner:
        return harness.setup(Net, loss=nn.CrossEntropyLoss(), optimizer=Lookahead)

    def schedule(folder: Path) -> list[harness.Callback]:
        rate = torch.optim.lr_scheduler.ExponentialLR
        return [LRScheduler(rate, gamma=0.9, call_on="on_train_batch_end")]

    case = Case(learner=build, callbacks=schedule)
    check_exact(case, tmp_path, [("on_train_batch_end", 5)])


class SkipFirst(harness.Callback):
    """Leaves out the first epoch, so that its loader never starts."""

    def on_epoch_begin(self) -> None:
        if self.ctx.epoch == 1:
            raise harness.SkipEpoch


def test_resume_with_workers_that_a_later_epoch_started_is_exact(
    tmp_path: Path,
) -> None:
    case = replace(
        WITH_WORKERS["workers-persistent"], callbacks=lambda folder: [SkipFirst()]
    )
    check_exact(case, tmp_path, [("on_train_batch_end", 2)])


@pytest.mark.parametrize("piece", PIECES)
def test_resume_without_one_piece_of_the_state_differs(
    piece: str, tmp_path: Path, made: Made
) -> None:
    name, change = PIECES[piece]
    made.copy_stopped(name, tmp_path / "broken")
    rewritten(tmp_path / "broken" / "saved", change)
    resumed = fit(CASES[name], tmp_path / "broken")
    assert differences(resumed, made.fit_unbroken(name)) != []


def test_resume_from_a_state_put_together_again_equals_the_unbroken_fit(
    tmp_path: Path, made: Made
) -> None:
    """The ground of the tests above: rewriting alone changes nothing."""
    made.copy_stopped("callbacks", tmp_path / "broken")
    rewritten(tmp_path / "broken" / "saved", lambda state: None)
    resumed = fit(CASES["callbacks"], tmp_path / "broken")
    assert differences(resumed, made.fit_unbroken("callbacks")) == []


class Growing(nn.Module):
    """A buffer that grows by one row a batch."""

    queue: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 1)
        self.register_buffer("queue", torch.zeros(0))

    def forward(self, x):
        if self.training:
            self.queue = torch.cat([self.queue, torch.ones(1)])
        return self.fc(x)


class Remembers(Growing):
    """A buffer that is None until the first batch, also in a layer."""

    last: torch.Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", None)
        self.fc.register_buffer("last", None)

    def forward(self, x):
        if self.training:
            self.last, self.fc.last = x.detach() * 0.1, x.detach().double()
        seen = 0 if self.last is None else self.last.mean() + self.fc.last.mean()
        return super().forward(x + seen).float()


CHANGING_MODELS = {
    "lazy": lambda: nn.Sequential(
        nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.LazyLinear(1)
    ),
    "growing": Growing,
    "from-none": Remembers,
}


@pytest.mark.parametrize("name", CHANGING_MODELS)
def test_resume_of_tensors_that_get_their_shape_in_training_is_exact(name, tmp_path):
    data = (torch.arange(64.0).reshape(16, 4) / 64, torch.arange(16.0).reshape(16, 1))
    learner = harness.setup(
        CHANGING_MODELS[name], loss=nn.MSELoss(), optimizer=torch.optim.SGD
    ).set_opt_hparams(lr=0.01, momentum=0.9)

    def fit(epochs, *own):
        options = {"dataloader_options": {"batch_size": 8}, "tracker": False}
        fitted = learner.fit(data, epochs, seed=1, callbacks=own, **options)
        return fitted.model.state_dict()

    whole = fit(3)
    fit(2, harness.callbacks.ModelCheckpoint(tmp_path))
    resume = harness.callbacks.ResumeFromCheckpoint(tmp_path, strict=True)
    resumed = fit(3, resume)
    assert {n: torch.equal(v, resumed[n]) for n, v in whole.items()} == dict.fromkeys(
        whole, True
    )


def test_keep_best_model_takes_the_shape_of_a_buffer_back():
    x = torch.ones(16, 4)
    learner = harness.setup(Growing, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    # A rate that diverges: the first epoch is the best.
    fitted = learner.set_opt_hparams(lr=10.0).fit(
        (x, x[:, :1]),
        3,
        (x, x[:, :1]),
        callbacks=[harness.callbacks.KeepBestModel()],
        dataloader_options={"batch_size": 8},
        tracker=False,
    )
    assert len(fitted.model.queue) == 2


class Draws(harness.Callback):
    """Draws random numbers in every event, and reads the records of the epoch before."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Any]] = {}
        self.noise = np.random.default_rng(3)

    def _draw(self, event: str) -> None:
        drawn = torch.rand(()).item(), random.random(), self.noise.random()
        before = self.ctx.get_metric("loss", "train", (self.ctx.epoch or 1) - 1)
        place = f"{event} {self.ctx.epoch} {self.ctx.iter if 'batch' in event else ''}"
        self.seen[place] = [*drawn, before]

    def on_epoch_begin(self) -> None:
        self._draw("epoch")

    def on_train_begin(self) -> None:
        self._draw("train")

    def on_train_batch_begin(self) -> None:
        self._draw("batch")

    def on_valid_begin(self) -> None:
        self._draw("valid")

    def on_epoch_end(self) -> None:
        self._draw("end")


@pytest.mark.parametrize("stop", [("on_train_batch_end", 8), ("on_valid_batch_end", 4)])
def test_events_of_a_resumed_epoch_draw_the_same_numbers(stop, tmp_path):
    case = CASES["augmented"]
    whole, broken, resumed = Draws(), Draws(), Draws()
    fit(replace(case, callbacks=lambda folder: [whole]), tmp_path / "whole")
    for draws, ended in ((broken, stop), (resumed, None)):
        own: list[harness.Callback] = [draws]
        fit(replace(case, callbacks=lambda _: own), tmp_path / "on", ended)  # noqa: B023
    assert resumed.seen
    assert resumed.seen == {place: whole.seen[place] for place in resumed.seen}
    assert broken.seen | resumed.seen == whole.seen


def test_resume_with_other_kernels_tells_and_strict_refuses_it(tmp_path):
    def fit(epochs, *own):
        learner = harness.setup(
            lambda: nn.Linear(4, 1), loss=nn.MSELoss(), optimizer=torch.optim.SGD
        ).set_opt_hparams(lr=0.01)
        data = torch.ones(64, 4), torch.ones(64, 1)
        return learner.fit(data, epochs, seed=1, callbacks=own, tracker=False)

    fit(1, harness.callbacks.ModelCheckpoint(tmp_path))
    resume = harness.callbacks.ResumeFromCheckpoint
    text = "deterministic: saved off, now on"
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(
            CheckpointError, match=f"expected no difference, got {text}"
        ):
            fit(2, resume(tmp_path, strict=True))
        fit(2, resume(tmp_path))
    finally:
        torch.use_deterministic_algorithms(False)
    fit(2, resume(tmp_path, strict=True))


def test_strict_refuses_persistent_workers_that_start_new(tmp_path):
    def train(epochs, *callbacks):
        data = loader(num_workers=1, persistent_workers=True)
        sgd().fit(data, epochs, callbacks=callbacks, tracker=False, verbose=False)

    train(1, ModelCheckpoint(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"strict: .*persistent workers start new"
    ):
        train(2, ResumeFromCheckpoint(tmp_path, strict=True))


def test_loader_with_its_own_position_is_refused_if_batches_are_divided_otherwise(
    tmp_path,
):
    def train(data, *callbacks):
        sgd().fit(data, 2, callbacks=callbacks, tracker=False, verbose=False)

    save = ModelCheckpoint(tmp_path, every_n_steps=3, every_n_epochs=0, keep_last=2)
    train(OwnPosition(), save)
    data = OwnPosition()
    data.__dict__["batch_size"] = 2  # as two ranks would have
    got = "got a loader that keeps its own position. Save at the ends of epochs"
    for path in list_checkpoints(tmp_path):  # at the end of the data, and before it
        with pytest.raises(CheckpointError, match=got):
            train(data, ResumeFromCheckpoint(path))
