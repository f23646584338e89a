from __future__ import annotations

import copy
import functools
import random
import signal
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import swa_utils
from torch.optim.lr_scheduler import ExponentialLR
from torchmetrics import MeanMetric

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint
from harness.checkpoint.format import list_checkpoints, read_rank
from harness.checkpoint.held.attributes import copy_attributes
from harness.checkpoint.held.search import Search
from harness.errors import CheckpointError
from tests.harness.stops import Line, X, Y, fit, fit_with_stop, sgd


class Balanced(nn.Module):
    """A loss with a buffer, a parameter and a counter."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(()))
        self.scale = nn.Parameter(torch.ones(()))
        self.calls = 0

    def forward(self, pred, target):
        loss = (pred - target).pow(2).mean() * self.scale.exp() - self.scale
        if self.training:
            self.calls += 1
            self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean.clamp(min=0.1)

    def tell(self) -> list[Any]:
        return [self.mean, self.scale, self.calls]


class HoldsLoss:
    """A loss that is no module and holds one."""

    def __init__(self) -> None:
        self.part = Balanced()

    def __call__(self, pred, target):
        return self.part(pred, target)


def call_part(part, pred, target):
    return part(pred, target)


class Scaled(Line):
    """A scaler hangs on the model."""

    def __init__(self) -> None:
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu", growth_interval=2)

    def step(self) -> None:
        ctx = self.ctx
        ctx.pred = self(ctx.input)
        loss = (ctx.pred - ctx.target).pow(2).mean()
        ctx.loss = loss.detach()
        if ctx.training:
            ctx.opt.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(ctx.opt)
            self.scaler.update()


class SecondOptimizer(Line):
    """Steps a second optimizer by itself, on parameters in a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.gains = [torch.ones((), requires_grad=True)]

    def set_optimizers(self):
        self.others = {"gain": torch.optim.Adam(self.gains, lr=0.1)}
        return torch.optim.SGD(self.parameters(), lr=0.05)

    def step(self) -> None:
        ctx = self.ctx
        ctx.pred = self(ctx.input) * self.gains[0]
        loss = (ctx.pred - ctx.target).pow(2).mean()
        self.others["gain"].zero_grad()
        ctx.optimize(loss)
        if ctx.training:
            self.others["gain"].step()


class HasMetric(Line):
    def __init__(self) -> None:
        super().__init__()
        self.mean = MeanMetric()

    def forward(self, x):
        pred = self.fc(x)
        if self.training:
            self.mean.update(pred.detach())
        return pred


class PlainState(Line):
    """Numbers, tensors and lists as plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.carry = 1.0, torch.zeros(1)
        self.history: list[float] = []
        self.state = (torch.zeros(1),)  # of the batch before, with its graph

    def forward(self, x):
        pred = self.fc(x) * self.gain + self.carry + self.state[0].detach()
        if self.training:
            self.gain *= 0.95
            self.state = (0.1 * pred.amax(0),)
            torch.vmap(lambda row: vars(self).update(row=row) or row)(pred)
            self.carry = 0.1 * pred.detach().mean(0)
            self.history.append(self.gain)
        return pred


class Replay:
    """An object of the user's own, with what it has seen."""

    def __init__(self) -> None:
        self.seen: deque[tuple[torch.Tensor, int]] = deque(maxlen=3)
        self.count, self.sums = 0, np.zeros(2)
        self.random = [np.random.default_rng(0)]

    def add(self, value: torch.Tensor) -> None:
        self.seen.append((value, self.count))
        self.count, self.sums = self.count + 1, self.sums + self.count
        self.sums = self.sums + self.random[0].random()


class Seen(NamedTuple):
    """What a replay buffer holds, as in torch's tutorial of DQN."""

    value: torch.Tensor
    place: int


