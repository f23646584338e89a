"""Runs a program with harness and by the plain loop, and compares."""

from __future__ import annotations

import math
import random
import re
import signal
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Subset

import harness
import tracking
from harness.accelerators.base import Accelerator
from harness.accelerators.single import SingleDevice
from harness.callbacks import AutoResume
from harness.pytree import flatten, named_leaves
from harness.rng import get_rng_state
from tests.odd import data, models, optimizers
from tests.odd.batches import BATCHES, scores_of
from tests.odd.callbacks import KINDS
from tests.odd.data import DATA, Source
from tests.odd.metrics import BAD_METRICS, METRICS
from tests.odd.models import BAD_LOSSES, LOSSES
from tests.odd.plain import Loop
from tests.odd.programs import Program

HARNESS = Path(harness.__file__).parent
PROGRAMS = Path(__file__).parent
SEED = 7


class Difference(AssertionError):
    """Harness did something else than it should."""


# ----------------------------------------------------------------- the plain loop


def make_source(program: Program) -> Source:
    """Data of a new fit."""
    form, batch = DATA[program.data], BATCHES[program.batch]
    rows = data.make_rows(program.rows)
    return form.make(rows, program.size, batch.collate, program.shuffle)


def make_valid(program: Program, source: Source) -> tuple[Any, Any]:
    """Validation data for harness and for the plain loop."""
    if not program.valid_rows:
        return None, None
    if source.options is None:
        return tuple(make_loader(program, program.valid_rows) for _ in "12")  # type: ignore[return-value]
    rows = data.make_rows(program.valid_rows, seed=1)
    collate = BATCHES[program.batch].collate
    own: Any = data.Rows(rows) if "collate_fn" in source.options else None
    if isinstance(source.data, dict):
        own = data.columns(rows)
    loader = DataLoader(data.Rows(rows), program.size, collate_fn=collate)
    return own or data.tensors(rows), loader


def split_rows(program: Program, source: Source) -> tuple[Any, Any]:
    """Loaders of the parts that a fraction gives, drawn as the documentation says."""
    dataset, given = source.loader.dataset, source.options or {}
    order = torch.randperm(program.rows).tolist()
    count = int(program.rows * program.valid_share)
    parts = [Subset(dataset, sorted(part)) for part in (order[count:], order[:count])]
    usual = {"shuffle": True, "drop_last": len(parts[0]) >= program.size}
    collate = {k: v for k, v in given.items() if k == "collate_fn"}
    return (
        DataLoader(parts[0], **{**usual, **given}),
        DataLoader(parts[1], program.size, **collate),
    )


def make_methods(program: Program) -> dict[str, Any]:
    """Methods that the model defines itself."""
    methods: dict[str, Any] = {}
    if program.loss == "method":
        methods["loss"] = lambda self, pred, target: LOSSES["method"]()(pred, target)
    if program.optimizer in optimizers.METHODS:
        methods["set_optimizers"] = optimizers.METHODS[program.optimizer]
    if program.predicts:
        form = BATCHES[program.batch]
        methods["predict"] = lambda self, _: -scores_of(form.call(self, self.ctx.batch))
    return methods


def make_model(program: Program) -> nn.Module:
    """A new model."""
    form = BATCHES[program.batch]
    methods = make_methods(program)
    model = models.build(program.body, form, program.output, program.step, methods)
    if program.loss == "submodule":
        model.loss = LOSSES["submodule"]()
    return model


def seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def make_extras(program: Program) -> list[tuple[harness.Callback, Any]]:
    """Callbacks and hooks, in running order."""
    names = ["rest", "last"] if program.optimizer == "two" else ["opt"]
    names = ["main"] if program.optimizer == "one by name" else names
    pairs = [KINDS[extra.kind](extra, names) for extra in program.extras]
    return sorted(pairs, key=lambda pair: pair[0].weight)


