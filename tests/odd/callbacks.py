"""What happens at events: each as a callback of harness, and as a hook of the plain loop."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

import harness
from harness.callbacks import EarlyStopping, GradientClip, KeepBestModel, LRScheduler
from harness.events import FIT_EVENTS
from tests.odd.plain import Loop, SkipRest, StopFit

Hook = Callable[[Loop, str], None]

IN_BATCHES = tuple(event for event in FIT_EVENTS if "_batch_" in event)
BY_OPTIMIZER = tuple(e for e in IN_BATCHES if not e.endswith(("_begin", "_end")))


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Something that happens at an event.

    Attributes
    ----------
    kind
        Name in ``KINDS``.
    event
        Where.
    epoch, iter
        When; 0 is always.
    """

    kind: str
    event: str = "on_epoch_end"
    epoch: int = 0
    iter: int = 0

    def __repr__(self) -> str:
        when = f", epoch={self.epoch}, iter={self.iter}" if self.epoch else ""
        where = f", event={self.event!r}" if self.kind in ANYWHERE else ""
        return f"Extra(kind={self.kind!r}{where}{when})"

    def is_due(self, epoch: int | None, iter: int | None) -> bool:
        is_batch = self.event in IN_BATCHES
        return self.epoch in {0, epoch} and (not is_batch or self.iter in {0, iter})


class Act(harness.Callback):
    """Calls a function with the context at an event."""

    def __init__(self, extra: Extra, function: Callable[[Any], None]) -> None:
        self.extra, self.function = extra, function
        setattr(self, extra.event, self._act)

    def _act(self) -> None:
        if self.extra.is_due(self.ctx.epoch, self.ctx.iter):
            self.function(self.ctx)


# Each function below serves both: the context and the loop share some names.


def leave_epoch(at: Any) -> None:
    raise SkipRest if isinstance(at, Loop) else harness.SkipEpoch


def leave_fit(at: Any) -> None:
    raise StopFit if isinstance(at, Loop) else harness.EarlyStop


def draw(_: Any) -> None:
    torch.rand(2), random.random(), np.random.random()


def double_loss(at: Any) -> None:
    if isinstance(at, Loop):
        at.loss = 2 * at.loss
    else:
        at.loss_grad = 2 * at.loss_grad


def log_value(at: Any) -> None:
    value = 10.0 * at.epoch + (at.iter or 0)
    if isinstance(at, Loop):
        at.batch_values.append(("logged", value))
    else:
        at.log_metric("logged", value)


def log_note(at: Any) -> None:
    if not isinstance(at, Loop):
        at.log("notes", "train", f"{at.epoch} {at.iter} {at.step}")


def set_rows(at: Any) -> None:
    at.rows = at.iter * 2


def scale_input(at: Any) -> None:
    if isinstance(at, Loop):
        at.batch = [0.5 * at.batch[0], *at.batch[1:]]
    else:
        at.input = 0.5 * at.input


def scale_rate(at: Any) -> None:
    for optimizer in at.optimizers.values():
        for group in optimizer.param_groups:
            group["lr"] *= 0.7


def unfreeze(at: Any) -> None:
    at.model.requires_grad_(True)


def add_group(at: Any) -> None:
    optimizer, late = next(iter(at.optimizers.values())), at.model.late
    if len(optimizer.param_groups) == 1:
        late.requires_grad_(True)
        optimizer.add_param_group({"params": [*late.parameters()], "lr": 0.05})


def perturb(at: Any) -> None:
    with torch.no_grad():
        at.model.last.bias += 0.01


def act(function: Callable[[Any], None]) -> Callable[[Extra, list[str]], Any]:
    """Both forms of a function that is called at an event."""

    def make(extra: Extra, _: list[str]) -> tuple[harness.Callback, Hook]:
        def hook(loop: Loop, event: str) -> None:
            if event == extra.event and extra.is_due(loop.epoch, loop.iter):
                function(loop)

        return Act(extra, function), hook

    return make


def clip(extra: Extra, _: list[str]) -> tuple[harness.Callback, Hook]:
    def hook(loop: Loop, event: str) -> None:
        if event == "on_train_batch_before_step":
            torch.nn.utils.clip_grad_norm_(loop.params_of(loop.name), 0.1)

    return GradientClip(0.1, record=False), hook