class HoldsRecords(Line):
    """Named tuples, and an array of objects, as trees of priorities have."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: deque[Seen] = deque(maxlen=3)
        self.tree = np.zeros(4, dtype=object)

    def forward(self, x):
        pred = self.fc(x)
        if self.training:
            self.seen.append(Seen(pred.detach().mean(), len(self.seen)))
            self.tree[len(self.seen)] = (self.seen[-1], None)
        return pred * (1 + 0.01 * sum(self.weigh()))

    def weigh(self) -> list[Any]:
        assert all(type(own) is Seen for own in self.seen)
        held = [pair[0].value for pair in self.tree if pair]
        return [*(own.value + own.place for own in self.seen), *held]


class HoldsMixed(Line):
    """Numbers beside modules in a dict and a list, and averages by parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: dict[str, Any] = {"old": copy.deepcopy(self.fc), "count": 0}
        self.pair = [copy.deepcopy(self.fc), 0.0]
        self.means = {param: param.detach().clone() for param in self.fc.parameters()}

    def forward(self, x):
        pred = self.fc(x)
        if self.training:
            self.parts["count"] += 1
            self.parts["added"] = self.parts["count"] / 2
            self.pair[1] += pred.detach().mean()
            for param, mean in self.means.items():
                mean.lerp_(param.detach(), 0.1)
        return pred * (1 + 0.01 * sum(self.weigh()))

    def weigh(self) -> list[Any]:
        own = self.parts["count"], self.parts.get("added", 0), self.pair[1]
        return [*own, *(mean.sum() for mean in self.means.values())]


class MarksWeights(Line):
    """Attributes of weights, and hooks of them and of the optimizer that keep something."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.zeros(()))
        vars(self.fc.bias)["slow"] = torch.zeros(1)
        inner = {p: torch.optim.Adam([p], lr=0.01) for p in self.fc.parameters()}
        for param in self.fc.parameters():
            param.register_post_accumulate_grad_hook(lambda p: inner[p].step())

    def set_optimizers(self):
        opt, steps = torch.optim.SGD(self.parameters(), lr=0.1), [0]

        def slow_down(opt, *_):
            steps[0] += 1
            opt.param_groups[0]["lr"] = 0.1 / steps[0]

        opt.register_step_post_hook(slow_down)
        return opt

    def forward(self, x):
        pred = self.fc(x)
        if self.training:
            vars(self.rows)["num"] = self.weigh()[0] + 1
            vars(self.fc.bias)["slow"].lerp_(self.fc.bias.detach(), 0.1)
        return pred * (1 + 0.01 * self.weigh()[1].sum()) + 0.01 * self.weigh()[0]

    def weigh(self) -> list[Any]:
        return [vars(self.rows).get("num", 0), vars(self.fc.bias)["slow"]]


class FromFiles(dict[Any, Any]):
    """Reads what it is asked for."""

    def __getitem__(self, key):
        raise OSError("there is no such file")


COUNTS = np.array({"calls": 0}, dtype=object)


class HoldsOddKeys(Line):
    """Items beside modules whose keys are no texts, or alike, or read files."""

    def __init__(self) -> None:
        super().__init__()
        COUNTS.item()["calls"] = 0
        self.read = FromFiles(module=nn.Identity(), calls=0)
        self.odd = {1: 0, "#0": nn.Identity(), (2, "a"): 0}
        twins = nn.Identity(), nn.Identity()
        self.twins = {twin: {"module": nn.Identity(), "num": 0} for twin in twins}
        self.named = {object(): {"module": nn.Identity(), "num": 0}}

    def forward(self, x):
        if self.training:
            COUNTS.item()["calls"] += 1
            self.read["calls"] = self.read.get("calls") + 1
            self.odd[1] += 1
            self.odd[2, "a"] += 2
            self.odd[len(self.odd)] = self.odd[f"#{len(self.odd)}"] = 1
            for n, own in enumerate((*self.twins.values(), *self.named.values())):
                own["num"] += n + 1
        return self.fc(x) * (1 + 0.01 * sum(self.weigh()))

    def weigh(self) -> list[Any]:
        values = [COUNTS.item()["calls"], self.read.get("calls")]
        values += [num for num in self.odd.values() if isinstance(num, int)]
        values += [key for key in self.odd if isinstance(key, int)]
        held = *self.twins.values(), *self.named.values()
        return [*values, *(own["num"] * n for n, own in enumerate(held, 1))]


class Recent(torch.optim.Optimizer):
    """Keeps the last norms of the gradients of each parameter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for param in self.param_groups[0]["params"]:
            norms = self.state[param].setdefault("norms", deque(maxlen=2))
            norms.append(param.grad.norm())
            param.sub_(param.grad * 0.1 / (1 + sum(norms)))


