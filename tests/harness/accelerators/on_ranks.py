"""Callbacks on any number of ranks: the same numbers as on one device, or a refusal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pyarrow.compute as pc
import pytest
import torch
from torch import nn
from torchmetrics import MeanSquaredError

import harness
import tracking
from harness.accelerators.single import SingleDevice
from harness.callbacks import (
    EMA,
    AutoResume,
    Freeze,
    GradientClip,
    KeepBestModel,
    NaNGuard,
    OverfitBatches,
    SanityCheck,
    StepMetrics,
    StochasticWeightAveraging,
    SystemMetrics,
)
from harness.callbacks.schedule.freeze import move_to_new_group
from harness.errors import CheckpointError
from harness.signals import EndOfProcess
from tests.harness.accelerators.cases import Lab
from tests.harness.accelerators.fits import data, fitted, learner
from tests.harness.data.test_datasets import Both, forms
from tests.harness.exact import Stop, same_bits
from tests.harness.fakes import points

ROWS = 24


def both(lab: Lab, make: Callable[[], list[harness.Callback]]) -> list[harness.Fitted]:
    """The fit on one device and on the ranks."""
    return [
        fitted(lab, accelerator, ROWS // accelerator.world_size, callbacks=make())
        for accelerator in (SingleDevice("cpu"), lab.make())
    ]


def check_close(lab: Lab, one: harness.Fitted, two: harness.Fitted) -> None:
    found = two.model.state_dict()
    if lab.rank == 0:
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=2e-4, atol=2e-5)
    for split in ("train", "valid"):
        for before, after in zip(
            one.records["metrics"][split], two.records["metrics"][split], strict=True
        ):
            assert after == pytest.approx(before, rel=1e-3, abs=1e-5)


def case_ema(lab: Lab) -> None:
    if lab.stage == 3:
        with pytest.raises(
            ValueError, match="expected whole weights on each rank, got"
        ):
            both(lab, lambda: [EMA()])
        return
    check_close(lab, *both(lab, lambda: [EMA(0.7)]))
    best = both(lab, lambda: [EMA(0.7), KeepBestModel("valid/loss", mode="max")])
    check_close(lab, *best)
    assert best[1].best_epoch == 1


def case_ema_of_rounded_weights_is_refused(lab: Lab) -> None:
    if lab.stage is None or lab.stage == 3:
        return
    with pytest.raises(
        ValueError, match=r"EMA: expected float32 weights, got torch.bf"
    ):
        fitted(lab, lab.make(bf16={"enabled": True}), 6, callbacks=[EMA()])


def case_swa(lab: Lab) -> None:
    if lab.stage != 3:
        check_close(lab, *both(lab, lambda: [StochasticWeightAveraging(1)]))


def case_ema_resumes_exactly(lab: Lab) -> None:
    if lab.stage == 3:
        return

    def fit(name: str, *own: Any) -> harness.Fitted:
        return learner().fit(
            data(97),
            epochs=2,
            valid_data=data(31, seed=1),
            callbacks=[EMA(0.7), AutoResume(lab.folder / f"{name}-{lab.stage}"), *own],
            seed=4,
            tracker=False,
            verbose=False,
            accelerator=lab.make(),
            dataloader_options={"batch_size": 8, "drop_last": False},
        )

    whole = fit("whole")
    for stop in (("on_train_batch_end", 4), ("on_valid_batch_end", 1)):
        assert fit(stop[0], Stop(*stop)).signum == signal.SIGINT
        resumed = fit(stop[0])
        assert resumed.records["metrics"] == whole.records["metrics"]
        found = resumed.model.state_dict()
        if lab.rank == 0:
            for name, value in whole.model.state_dict().items():
                assert same_bits(found[name], value), name


class StopOneRank(harness.Callback):
    """A signal reaches the last rank alone."""

    def on_train_batch_begin(self) -> None:
        accelerator = self.ctx.accelerator
        assert accelerator is not None
        if accelerator.rank == accelerator.world_size - 1 and self.ctx.step == 1:
            signal.raise_signal(signal.SIGTERM)


def case_signal_of_one_rank_stops_all_and_is_resumed_exactly(lab: Lab) -> None:
    def fit(name: str, *own: Any) -> harness.Fitted:
        save = AutoResume(lab.folder / f"{name}-{lab.stage}", every_n_minutes=1e-6)
        return learner().fit(
            data(97),
            epochs=30,
            valid_data=data(31, seed=1),
            callbacks=[save, *own],
            seed=4,
            tracker=False,
            verbose=False,
            accelerator=lab.make(),
            dataloader_options={"batch_size": 8},
        )

    whole = fit("whole")
    stopped = fit("stopped", StopOneRank())
    assert stopped.signum == signal.SIGTERM
    assert len(stopped.records["metrics"]["train"]) < 30
    if lab.rank != lab.world - 1:
        EndOfProcess.asked_by = None  # as if it came too late to stop the fit
    with pytest.raises(SystemExit) as ended:
        fit("stopped")
    assert ended.value.code == 128 + signal.SIGTERM
    EndOfProcess.asked_by = None  # the next process
    resumed = fit("stopped")
    assert resumed.records["metrics"] == whole.records["metrics"]
    found = resumed.model.state_dict()
    if lab.rank == 0:
        for key, value in whole.model.state_dict().items():
            assert same_bits(found[key], value), key


def case_nan_of_one_rank_ends_all(lab: Lab) -> None:
    x, y = data(48)
    x[40] = float("nan")

    def fit(guard: NaNGuard) -> None:
        learner().fit(
            (x, y),
            1,
            callbacks=[guard],
            tracker=False,
            verbose=False,
            accelerator=lab.make(),
            dataloader_options={"batch_size": ROWS // lab.world, "shuffle": False},
        )

    if lab.stage:
        with pytest.raises(
            ValueError, match="expected whole gradients, got ZeRO stage"
        ):
            fit(NaNGuard())
    guard = NaNGuard(gradients=not lab.stage)
    place = "batch 2"
    if lab.world > 1:
        place += f" of rank {(40 - ROWS) // (ROWS // lab.world)}"
    text = f"finite loss in epoch 1, {place}, got nan. Rows of the input"
    with pytest.raises(FloatingPointError, match=text):  # alike on every rank
        fit(guard)


def case_checks_before_training(lab: Lab) -> None:
    plain, checked = (
        fitted(lab, lab.make(), ROWS // lab.world, callbacks=own)
        for own in ([], [SanityCheck(), SystemMetrics(every=5)])
    )
    assert plain.records["metrics"] == checked.records["metrics"]
    refused: list[tuple[harness.Callback, str]] = []
    if lab.world > 1:
        refused.append((OverfitBatches(), "OverfitBatches: expected one rank"))
    if lab.stage is not None:
        refused.append((Freeze("layers.0"), "Freeze: expected one device"))
    for callback, match in refused:
        with pytest.raises(ValueError, match=match):
            fitted(lab, lab.make(), 6, callbacks=[callback])


def case_norms_of_gradients_are_recorded(lab: Lab) -> None:
    if lab.stage != 3:
        found = both(lab, lambda: [GradientClip(0.1)])
        assert "grad_norm" in found[1].records["metrics"]["train"][0]
        check_close(lab, *found)


def case_fit_goes_on_from_a_result(lab: Lab) -> None:
    first = fitted(lab, SingleDevice("cpu"), ROWS)
    wanted = fitted(lab, SingleDevice("cpu"), ROWS, start=first, strict=True)
    per_rank = ROWS // lab.world
    found = fitted(lab, lab.make(), per_rank, start=first, strict=True)
    check_close(lab, wanted, found)
    weights = {n: own.clone() for n, own in found.model.state_dict().items()}
    again = fitted(lab, lab.make(), per_rank, start=found.model.state_dict())
    more = found.fit(data(128), 1, accelerator=lab.make(), tracker=False, verbose=False)
    assert more.start is not None
    assert more.start.is_complete
    after = found.model.state_dict()
    assert all(same_bits(after[name], own) for name, own in weights.items())
    assert again.start is not None
    bad = {"layers.0.bias": torch.zeros(8 if lab.rank else 3)}
    with pytest.raises(CheckpointError, match=r"fit\(start"):
        fitted(lab, lab.make(), per_rank, start=bad, strict=False)


def case_fits_of_one_run_are_told_apart(lab: Lab) -> None:
    if lab.stage not in (None, 1):
        return

    def fit(run: tracking.Run, *own: harness.Callback) -> harness.Fitted:
        return learner().fit(
            data(144),
            2,
            data(24, seed=1),
            callbacks=[StepMetrics(), *own],
            seed=4,
            tracker=run,
            verbose=False,
            accelerator=lab.make(),
            dataloader_options={"batch_size": ROWS // lab.world},
        )

    runs, saved = lab.folder / "fits-of-one-run", lab.folder / "saved-fits"
    with tracking.start(runs_dir=runs, delivery=False, all_ranks=True) as run:
        first = fit(run)
        stopped = fit(run, AutoResume(saved), Stop("on_train_batch_end", 3))
        assert stopped.signum == signal.SIGINT
        second = fit(run, AutoResume(saved))
        assert run.fit == 1
        past = tracking.open(run.path)
        table = past.records(rank=lab.rank)
        for number, one in enumerate((first, second), start=1):
            rows = table.filter(pc.equal(table["fit"], number)).to_pylist()
            metrics = [row for row in rows if row["what"] == "metrics"]
            assert {(row["set"], row["index"]) for row in metrics} == {
                (split, epoch) for split in ("train", "valid") for epoch in (1, 2)
            }
            for row in metrics:
                wanted = one.records["metrics"][row["set"]][row["index"] - 1]
                assert row["value"] == wanted[row["name"]]
            steps = {row["step"] for row in rows if row["what"] == "steps"}
            assert steps == {*range(1, 13)}


class SlowBias(harness.Callback):
    """Gives one parameter a group of its own, before engines take the optimizer."""

    def prepare(self, ctx: harness.Context) -> None:
        bias = dict(ctx.model.named_parameters())["layers.0.bias"]
        (group,) = ctx.opt.param_groups
        move_to_new_group(ctx.opt, group, {id(bias)}, 1e-9)


def case_prepared_groups_reach_the_engines(lab: Lab) -> None:
    one, two = both(lab, lambda: [SlowBias()])
    check_close(lab, one, two)
    plain = fitted(lab, SingleDevice("cpu"), ROWS)  # with one rate for all
    moved = two.model.layers[0].bias - plain.model.layers[0].bias  # type: ignore[index]
    assert moved.abs().max() > 1e-3


def as_number(target: torch.Tensor) -> torch.Tensor:
    return target.float()


def gap(pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (pred - target).abs().mean()


def case_metrics_of_one_part(lab: Lab) -> None:
    first = fitted(lab, SingleDevice("cpu"), ROWS)
    metrics = [
        harness.on(metric, pred=1, target=as_number)
        for metric in (MeanSquaredError(), gap)
    ]
    wanted, found = (
        first.evaluate(
            data(97, seed=1), metrics=metrics, accelerator=accelerator, verbose=False
        )
        for accelerator in (SingleDevice("cpu"), lab.make())
    )
    values = found.records["metrics"]["valid"][0]
    assert values.keys() == {"loss", "mean_squared_error_1", "gap_1"}
    assert values == pytest.approx(wanted.records["metrics"]["valid"][0], rel=1e-5)


def case_any_form_of_data(lab: Lab) -> None:
    x, y = points(50)
    of_form = forms(x, y)
    model = harness.setup(Both, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD)
    model = model.set_opt_hparams(lr=0.1)
    for name in ("named", "labels", "dicts", "whole"):
        one, two = (
            model.fit(
                *(of_form[name], 1, of_form[name]),
                accelerator=accelerator,
                dataloader_options={"batch_size": ROWS // accelerator.world_size},
                seed=4,
                tracker=False,
                verbose=False,
            )
            for accelerator in (SingleDevice("cpu"), lab.make())
        )
        check_close(lab, one, two)
        outputs = [fit.predict(of_form[name]) for fit in (one, two)]
        torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


CASES: dict[str, Callable[[Lab], None]] = {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
"""Every case, by name."""
