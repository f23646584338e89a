"""The best weights of a fit: kept in parts, converted by a resume, given back as the result."""

from __future__ import annotations

import contextlib
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import Tensor, nn

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import (
    EMA,
    KeepBestModel,
    ModelCheckpoint,
    ResumeFromCheckpoint,
    StochasticWeightAveraging,
)
from harness.checkpoint.ranks.merge import MergedWeights
from harness.cli.main import main
from harness.pytree import iter_tensors
from tests.harness.accelerators.cases import Lab
from tests.harness.accelerators.whole import CASES as OTHERS
from tests.harness.exact import Stop, same_bits
from tests.harness.reshard.cases import BrokenOff, Net, X, Y

EPOCHS, BATCHES = 3, 6
ROWS = 8
BF16 = {"bf16": {"enabled": True}}


class Look(harness.Callback):
    """Notes the whole weights of the first epoch, which is the best; may break off."""

    weight = math.inf  # behind the save

    def __init__(self, after: int = 0) -> None:
        self.left, self.best = after, dict[str, Tensor]()

    def on_train_batch_end(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise BrokenOff

    def on_epoch_end(self) -> None:
        if self.ctx.epoch == 1:
            assert self.ctx.accelerator is not None
            state = self.ctx.accelerator.full_state_dict(self.ctx.model)
            self.best = {name: value.clone() for name, value in state.items()}


def fit(
    folder: Path, accelerator: Any, *callbacks: harness.Callback, **options: Any
) -> harness.Fitted:
    """A fit of two named optimizers, with frozen parameters and a buffer."""
    torch.set_num_threads(1)
    given: dict[str, Any] = {
        "seed": 7,
        "tracker": False,
        "verbose": False,
        "accelerator": accelerator,
        "dataloader_options": {"batch_size": ROWS // accelerator.world_size},
    }
    saves = ModelCheckpoint(folder, every_n_steps=1)
    return harness.setup(Net, loss=nn.CrossEntropyLoss()).fit(
        (X, Y), EPOCHS, (X, Y), callbacks=[saves, *callbacks], **(given | options)
    )


def best() -> KeepBestModel:
    """Keeps the weights of the first epoch."""
    return KeepBestModel("train/loss/head", mode="max")


def break_off(folder: Path, accelerator: Any) -> dict[str, Tensor]:
    """Break a fit off in its second epoch; gives the weights of the first."""
    look = Look(after=BATCHES + 3)
    with contextlib.suppress(BrokenOff):
        fit(folder, accelerator, best(), look)
    return look.best


def check_best(found: harness.Fitted, wanted: dict[str, Tensor], rank: int) -> None:
    """The result has the best weights, bit for bit, also if they are in a checkpoint."""
    assert found.best_epoch == 1
    if found.checkpoint is not None:
        merged = MergedWeights(found.checkpoint)
        assert [n for n in wanted if not same_bits(merged[n], wanted[n])] == []
    if rank == 0:
        state = found.gather(accelerator=SingleDevice("cpu")).state_dict()
        assert [n for n in wanted if not same_bits(state[n], wanted[n])] == []


def resume(lab: Lab, saved: Path, accelerator: Any, wanted: dict[str, Tensor]) -> None:
    """Resume from a copy of checkpoints, and end with the best weights of the fit before."""
    accelerator.barrier()
    folder = lab.folder / f"to-{accelerator.world_size}-{lab.rank}"
    found = fit(folder, accelerator, best(), ResumeFromCheckpoint(saved), gather=False)
    check_best(found, wanted, accelerator.rank)
    accelerator.barrier()


def case_best_weights_are_the_result_of_a_resume_on_other_ranks(lab: Lab) -> None:
    for number, config in enumerate(({}, BF16) if lab.stage is not None else ({},)):
        saved = lab.folder / f"saved-{number}"
        wanted = break_off(saved, lab.make(**config))
        resume(lab, saved, lab.make(**config), wanted)
        if lab.stage is None:
            return
        other = replace(lab, stage=(lab.stage + 1) % 4)
        resume(lab, saved, other.make(**config), wanted)
        wanted = lab.make().broadcast(wanted)
        resume(lab, saved, SingleDevice("cpu"), wanted)
    one = lab.folder / f"one-{lab.rank}"
    wanted = break_off(one, SingleDevice("cpu"))
    lab.make().barrier()
    resume(lab, lab.folder / "one-0", lab.make(), wanted)


class Parts(harness.Callback):
    """Notes the bytes of the best weights on each rank."""

    weight = math.inf
    num_bytes = 0

    def on_epoch_end(self) -> None:
        keep = next(c for c in self.ctx.callbacks if isinstance(c, KeepBestModel))
        tensors = iter_tensors(keep.state_dict()["model_part"])
        self.num_bytes = sum(tensor.nbytes for tensor in tensors)


def case_ranks_keep_their_own_part_of_the_best_weights(lab: Lab) -> None:
    if lab.stage != 3:
        return
    parts = Parts()
    fit(lab.folder / "parts", lab.make(), best(), parts)
    whole = sum(param.nbytes for param in Net().parameters())
    # A parameter is divided into equal parts, of which the last may be longer than its rest.
    assert whole / lab.world <= parts.num_bytes < whole / lab.world + 64


def averages(lab: Lab) -> dict[str, Callable[[], list[harness.Callback]]]:
    """Callbacks that change the weights of the result, by name, as far as the stage allows."""
    if lab.stage == 3:
        return {"best": lambda: [best()]}
    return {
        "best": lambda: [EMA(0.7), best()],
        "mean": lambda: [StochasticWeightAveraging(2)],
    }


def case_interrupted_fit_leaves_its_weights_in_a_checkpoint(lab: Lab) -> None:
    for name, make in averages(lab).items():
        whole = fit(lab.folder / name, lab.make(), *make())
        gathered = fit_again(lab, name, make, gather=True)
        for found, wanted in zip(
            fit_again(lab, name, make, gather=False), gathered, strict=True
        ):
            assert found.best_epoch == wanted.best_epoch
            if lab.rank == 0:
                check_export(found, wanted, lab.folder / "out.safetensors")
            check_same(found, wanted)
        check_same(gathered[1], whole)


def fit_again(
    lab: Lab, name: str, make: Callable[[], list[harness.Callback]], *, gather: bool
) -> list[harness.Fitted]:
    """A fit that a signal ends in its second epoch, and one that resumes it."""
    saved = lab.folder / f"{name}-{gather}"
    stop = Stop("on_train_batch_end", BATCHES + 3)
    broken = fit(saved, lab.make(), *make(), stop, gather=gather)
    assert broken.signum == signal.SIGINT
    going_on = ResumeFromCheckpoint(saved)
    folder = lab.folder / f"{name}-{gather}-again"
    return [broken, fit(folder, lab.make(), *make(), going_on, gather=gather)]


def check_same(found: harness.Fitted, wanted: harness.Fitted) -> None:
    states = [
        one.gather(accelerator=SingleDevice("cpu")).state_dict()
        for one in (found, wanted)
    ]
    assert [n for n in states[1] if not same_bits(states[0][n], states[1][n])] == []


def check_export(found: harness.Fitted, wanted: harness.Fitted, to: Path) -> None:
    """``harness export-weights`` of a final checkpoint writes what was gathered."""
    arguments = [str(found.checkpoint), str(to)]
    done = CliRunner().invoke(
        main, ["export-weights", *arguments], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    read = load_file(to)
    assert read.keys() == wanted.model.state_dict().keys()
    for name, value in wanted.model.state_dict().items():
        assert same_bits(read[name], value), name


class Lazy(nn.Sequential):
    """Layers that take their sizes from the first input, or from start weights."""

    def __init__(self) -> None:
        super().__init__(nn.LazyLinear(5), nn.Tanh(), nn.Linear(5, 3))


def case_lazy_layers_start_from_what_rank_0_reads(lab: Lab) -> None:
    made = harness.setup(Lazy, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD)
    options: dict[str, Any] = {"tracker": False, "verbose": False}
    saves = ModelCheckpoint(lab.folder / f"of-{lab.rank}")
    one = made.fit(
        (X, Y), 1, callbacks=[saves], accelerator=SingleDevice("cpu"), **options
    )
    accelerator = lab.make()
    wanted = accelerator.broadcast(one.model.state_dict())
    start = lab.folder / "of-0"
    alone = ResumeFromCheckpoint(
        start, restore_optimizers=False, restore_records=False, restore_callbacks=False
    )
    for given in ({"start": start, "strict": True}, {"callbacks": [alone]}):
        still = made.set_opt_hparams(lr=0.0)
        found = still.fit((X, Y), 1, accelerator=lab.make(), **given, **options)
        state = found.model.state_dict()
        assert [n for n in wanted if not same_bits(state[n], wanted[n])] == []


CASES: dict[str, Callable[[Lab], None]] = OTHERS | {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
"""Every case, by name, with those of ``whole``."""