class HoldsReplay(Line):
    """Containers of all kinds, and an object that has some; one list becomes long."""

    def __init__(self) -> None:
        super().__init__()
        self.replay, self.others = Replay(), [Replay()]
        self.kinds: Counter[int] = Counter()
        self.latest = defaultdict(lambda: deque(maxlen=2))
        self.later: set[int] | None = None
        self.long: list[int] = []
        self.recent: list[OrderedDict[int, int]] = [OrderedDict({0: 0, -1: 0})]

    def forward(self, x):
        pred = self.fc(x)
        if self.training:
            self.recent[0].move_to_end(-(self.replay.count % 2))
            self.replay.add(pred.detach().mean())
            self.others[0].add(pred.detach().amax())
            self.later = {*(self.later or ()), self.replay.count}
            self.kinds[self.replay.count % 2] += 1
            self.latest[0].append(self.replay.count)
            self.long += [self.replay.count] * 600
        return pred * (1 + 0.01 * sum(self.weigh()))

    def weigh(self) -> list[Any]:
        values: list[Any] = [value * count for value, count in self.replay.seen]
        values += [self.others[0].sums.sum(), self.kinds[1], len(self.later or ())]
        values += [sum(self.latest[0]), next(iter(self.recent[0]))]
        return [*values, sum(self.long) / 1000]


class Average(harness.Callback):
    """An average of the weights."""

    def on_fit_begin(self) -> None:
        average = swa_utils.get_ema_multi_avg_fn(0.9)
        self.model = swa_utils.AveragedModel(self.ctx.model, multi_avg_fn=average)

    def on_train_batch_end(self) -> None:
        self.model.update_parameters(self.ctx.model)

    def tell(self) -> list[Any]:
        return list(self.model.state_dict().values())


class SavesAverage(Average):
    """The same; it saves the average by itself."""

    def state_dict(self):
        return {"average": self.model.state_dict()}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["average"])


class Schedules(harness.Callback):
    """A scheduler in a dict."""

    def on_fit_begin(self) -> None:
        self.held = {"one": ExponentialLR(self.ctx.optimizers["opt"], 0.9)}

    def on_train_batch_end(self) -> None:
        self.held["one"].step()

    def tell(self) -> list[Any]:
        return [str(self.held["one"].state_dict())]


class IsModule(harness.Callback, nn.Module):  # type: ignore[misc]
    """A callback that is a module."""

    count: torch.Tensor
    other: torch.Tensor

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("other", torch.zeros(()), persistent=False)

    def on_train_batch_end(self) -> None:
        self.count += 1
        self.other += 2

    def tell(self) -> list[Any]:
        return [self.count, self.other]


class ModuleFirst(nn.Module, harness.Callback):
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()), persistent=False)

    def on_train_batch_end(self) -> None:
        self.count += 1

    def tell(self) -> list[Any]:
        return [self.count]


class OwnOptimizer(Line):
    """Trains the loss too."""

    def set_optimizers(self):
        groups = [
            {"params": self.parameters()},
            {"params": self.ctx.loss_fn.parameters(), "lr": 0.1},
        ]
        return torch.optim.Adam(groups, lr=0.01)


class Wraps(torch.optim.Optimizer):
    """Steps by another optimizer with the same groups, every third time twice as far."""

    def __init__(self, params, lr=0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9})
        self.base = torch.optim.SGD(self.param_groups, lr=lr, momentum=0.9)
        self.param_groups, self.count = self.base.param_groups, 0
        self.views = [param.data for param in self.param_groups[0]["params"]]

    def step(self, closure=None):
        for view in getattr(self, "views", ()):  # of the weights themselves
            view.mul_(0.99)
        self.count += 1
        for _ in range(1 + (self.count % 3 == 0)):
            self.base.step()


class WrapsAlone(Wraps):
    """As many do, without what torch's own class has."""

    def __init__(self, params, lr=0.01) -> None:
        self.base = torch.optim.SGD(params, lr=lr, momentum=0.9)
        self.param_groups, self.defaults = self.base.param_groups, self.base.defaults
        self.state, self.count = defaultdict(dict), 0


