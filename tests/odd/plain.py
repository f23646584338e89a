"""The loop that a careful person writes by hand, from torch alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn


class SkipRest(Exception):
    """Ends the epoch."""


class StopFit(Exception):
    """Ends the fit."""


@dataclass(kw_only=True)
class Loop:
    """What is trained, and where the loop is."""

    model: nn.Module
    optimizers: dict[str, torch.optim.Optimizer]
    loader: Any
    valid: Any  #: validation batches, or None
    epochs: int
    accumulate: int = 1
    has_true_length: bool  #: whether ``len(loader)`` can be relied on
    call: Callable[
        [nn.Module, Any], Any
    ]  #: ``call(model, batch)`` gives the prediction
    target_of: Callable[[Any], Any]
    count_rows: Callable[[Any], int]
    loss_of: Callable[[Any, Any], Any]  #: a tensor, or a dict of parts
    metrics: dict[str, Callable[[Any, Any], Any]]
    set_epoch: Callable[[int], None]
    hooks: list[Callable[[Loop, str], None]]
    skips: Callable[[Any], bool]  #: whether the step leaves a batch out

    epoch: int = 0
    iter: int = 0
    training: bool = True
    name: str = ""  #: of the current optimizer
    batch: Any = None
    pred: Any = None
    loss: Any = None  #: with its graph
    rows: int = 0
    batch_values: list[tuple[str, Any]] = field(default_factory=list)
    values: list[tuple[str, float, int]] = field(default_factory=list)
    logged: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def fit(self) -> Loop:
        """Train and validate."""
        try:
            self.at("on_fit_begin")
            for self.epoch in range(1, self.epochs + 1):
                try:
                    self.run_epoch()
                except SkipRest:
                    self.drop_gradients()
        except StopFit:
            self.drop_gradients()
        self.at("on_fit_end")
        return self

    def run_epoch(self) -> None:
        self.at("on_epoch_begin")
        self.set_epoch(self.epoch - 1)
        self.run_split("train", self.windows())
        if self.valid is not None:
            with torch.no_grad():
                self.run_split("valid", self.valid_batches())
        self.at("on_epoch_end")

    def run_split(self, split: str, batches: Iterable[tuple[int, Any]]) -> None:
        """Run all batches of one split, and log the means over its rows."""
        self.training, self.values = split == "train", []
        self.model.train(self.training)
        self.num_backwards = dict.fromkeys(self.optimizers, 0)
        self.at(f"on_{split}_begin")
        for self.iter, (window, self.batch) in enumerate(batches, start=1):
            self.rows, self.batch_values = self.count_rows(self.batch), []
            self.at(f"on_{split}_batch_begin")
            if not self.skips(self.batch):
                for self.name in self.optimizers:
                    self.step(split, window)
                for name, metric in self.metrics.items():
                    value = metric(self.pred, self.target_of(self.batch))
                    self.batch_values.append((name, value))
            self.at(f"on_{split}_batch_end")
            self.values += [(n, float(v), self.rows) for n, v in self.batch_values]
        self.drop_gradients()
        self.logged[split, self.epoch] = self.means()
        self.at(f"on_{split}_end")

    def step(self, split: str, window: int) -> None:
        """Forward, backward and step of one optimizer."""
        if self.training and isinstance(self.optimizers[self.name], torch.optim.LBFGS):
            self.step_by_closure()
            return
        with self.freezing_others():
            self.evaluate(split, window)
        if not self.training:
            return
        self.num_backwards[self.name] += 1
        if self.num_backwards[self.name] == window:
            self.at("on_train_batch_before_step")
            self.optimizers[self.name].step()
            self.optimizers[self.name].zero_grad()
            self.num_backwards[self.name] = 0
            self.at("on_train_batch_after_step")

    def evaluate(self, split: str, window: int = 1) -> None:
        """Compute the loss and, in training, its gradients."""
        self.pred = self.call(self.model, self.batch)
        self.at(f"on_{split}_batch_after_pred")
        self.note_loss(self.loss_of(self.pred, self.target_of(self.batch)))
        self.at(f"on_{split}_batch_after_loss")
        if self.training:
            self.at("on_train_batch_before_backward")
            (self.loss / window if window > 1 else self.loss).backward()

    def step_by_closure(self) -> None:
        """Step an optimizer that evaluates the loss several times; the first one counts."""
        optimizer, values = self.optimizers[self.name], self.batch_values
        first: list[Any] = []

        def closure() -> Tensor:
            optimizer.zero_grad()
            self.batch_values = [] if first else values
            self.evaluate("train")
            if not first:
                first.append(self.pred)
            self.at("on_train_batch_before_step")
            return self.loss

        try:
            optimizer.step(closure)
        finally:
            self.batch_values = values
            self.pred = first[0] if first else self.pred
        optimizer.zero_grad()
        self.at("on_train_batch_after_step")

    def note_loss(self, loss: Any) -> None:
        """Note the loss and its parts."""
        suffix = f"/{self.name}" if len(self.optimizers) > 1 else ""
        if isinstance(loss, dict):
            self.batch_values += [(f"{name}{suffix}", v) for name, v in loss.items()]
            first, *rest = loss.values()
            loss = sum(rest, first)
        self.loss = loss.reshape(())
        self.batch_values.append((f"loss{suffix}", self.loss.detach().clone()))

    def valid_batches(self) -> Iterator[tuple[int, Any]]:
        """Validation batches; nothing is drawn before the first one is asked for."""
        for batch in self.valid:
            yield 1, batch

    def windows(self) -> Iterator[tuple[int, Any]]:
        """Batches, each with the number of batches in its optimizer step."""
        batches, size = iter(self.loader), self.accumulate
        if size == 1:
            yield from ((1, batch) for batch in batches)
        elif self.has_true_length:
            total = len(self.loader)
            for done, batch in enumerate(batches):
                yield min(size, total - done // size * size), batch
        else:
            while window := [copy.deepcopy(batch) for batch in islice(batches, size)]:
                yield from ((len(window), batch) for batch in window)

    @contextmanager
    def freezing_others(self) -> Iterator[None]:
        """Freeze the trained parameters that only other optimizers own."""
        own = {id(param) for param in self.params_of(self.name)}
        every = [p for name in self.optimizers for p in self.params_of(name)]
        others = [p for p in every if id(p) not in own and p.requires_grad]
        for param in others if self.training else ():
            param.requires_grad_(False)
        try:
            yield
        finally:
            for param in others:
                param.requires_grad_(True)

    def params_of(self, name: str) -> list[Tensor]:
        groups = self.optimizers[name].param_groups
        return [param for group in groups for param in group["params"]]

    def drop_gradients(self) -> None:
        for optimizer in self.optimizers.values():
            optimizer.zero_grad()

    def means(self) -> dict[str, float]:
        """Exact mean over rows of each value."""
        found: dict[str, float] = {}
        for name in dict.fromkeys(name for name, *_ in self.values):
            pairs = [(value, rows) for key, value, rows in self.values if key == name]
            total, rows = math.fsum(v * r for v, r in pairs), sum(r for _, r in pairs)
            found[name] = total / rows if rows else math.nan
        return found

    def at(self, event: str) -> None:
        """Tell every hook where the loop is; a wish to leave waits for the last one."""
        wish: Exception | None = None
        for hook in self.hooks:
            try:
                hook(self, event)
            except (StopFit, SkipRest) as signal:
                wish = signal if wish is None or isinstance(signal, StopFit) else wish
        if wish is not None:
            raise wish
