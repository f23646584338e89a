"""Random programs on several ranks: the numbers of one process, and exact resumes.

``CASES`` is what a worker of ``tests.harness.accelerators.launches`` runs. Set ``ODD_SEED``
to draw other programs.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.harness.accelerators.cases import Lab
from tests.odd.batches import BATCHES
from tests.odd.callbacks import EVENTS, Extra
from tests.odd.compare import (
    SEED,
    Difference,
    Result,
    check_logged,
    check_refusal,
    differences,
    raise_error,
    run_harness,
    run_plain,
)
from tests.odd.data import DATA
from tests.odd.metrics import METRICS
from tests.odd.models import BAD_LOSSES, OUTPUTS
from tests.odd.plain import Loop
from tests.odd.programs import Program, is_whole

NUM_PROGRAMS = 10
TOLERANCE = {"rtol": 1e-3, "atol": 1e-4}
"""Ranks add gradients in another order, and optimizers divide by small numbers."""

BY_ROW = (
    "tensors",
    "arrays",
    "tensor data set",
    "data set",
    "loader",
    "fetches",
    "own generator",
    "weighted",
    "subset",
    "backwards",
    "by epoch",
    "lazy order",
    "stream",
    "stream as data",
)
"""Data whose rows can be dealt to ranks in the order of one process."""


@st.composite
def rank_programs(draw: Any) -> Program:
    """Draw a program in which only sums over rows matter."""

    def pick(*names: str) -> str:
        return draw(st.sampled_from(sorted(names)))  # alike on all ranks

    data = pick(*BY_ROW)
    batch = pick(*(DATA[data].batches or BATCHES))
    output = pick(*(set(OUTPUTS) - ({"tensor"} if is_whole(batch) else set())))
    step = pick("default", "returns", "optimizes", "by name")
    is_plain = BATCHES[batch].is_plain and output == "tensor"
    usable = [
        name
        for name, form in METRICS.items()
        if name not in {"int", "bool"} and (is_plain or not form.tensors_only)
    ]
    optimizers = ["sgd", "momentum", "adam", "groups", "only trained", "one by name"]
    if step in {"default", "by name"}:
        optimizers.append("two")
    optimizer = pick(*optimizers)
    epochs = draw(st.integers(1, 2))
    bodies = ["plain", "tied", "norm", "dropout"]
    bodies += [] if optimizer == "two" else ["frozen"]
    losses = ["function", "parts", "one element", "matrix", "method"]
    if draw(st.integers(0, 7)) == 0:
        losses = sorted(set(BAD_LOSSES) - {"none"})
    return Program(
        data=data,
        batch=batch,
        rows=draw(st.integers(6, 13)),  # at least one batch of both ranks
        size=draw(st.integers(1, 3)),
        shuffle=draw(st.booleans()),
        valid_rows=draw(st.sampled_from([0, 5, 3])),
        body=pick(*bodies),
        output=output,
        loss=pick(*losses),
        step=step,
        optimizer=optimizer,
        accumulate=draw(st.integers(1, 2)),
        epochs=epochs,
        metrics=tuple(draw(st.lists(st.sampled_from(usable), max_size=2, unique=True))),
        extras=tuple(draw(st.lists(draw_rank_extra(epochs), max_size=2))),
        stop_at=draw(st.sampled_from([0.0, 0.3, 0.6])),
    )


@st.composite
def draw_rank_extra(draw: Any, epochs: int) -> Extra:
    """Draw something that happens on all ranks alike."""
    kind = draw(st.sampled_from(["clip", "schedule", "rate", "note", "skip", "stop"]))
    if kind not in EVENTS:
        return Extra(kind=kind)
    events = [name for name in EVENTS[kind] if not name.endswith("after_pred")]
    return Extra(
        kind=kind,
        event=draw(st.sampled_from(events)),
        epoch=draw(st.integers(1, epochs)),
        iter=draw(st.integers(0, 2)),
    )


def draw_programs(count: int, number: int) -> list[Program]:
    """Draw programs, the same ones on every rank."""
    found: list[Program] = []

    @seed(number)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(rank_programs())
    def collect(program: Program) -> None:
        found.append(program)

    collect()
    return found


def check_on_ranks(program: Program, lab: Lab, number: int) -> None:
    """Hold a program against the plain loop on all rows, and against its resumed fit."""
    folder = lab.folder / str(number)

    def run(folder: Path | None = None, stop: int = 0, seed: int = SEED) -> Result:
        accelerator = lab.make(program.accumulate)
        return run_harness(program, folder, stop, seed, accelerator)

    whole = run()
    if program.is_refused:
        check_refusal(whole)
        return
    raise_error(whole)
    check_same_on_ranks(whole, lab)
    if program.body not in RANDOM_BY_RANK:
        loop = run_plain(replace(program, size=program.size * lab.world))
        if lab.rank == 0:
            check_near(whole, loop)
    if not whole.num_batches:
        return
    result = run(folder, 1 + int(program.stop_at * (whole.num_batches - 1)))
    raise_error(result)
    if result.signum is not None:
        result = run(folder, seed=1234)
        raise_error(result)
    # Engines count what they did since they were made, and keep empty places.
    whole.plan = result.plan = ""
    if found := list(differences(whole, result)):
        raise Difference(f"resumed, different: {found}")


RANDOM_BY_RANK = {"norm", "dropout"}
"""Bodies that do with the rows of one rank what one process does with all."""


def check_same_on_ranks(result: Result, lab: Lab) -> None:
    """Compare what the ranks logged, which each of them has."""
    every = lab.make().gather_objects(repr(result.records))
    if len(set(every)) > 1:
        raise Difference(f"ranks have different records: {every}")


def check_near(result: Result, loop: Loop) -> None:
    """Compare within the rounding of sums over ranks."""
    weights = loop.model.state_dict()
    for name, value in result.weights.items():
        if isinstance(value, Tensor):
            torch.testing.assert_close(value, weights[name], **TOLERANCE)
    check_logged(loop, result.logged, tolerance=1e-3)


def case_random_programs(lab: Lab) -> None:
    programs = draw_programs(NUM_PROGRAMS, int(os.environ.get("ODD_SEED", "0")))
    for number, program in enumerate(programs):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                check_on_ranks(program, lab, number)
        except BaseException as error:
            error.add_note(f"in {program!r} at stage {lab.stage}")
            raise


CASES = {"odd": case_random_programs}