class HoldsModules(Line):
    """A module without numbers, and a weight that is computed anew in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.others = [nn.Linear(1, 1, device="meta")]
        self.weight = self.fc.weight.data

    def forward(self, x):
        self.weight = self.fc.weight / self.fc.weight.norm()
        return self.fc(x) * self.weight.sum()


def with_wrapped_optimizer(optimizer: Any = Wraps) -> harness.Learner:
    mse = nn.MSELoss()
    learner = harness.setup(HoldsModules, loss=mse, optimizer=optimizer)
    return learner.set_opt_hparams(lr=0.02)


class Penalty(nn.Module):
    """A loss that reads a weight of the model."""

    weight: torch.Tensor

    def forward(self, pred, target):
        return nn.functional.mse_loss(pred, target) + self.weight.square().sum()


class Links(harness.Callback):
    """Holds a view that torch lets into no graph, once the weight was changed."""

    def on_fit_begin(self) -> None:
        weight = self.ctx.model.fc.weight
        self.ctx.loss_fn.weight, self.view = weight.detach(), weight.t()

    def tell(self) -> list[Any]:
        return []


def with_closure() -> harness.Learner:
    part = Balanced()
    return sgd(loss=lambda pred, target: part(pred, target))


def nothing(fitted: Any) -> list[Any]:
    return []


PROGRAMS: dict[str, tuple[Any, Any, Callable[[Any], list[Any]]]] = {
    "a loss": (lambda: sgd(loss=Balanced()), list, lambda f: f.loss.tell()),
    "a loss with a view of a weight": (
        lambda: sgd(loss=Penalty()),
        lambda: [Links()],
        nothing,
    ),
    "a loss in a partial": (
        lambda: sgd(loss=functools.partial(call_part, Balanced())),
        list,
        lambda f: f.loss.args[0].tell(),
    ),
    "a loss in an object": (
        lambda: sgd(loss=HoldsLoss()),
        list,
        lambda f: f.loss.part.tell(),
    ),
    "a loss in a closure": (with_closure, list, nothing),
    "a loss with an own optimizer": (
        lambda: harness.setup(OwnOptimizer, loss=Balanced()),
        list,
        lambda f: f.loss.tell(),
    ),
    "a scaler": (lambda: sgd(Scaled), list, lambda f: [f.model.scaler.get_scale()]),
    "an optimizer": (
        lambda: harness.setup(SecondOptimizer),
        list,
        lambda f: f.model.gains,
    ),
    "an optimizer that wraps one": (with_wrapped_optimizer, list, nothing),
    "an optimizer that wraps one alone": (
        lambda: with_wrapped_optimizer(WrapsAlone),
        list,
        nothing,
    ),
    "a metric": (lambda: sgd(HasMetric), list, lambda f: [f.model.mean.compute()]),
    "plain attributes": (
        lambda: sgd(PlainState),
        list,
        lambda f: [f.model.gain, f.model.carry, f.model.history],
    ),
    "objects and containers": (
        lambda: sgd(HoldsReplay),
        list,
        lambda f: f.model.weigh(),
    ),
    "an optimizer with a deque": (
        lambda: harness.setup(Line, loss=nn.functional.mse_loss, optimizer=Recent),
        list,
        nothing,
    ),
    "records": (lambda: sgd(HoldsRecords), list, lambda f: f.model.weigh()),
    "modules beside numbers": (
        lambda: sgd(HoldsMixed),
        list,
        lambda f: f.model.weigh(),
    ),
    "modules below odd keys": (
        lambda: sgd(HoldsOddKeys),
        list,
        lambda f: f.model.weigh(),
    ),
    "attributes and hooks of weights": (
        lambda: harness.setup(MarksWeights, loss=nn.functional.mse_loss),
        list,
        lambda f: f.model.weigh(),
    ),
    "an average on a callback": (sgd, lambda: [Average()], nothing),
    "an average that is saved": (sgd, lambda: [SavesAverage()], nothing),
    "a scheduler on a callback": (sgd, lambda: [Schedules()], nothing),
    "a callback and module": (sgd, lambda: [IsModule()], nothing),
    "a module and callback": (sgd, lambda: [ModuleFirst()], nothing),
}


def tell(fitted: Any, callbacks: list[Any], tell_fit: Callable[[Any], Any]) -> str:
    """All that a fit left, with all digits."""
    torch.set_printoptions(precision=17)
    found = [*fitted.model.state_dict().values(), *tell_fit(fitted)]
    for callback in callbacks:
        found += callback.tell()
    return repr([x.tolist() if isinstance(x, torch.Tensor) else x for x in found])


@pytest.mark.parametrize("name", PROGRAMS)
def test_resume_with_state_that_hangs_somewhere_equals_the_unbroken_fit(
    name: str, tmp_path: Path
) -> None:
    make, make_callbacks, tell_fit = PROGRAMS[name]
    callbacks = make_callbacks()
    whole = tell(fit(make(), callbacks), callbacks, tell_fit)
    for stop in (3, 4):
        fitted, resumed = fit_with_stop(
            make, stop, tmp_path / str(stop), make_callbacks
        )
        assert tell(fitted, resumed, tell_fit) == whole, f"stopped at {stop}"


def test_loss_resumes_in_the_middle_of_a_window_and_of_a_validation(tmp_path):
    class StopInValidation(harness.Callback):
        def on_valid_batch_end(self) -> None:
            if self.ctx.epoch == 2:
                signal.raise_signal(signal.SIGINT)

    class Counts(Balanced):
        def forward(self, pred, target):
            self.calls += 1  # in validation too
            return super().forward(pred, target)

    options: dict[str, Any] = {"accumulate": 2, "valid": True}
    make = lambda: sgd(loss=Counts())  # noqa: E731
    whole = fit(make(), **options)
    save = ModelCheckpoint(tmp_path, every_n_epochs=0)
    fit(make(), [save, StopInValidation()], **options)
    fitted = fit(make(), [ResumeFromCheckpoint(tmp_path)], **options)
    assert fitted.loss.tell() == whole.loss.tell()
    assert repr(fitted.records["metrics"]) == repr(whole.records["metrics"])


def test_fits_of_a_learner_share_no_loss():
    loss = Balanced()
    learner = sgd(loss=loss)
    one, two = fit(learner), fit(learner)
    assert one.loss.tell() == two.loss.tell()
    assert one.loss is not two.loss
    assert loss.tell() == [torch.ones(()), torch.ones(()), 0]
    assert one.loss.scale != 1
    assert not one.loss.training


def test_loss_is_trained_as_in_a_plain_loop():
    torch.manual_seed(1)
    model, loss = Line(), Balanced()
    params = [*model.parameters(), *loss.parameters()]
    opt = torch.optim.SGD(params, lr=0.05, momentum=0.9)
    for _ in range(2):
        opt.zero_grad()
        loss(model(X), Y).backward()
        opt.step()
    fitted = sgd(loss=Balanced()).fit(
        (X, Y),
        2,
        dataloader_options={"batch_size": len(X), "shuffle": False},
        seed=1,
        tracker=False,
    )
    assert torch.equal(fitted.model.fc.weight, model.fc.weight)
    assert fitted.loss.tell() == loss.tell()


def test_part_of_a_loss_in_evaluation_mode_stays_in_it():
    class Teaches(nn.Module):
        def __init__(self, teacher):
            super().__init__()
            self.teacher = teacher
            self.own = nn.Dropout(0.5)

        def forward(self, pred, target):
            assert self.own.training == self.training
            return (pred - self.teacher(target)).pow(2).mean()

    teacher = nn.BatchNorm1d(1).eval().requires_grad_(False)
    first = fit(sgd(loss=Teaches(teacher)), epochs=1, valid=True)
    again = first.fit((X, Y), 1, tracker=False)
    for fitted in (first, again):
        assert not fitted.loss.teacher.training
        assert torch.equal(fitted.loss.teacher.running_mean, torch.zeros(1))


def test_frozen_part_of_a_loss_is_not_given_to_an_engine():
    class Engine(SingleDevice):
        trains_loss = False

    class Frozen(nn.MSELoss):
        def __init__(self):
            super().__init__()
            self.teacher = Line().requires_grad_(False)

    seen = []

    class Look(harness.Callback):
        def on_fit_begin(self) -> None:
            seen.append(len(self.ctx.optimizers["opt"].param_groups[0]["params"]))

    for accelerator in (Engine("cpu"), SingleDevice("cpu")):
        options = {"callbacks": [Look()], "accelerator": accelerator, "tracker": False}
        sgd(loss=Frozen()).fit((X, Y), 1, **options)
    assert seen == [2, 4]


def test_evaluation_uses_the_trained_loss_and_leaves_it_as_it_is():
    fitted = fit(sgd(loss=Balanced()))
    before = repr(fitted.loss.tell())
    values = [fitted.evaluate((X, Y))["loss"] for _ in range(2)]
    with torch.no_grad():
        assert fitted.loss is not None
        expected = fitted.loss(fitted.model(X), Y).item()
    assert values[0] == values[1] == pytest.approx(expected, rel=1e-6)
    loss: Any = fitted.loss
    assert repr(loss.tell()) == before


def test_optimizer_of_the_users_own_loss_trains_the_copy():
    loss = Balanced()

    class OfBoth(Line):
        def set_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *loss.parameters()], lr=0.05)

    fitted = fit(harness.setup(OfBoth, loss=loss))
    assert fitted.loss.scale != 1
    assert loss.scale == 1


def test_parameters_of_a_loss_that_nobody_steps_are_told():
    class OfModel(Line):
        def set_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    with pytest.warns(UserWarning, match=r"OfModel.set_optimizers: .* \['scale'\]"):
        fit(harness.setup(OfModel, loss=Balanced()))


def test_loss_that_cannot_be_copied_is_refused():
    class Odd(Balanced):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copy")

    with pytest.raises(TypeError, match="a loss that can be copied for each fit"):
        fit(sgd(loss=Odd()))


class Unsaveable(harness.Callback):
    """Holds an object whose state no file can hold."""

    class Thing:
        def state_dict(self):
            return {"odd": object()}

        def load_state_dict(self, state):
            pass

    def on_fit_begin(self) -> None:
        self.thing = self.Thing()


class Counts(harness.Callback):
    """Counts without a state."""

    def __init__(self) -> None:
        self.count = 0

    def on_train_batch_end(self) -> None:
        self.count += 1


def report_of(learner, saved, resumed, tmp_path, capsys, **options):
    fit(learner, [*saved, ModelCheckpoint(tmp_path)], epochs=1)
    capsys.readouterr()
    resume = ResumeFromCheckpoint(tmp_path, **options)
    with warnings.catch_warnings():
        learner.fit(
            (torch.zeros(24, 4), torch.zeros(24, 1)),
            2,
            callbacks=[*resumed, resume],
            tracker=False,
            verbose=True,
        )
    return " ".join(capsys.readouterr().err.split())


def test_state_that_is_not_kept_is_named(tmp_path, capsys):
    saved, resumed = [Counts(), Unsaveable()], [Counts(), Unsaveable()]
    report = report_of(sgd(), saved, resumed, tmp_path, capsys)
    assert "Counts.count not kept return it in state_dict" in report
    assert "missing Unsaveable.thing Unsaveable.thing/state/odd: expected" in report


class Game:
    """Of the user's own; the system's random numbers have no state."""

    def __init__(self) -> None:
        self.score, self.random = 0, random.SystemRandom()


class Plays(Line):
    """Makes objects while it trains, and holds a large dict that never changes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = {f"word {n}": n for n in range(70_000)}
        self.games: list[Game] = []
        self.values = {"a": defaultdict(lambda: 1)}
        self.masked = np.ma.masked_all(3)

    def forward(self, x):
        if self.training:
            self.games.append(Game())
            self.masked[0] = len(self.games)
            self.games[0].score += self.values["a"][len(self.games)]
        return super().forward(x)


