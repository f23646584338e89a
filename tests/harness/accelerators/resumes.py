"""Fits on several ranks that are broken off and go on bit for bit."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

import harness
from harness.callbacks import AutoResume
from harness.checkpoint.format import list_checkpoints
from tests.harness import exact
from tests.harness.accelerators.cases import Lab
from tests.harness.checkpoint.ranks.threads import counting_opens

BATCHES = 3  # of two ranks; the last one is short on both
NAMES = ["two-optimizers", "accumulation", "augmented", "weighted-sampler", "stream"]
BY_STEPS = ["sets", "two-optimizers", "stream"]
"""Cases that validate by steps too."""


class BrokenOff(Exception):
    """What ends a fit on all ranks alike."""


class BreakOff(harness.Callback):
    """Ends the fit after a number of batches."""

    weight = 1000

    def __init__(self, after: int) -> None:
        self.left = after

    def on_train_batch_end(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise BrokenOff


def fit(
    lab: Lab, case: exact.Case, folder: Path, after: int = 0, keep_last: int = 1
) -> dict[str, Any]:
    """Fit, or go on with what lies in the folder; gives all that it ended with."""
    torch.set_num_threads(1)
    look = exact.Look()
    accelerator = lab.make(case.accumulate, zero_allow_untested_optimizer=True)
    is_first = accelerator.broadcast(not (folder / "saved").exists())
    resume = AutoResume(folder / "saved", every_n_steps=1, keep_last=keep_last)
    callbacks = [*case.callbacks(folder), look, resume, BreakOff(after)]
    fitted = case.learner().fit(
        case.data(),
        case.epochs,
        case.valid,
        **case.pace,
        callbacks=callbacks,
        accelerator=accelerator,
        dataloader_options=case.options,
        seed=7 if is_first else 1234,
        tracker=False,
        verbose=False,
    )
    records = {what: v for what, v in fitted.records.items() if what != "profile"}
    # ZeRO 3 pads parts of weights with whatever lay in memory; the whole weights tell.
    parts = ("/own/weights/", "/master")
    tensors = {
        name: value
        for name, value in look.state["tensors"].items()
        if lab.stage != 3 or not any(part in name for part in parts)
    }
    return {
        **look.state,
        "tensors": tensors,
        "weights": fitted.model.state_dict(),
        "records": records,
        "batches": [],
        "csv": "",
    }


QUICK, SOME = (1, 3), (2, 3, 5)
"""ZeRO stages at which fits are broken off after some batches only; at others after each."""


def resumed(lab: Lab, case: exact.Case, name: str) -> None:
    """Break off after batches, go on, and compare with the unbroken fit."""
    whole = fit(lab, case, lab.folder / "whole")
    for after in SOME if lab.stage in QUICK else range(1, exact.EPOCHS * BATCHES + 1):
        folder = lab.folder / f"broken-{after}"
        try:
            fit(lab, case, folder, after)
        except BrokenOff:
            found = fit(lab, case, folder)
        else:
            raise AssertionError("it was not broken off")
        differ = exact.differences(whole, found)
        assert not differ, (name, after, differ)


def damaged(lab: Lab) -> None:
    """One part of the newest checkpoint is damaged: all go on from the one before."""
    case, folder = exact.CASES["augmented"], lab.folder / "damaged"
    with contextlib.suppress(BrokenOff):
        fit(lab, case, folder, after=3, keep_last=2)
    accelerator = lab.make()
    newest, _ = list_checkpoints(folder / "saved")
    if lab.rank == 0:
        part = newest / "rank-1.safetensors"
        part.write_bytes(part.read_bytes()[:-1] + b"?")
    accelerator.barrier()
    with warnings.catch_warnings(record=True) as caught, counting_opens() as opened:
        warnings.simplefilter("always")
        found = fit(lab, case, folder)
    told = [str(one.message) for one in caught if "skipped" in str(one.message)]
    assert len(told) == (lab.rank == 0), told
    assert all("SHA-256 of rank-1.safetensors" in text for text in told)
    # Each rank compared its own part of both, and restored that of the older one.
    kinds = (".json", ".safetensors")
    of_parts = {n for n in opened if n.startswith("rank-") and n.endswith(kinds)}
    assert of_parts == {f"rank-{lab.rank}{kind}" for kind in kinds}, of_parts
    differ = exact.differences(fit(lab, case, lab.folder / "unbroken"), found)
    assert not differ, differ


CASES: dict[str, Callable[[Lab], None]] = {  # type: ignore[assignment]
    name: partial(resumed, case=exact.CASES[name], name=name) for name in NAMES
} | {
    f"{name}-by-steps": partial(resumed, case=exact.BY_STEPS[name], name=name)
    for name in BY_STEPS
}
CASES["damaged"] = damaged
_own = replace(exact.CASES["own-position"], accumulate=2)
CASES["own-position"] = partial(resumed, case=_own, name="own-position")
CASES["own-optimizer"] = partial(
    resumed, case=exact.CASES["own-optimizer"], name="own-optimizer"
)
"""Every case, by name."""