def run_plain(program: Program) -> Loop:
    """Train by the plain loop."""
    seed_all(SEED)
    source, form = make_source(program), BATCHES[program.batch]
    _, valid = make_valid(program, source)
    loader = source.loader
    if program.valid_share:
        loader, valid = split_rows(program, source)
    model = make_model(program)
    loss = model.loss if program.loss == "submodule" else LOSSES[program.loss]()
    loop = Loop(
        model=model,
        optimizers=optimizers.build(program.optimizer, model),
        loader=loader,
        valid=valid,
        epochs=program.epochs,
        accumulate=program.accumulate,
        has_true_length=DATA[program.data].has_true_length,
        call=form.call,
        target_of=form.target_of,
        count_rows=partial(count_rows, program),
        loss_of=loss,
        metrics={name: METRICS[name].plain for name in program.metrics},
        set_epoch=source.set_epoch,
        hooks=[hook for _, hook in make_extras(program)],
        skips=models.is_left_out if program.step == "skips" else lambda batch: False,
    )
    return loop.fit()


def count_rows(program: Program, batch: Any) -> int:
    """Rows of a batch, known from how it was made."""
    form = BATCHES[program.batch]
    target = form.target_of(batch)
    for value in (target, batch):
        if isinstance(value, dict) or hasattr(value, "keys"):
            value = value["y"] if "y" in value else value["labels"]
        if isinstance(value, tuple | list) and isinstance(value[0], Tensor):
            value = value[0] if value[0].dim() else value
        if hasattr(value, "y"):
            value = value.y
        if value is not None:
            return len(value)
    raise AssertionError(batch)


# ------------------------------------------------------------------- with harness


class Stop(harness.Callback):
    """Counts batches of both splits, and stops the fit after one, as Ctrl-C would."""

    def __init__(self, after: int = 0) -> None:
        self.after, self.count = after, 0

    def on_train_batch_end(self) -> None:
        self.count += 1
        if self.count == self.after:
            signal.raise_signal(signal.SIGINT)

    on_valid_batch_end = on_train_batch_end


class Look(harness.Callback):
    """Keeps the complete state at the end of a fit."""

    weight = 30  # before KeepBestModel puts other weights in

    def __init__(self) -> None:
        self.plan, self.tensors = "", dict[str, Tensor]()

    def on_fit_end(self) -> None:
        assert self.ctx.accelerator is not None
        if any(map(is_lazy, self.ctx.model.parameters())):
            return  # nothing was trained
        state = [self.ctx.accelerator.state_dict(), get_rng_state()]
        plan, tensors = flatten(state)
        self.plan = repr(plan)
        self.tensors = {name: value.clone() for name, value in tensors.items()}


@dataclass(kw_only=True)
class Result:
    """What a fit came to."""

    weights: dict[str, Any] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    plan: str = ""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    num_batches: int = 0
    signum: int | None = None
    error: Exception | None = None
    fitted: harness.Fitted | None = None

    @property
    def logged(self) -> dict[tuple[str, int], dict[str, Any]]:
        """Metrics by split and epoch, with nested names joined."""
        return {
            (split, epoch): dict(named_leaves(values))
            for split, series in self.records.get("metrics", {}).items()
            for epoch, values in enumerate(series, start=1)
            if values
        }


def make_learner(program: Program) -> harness.Learner:
    """The learner of a program."""
    owns_loss = program.loss in {"method", "submodule"}
    loss = None if owns_loss else {**LOSSES, **BAD_LOSSES}[program.loss]()
    makers = {name: form.make for name, form in METRICS.items()} | BAD_METRICS
    metrics = {name: makers[name]() for name in program.metrics}
    kind, options = optimizers.CLASSES.get(program.optimizer, (None, {}))
    module = partial(make_model, program)
    learner = harness.setup(module, loss=loss, optimizer=kind, metrics=metrics)
    return learner.set_opt_hparams(**options)