def test_state_of_objects_made_in_training_or_by_functions_is_named(tmp_path, capsys):
    report = report_of(sgd(Plays), [], [], tmp_path, capsys)
    assert "missing model.games[0] was saved, but this fit has none" in report
    assert "a defaultdict in it has your own function; use a dict" in report
    assert "cannot hold a value of type MaskedArray" in report
    state = read_rank(list_checkpoints(tmp_path)[0], 0)
    assert "words" not in state["fields"]["model"].get("", {})


def test_strict_refuses_a_state_that_was_not_kept_or_has_no_owner(tmp_path):
    fit(sgd(), [Unsaveable(), Average(), ModelCheckpoint(tmp_path)], epochs=1)
    strict = ResumeFromCheckpoint(tmp_path, strict=True)
    with pytest.raises(CheckpointError, match=r"strict: .*Unsaveable.thing"):
        fit(sgd(), [Unsaveable(), Average(), strict])
    with pytest.raises(CheckpointError, match=r"Average\.model was saved"):
        fit(sgd(), [Unsaveable(), strict])


def test_object_of_another_class_is_refused(tmp_path):
    class Other(harness.Callback):
        def on_fit_begin(self) -> None:
            self.model = nn.Linear(1, 1)

    Other.__name__ = "Average"
    fit(sgd(), [Average(), ModelCheckpoint(tmp_path)], epochs=1)
    with pytest.raises(CheckpointError, match=r"Average\.model of the class .*Linear"):
        fit(sgd(), [Other(), ResumeFromCheckpoint(tmp_path)])