def schedule(extra: Extra, names: list[str]) -> tuple[harness.Callback, Hook]:
    name, built = names[-1], []

    def hook(loop: Loop, event: str) -> None:
        if event == "on_fit_begin":
            built.append(lr_scheduler.ExponentialLR(loop.optimizers[name], 0.8))
        is_other = event in BY_OPTIMIZER and loop.name != name
        if event == extra.event and not is_other:
            built[0].step()

    callback = LRScheduler(
        lr_scheduler.ExponentialLR, gamma=0.8, call_on=extra.event, opt_name=name
    )
    return callback, hook


def wait_for_plateau(_: Extra, names: list[str]) -> tuple[harness.Callback, Hook]:
    name, built = names[0], []
    metric = "loss" if len(names) == 1 else f"loss/{name}"

    def hook(loop: Loop, event: str) -> None:
        if event == "on_fit_begin":
            plateau = lr_scheduler.ReduceLROnPlateau(
                loop.optimizers[name], patience=0, threshold=0.1
            )
            built.append(plateau)
        if event == "on_epoch_end":
            built[0].step(loop.logged["train", loop.epoch][metric])

    callback = LRScheduler(
        lr_scheduler.ReduceLROnPlateau,
        opt_name=name,
        monitor=f"train/{metric}",
        patience=0,
        threshold=0.1,
    )
    return callback, hook


def stop_early(_: Extra, names: list[str]) -> tuple[harness.Callback, Hook]:
    name = "loss" if len(names) == 1 else f"loss/{names[0]}"
    best = [math.inf]

    def hook(loop: Loop, event: str) -> None:
        if event == "on_epoch_end":
            value = loop.logged["train", loop.epoch][name]
            if not best[0] - value > 0.01:
                raise StopFit
            best[0] = value

    return EarlyStopping(f"train/{name}", min_delta=0.01), hook


def keep_best(_: Extra, names: list[str]) -> tuple[harness.Callback, Hook]:
    name = "loss" if len(names) == 1 else f"loss/{names[0]}"
    best: list[Any] = [math.inf, None]

    def hook(loop: Loop, event: str) -> None:
        if event == "on_epoch_end":
            value = -loop.logged["train", loop.epoch][name]
            if best[0] - value > 0:
                best[:] = value, copy.deepcopy(loop.model.state_dict())
        if event == "on_fit_end" and best[1] is not None:
            loop.model.load_state_dict(best[1])

    return KeepBestModel(f"train/{name}", mode="max"), hook


KINDS: dict[str, Callable[[Extra, list[str]], tuple[harness.Callback, Hook]]] = {
    "skip": act(leave_epoch),
    "stop": act(leave_fit),
    "draw": act(draw),
    "note": act(log_note),
    "rate": act(scale_rate),
    "perturb": act(perturb),
    "unfreeze": act(unfreeze),
    "add group": act(add_group),
    "double": act(double_loss),
    "log": act(log_value),
    "rows": act(set_rows),
    "input": act(scale_input),
    "clip": clip,
    "schedule": schedule,
    "plateau": wait_for_plateau,
    "early stopping": stop_early,
    "keep best": keep_best,
}
"""Kinds of extras by name: the callback, and the hook of the plain loop."""

EVENTS: dict[str, tuple[str, ...]] = {
    "skip": tuple(e for e in FIT_EVENTS if not e.startswith("on_fit")),
    "stop": tuple(e for e in FIT_EVENTS if e != "on_fit_end"),
    "draw": tuple(FIT_EVENTS),
    "note": tuple(e for e in FIT_EVENTS if not e.startswith("on_fit")),
    "rate": tuple(e for e in FIT_EVENTS if not e.startswith("on_fit")),
    "perturb": (
        "on_train_batch_begin",
        "on_train_batch_end",
        "on_valid_begin",
        "on_valid_batch_begin",
        "on_valid_batch_end",
        "on_epoch_end",
    ),
    "unfreeze": ("on_epoch_begin", "on_train_batch_begin", "on_epoch_end"),
    "add group": ("on_epoch_begin", "on_train_batch_begin", "on_train_batch_end"),
    "double": ("on_train_batch_before_backward", "on_train_batch_after_loss"),
    "log": IN_BATCHES,
    "rows": ("on_train_batch_begin", "on_valid_batch_begin"),
    "input": ("on_train_batch_begin", "on_valid_batch_begin"),
    "schedule": tuple(e for e in FIT_EVENTS if not e.startswith("on_fit")),
}
"""Events at which each kind makes sense; the others have their own."""

ANYWHERE = frozenset(EVENTS)