def run_harness(
    program: Program,
    folder: Path | None = None,
    stop: int = 0,
    seed: int = SEED,
    accelerator: Accelerator | None = None,
    runs: Path | None = None,
) -> Result:
    """Train with harness; what it raises is in the result."""
    counter, look = Stop(stop), Look()
    callbacks = [callback for callback, _ in make_extras(program)]
    saves = [AutoResume(folder)] if folder else []
    result = Result()
    try:
        source = make_source(program)
        valid, _ = make_valid(program, source)
        tracker = {"runs_dir": runs, "delivery": False}
        fitted = make_learner(program).fit(
            source.data,
            program.epochs,
            program.valid_share or valid,
            callbacks=[*callbacks, look, *saves, counter],
            accelerator=accelerator
            or SingleDevice("cpu", accumulate=program.accumulate),
            dataloader_options=source.options,
            seed=seed,
            tracker=tracker if program.is_tracked and runs else False,
            verbose=False,
        )
    except Exception as error:  # noqa: BLE001  judged by the caller
        result.error = error
    else:
        result.fitted, result.weights = fitted, fitted.model.state_dict()
        records = {k: v for k, v in fitted.records.items() if k != "profile"}
        result.records, result.signum = records, fitted.signum
        if fitted.run_path is not None:
            result.rows = read_journal(fitted.run_path, result.logged)
    result.num_batches = counter.count
    result.plan, result.tensors = look.plan, look.tensors
    return result


MEASURED = {"profile", "params", "tags", "inputs", "artifacts"}
"""What a resumed fit records otherwise, or not again."""


def read_journal(
    path: Path, logged: dict[tuple[str, int], dict[str, Any]]
) -> list[str]:
    """Read what a run recorded; its metrics have to be those in memory.

    Raises
    ------
    Difference
        If they are not.
    """
    table = tracking.open(path).records()
    names = ("what", "set", "name", "index", "epoch", "step", "value", "payload")
    rows = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for what, split, name, index, *_, value, _ in rows:
        if what == "metrics":
            found.setdefault((split, index), {})[name] = value
    wanted = {
        place: {name: float(value) for name, value in values.items()}
        for place, values in logged.items()
    }
    if repr(sort_items(found)) != repr(sort_items(wanted)):
        raise Difference(f"expected {wanted} in the journal, got {found}")
    return sorted(repr(row) for row in rows if row[0] not in MEASURED)


def sort_items(values: dict[Any, dict[str, Any]]) -> list[Any]:
    return sorted((place, sorted(own.items())) for place, own in values.items())


# ---------------------------------------------------------------------- comparing