def test_average_that_a_callback_saves_is_written_once(tmp_path):
    fit(sgd(), [SavesAverage(), ModelCheckpoint(tmp_path)], epochs=1)
    state = read_rank(list_checkpoints(tmp_path)[0], 0)
    assert "average" in state["callbacks"]["SavesAverage"]
    assert state["held"] == {}


class Expanded(Line):
    """Buffers and a plain attribute that are expanded, and a buffer that is a view."""

    wide: torch.Tensor
    plain: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("wide", torch.ones(1).expand(4))
        self.register_buffer("grown", torch.ones(2, 1).expand(2, 3))
        self.register_buffer("base", torch.zeros(6))
        self.register_buffer("part", self.get_buffer("base")[2:4])
        self.plain = torch.ones(1).expand(5)

    def forward(self, x):
        if self.training:
            self.get_buffer("base").add_(1)
            self.wide = (self.wide[:1] * 0.5).expand(4)
            self.grown = self.get_buffer("grown") + torch.arange(3.0)
            self.plain = (self.plain[:1] + 1).expand(5)
        return super().forward(x)


class Shares(harness.Callback):
    """Tensors of a callback that share memory."""

    def __init__(self) -> None:
        sums = torch.zeros(6)
        self.own = {"sums": sums, "part": sums[2:4], "wide": sums[:1].expand(3)}

    def on_train_batch_end(self) -> None:
        self.own["sums"] += 1

    def state_dict(self) -> dict[str, Any]:
        return self.own

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.own = state


def test_what_an_engine_sets_on_weights_is_not_saved_again():
    model = Line()
    for param in model.parameters():
        vars(param)["_zero_optimizer"] = torch.optim.SGD([torch.ones(1)])
        vars(param)["grad_accum"] = torch.ones(1)
    search = Search()
    search.add("model", model)
    assert [*search.objects["model"]] == [""]
    assert copy_attributes(search)["model"][".fc.bias"] == {}


def test_tensors_that_share_memory_are_resumed_saved_and_loaded(tmp_path):
    def fit_shared(epochs, *others):
        learner = harness.setup(Expanded, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
        shares = Shares()
        callbacks = [shares, harness.callbacks.SanityCheck(), *others]
        options: dict[str, Any] = {"tracker": False, "verbose": False, "seed": 1}
        data: Any = (X, Y)
        fitted = learner.fit(
            data, epochs, valid_data=data, callbacks=callbacks, **options
        )
        return fitted, shares.own

    whole, own = fit_shared(3)
    fit_shared(2, ModelCheckpoint(tmp_path))
    resumed, again = fit_shared(3, ResumeFromCheckpoint(tmp_path))
    resumed.save(tmp_path / "saved")
    loaded = harness.load(tmp_path / "saved", module=Expanded)
    for fitted in (resumed, loaded):
        for name, expected in whole.model.named_buffers():
            assert torch.equal(fitted.model.get_buffer(name), expected), name
        assert fitted.model.get_buffer("wide").stride() == (0,)
    assert torch.equal(resumed.model.plain, whole.model.plain)
    assert {name: t.tolist() for name, t in again.items()} == {
        name: t.tolist() for name, t in own.items()
    }
    assert again["wide"].stride() == (0,)
    again["sums"].fill_(7)
    assert {value for tensor in again.values() for value in tensor.tolist()} == {7.0}