def check_program(program: Program, folder: Path) -> None:
    """Hold the program against the plain loop, and against its own resumed fit.

    Raises
    ------
    Difference
        If anything differs.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = run_harness(program, runs=folder.with_name("whole"))
        if program.is_refused and whole.error is not None:
            check_refusal(whole)
            return
        if program.loss in BAD_LOSSES or set(program.metrics) & BAD_METRICS.keys():
            check_refusal(whole)
        raise_error(whole)
        if program.has_plain_twin:
            loop = run_plain(program)
            check_equal_to_plain(whole, loop)
            check_inference(program, whole, loop)
        if whole.num_batches:
            stop = 1 + int(program.stop_at * (whole.num_batches - 1))
            check_resumed(program, folder, stop, whole)


def raise_error(result: Result) -> None:
    if result.error is not None:
        raise Difference("the fit raised") from result.error


def check_refusal(result: Result, num_batches: int = 0) -> None:
    """Check that it was refused in time, by a message of harness."""
    error = result.error
    if error is None:
        if result.num_batches == 0:
            return
        raise Difference("expected a refusal, got a finished fit")
    if result.num_batches > num_batches:
        raise Difference(f"refused after {result.num_batches} batches") from error
    last = traceback.extract_tb(error.__traceback__)[-1]
    # An error that is explained ends in the line of the program that led to it.
    is_ours = any(
        Path(last.filename).is_relative_to(own) for own in (HARNESS, PROGRAMS)
    )
    if not is_ours or not re.search(r": expected .+ got ", str(error)):
        raise Difference("expected a message of harness") from error


def check_equal_to_plain(result: Result, loop: Loop) -> None:
    """Compare weights by bits, and means within rounding of float64."""
    own = loop.model.state_dict()
    names = [
        n for n in own | result.weights if not same(own.get(n), result.weights.get(n))
    ]
    if names:
        raise Difference(f"weights differ from the plain loop: {names}")
    check_logged(loop, result.logged)


def check_logged(
    loop: Loop, have: dict[tuple[str, int], dict[str, Any]], tolerance: float = 1e-6
) -> None:
    """Compare logged means with those of the plain loop."""
    want = {
        place: {rename(name): value for name, value in values.items()}
        for place, values in loop.logged.items()
        if values
    }
    for place in want | have:
        one, two = want.get(place, {}), have.get(place, {})
        if one.keys() != two.keys() or not all(
            near(one[n], two[n], tolerance) for n in one
        ):
            raise Difference(f"{place}: expected {one}, got {two}")


def check_inference(program: Program, result: Result, loop: Loop) -> None:
    """Compare predictions by bits, and the means of an evaluation."""
    assert result.fitted is not None
    learner, fitted = make_learner(program), result.fitted
    loader, plain = (make_loader(program, 5) for _ in range(2))
    loop.hooks, loop.logged, loop.epoch = [], {}, 1
    with torch.no_grad():
        loop.run_split("valid", ((1, batch) for batch in plain))
        scores = [scores_of(loop.call(loop.model, batch)).clone() for batch in plain]
    found = learner.evaluate(fitted, loader, accelerator=SingleDevice("cpu"))
    check_logged(loop, Result(records=found.records).logged)
    preds = learner.predict(fitted, loader, accelerator=SingleDevice("cpu"))
    many = preds if isinstance(preds, list) else [preds]
    wanted = -torch.cat(scores) if program.predicts else torch.cat(scores)
    if not same(wanted, torch.cat([scores_of(pred) for pred in many])):
        raise Difference(f"expected the predictions {scores}, got {preds}")


def make_loader(program: Program, rows: int) -> Any:
    """Rows of validation data in batches of two."""
    collate = BATCHES[program.batch].collate
    return DataLoader(data.Rows(data.make_rows(rows, seed=1)), 2, collate_fn=collate)  # type: ignore[arg-type]


def rename(name: str) -> str:
    form = METRICS.get(name)
    return form.logged if form is not None and form.logged else name


def near(one: float, two: float, tolerance: float) -> bool:
    both_nan = math.isnan(one) and math.isnan(two)
    return both_nan or math.isclose(one, two, rel_tol=tolerance, abs_tol=1e-12)


def check_resumed(program: Program, folder: Path, stop: int, whole: Result) -> None:
    """Stop after a batch, resume, and compare every bit with the unbroken fit."""
    runs = folder.with_name("runs")
    resumed = run_harness(program, folder, stop, runs=runs)
    if program.saves_batches and resumed.error is not None:
        check_refusal(resumed, num_batches=1)
        return
    raise_error(resumed)
    if resumed.signum is not None:
        resumed = run_harness(program, folder, seed=1234, runs=runs)
        raise_error(resumed)
    elif not program.may_finish:
        raise Difference(f"expected the fit to stop after {stop} batches")
    found = list(differences(whole, resumed))
    if found:
        where = f"{stop} of {whole.num_batches} batches"
        raise Difference(f"resumed after {where}, different: {found}")


def differences(one: Result, two: Result) -> Iterator[str]:
    """Names of what differs."""
    if repr(one.records) != repr(two.records):
        yield f"records {one.records} {two.records}"
    if one.rows != two.rows:
        pairs = zip(one.rows, two.rows, strict=False)
        yield f"journal: {next((p for p in pairs if p[0] != p[1]), 'length')}"
    if one.plan != two.plan:
        pairs = enumerate(zip(one.plan, two.plan, strict=False))  # type: ignore[assignment]
        place = next((n for n, (a, b) in pairs if a != b), 0)  # type: ignore[str-unpack]
        around = slice(max(place - 99, 0), place + 60)
        yield f"state: {one.plan[around]} / {two.plan[around]}"
    for kind in ("weights", "tensors"):
        before, after = getattr(one, kind), getattr(two, kind)
        for name in chain(before, after.keys() - before.keys()):
            if not same(before.get(name), after.get(name)):
                yield f"{kind}/{name}"


def same(one: Any, two: Any) -> bool:
    """Whether values are equal bit for bit."""
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return repr(one) == repr(two)
    if one.dtype != two.dtype or one.shape != two.shape:
        return False
    return one.contiguous().numpy().tobytes() == two.contiguous().numpy().tobytes()
