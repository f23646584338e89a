"""What several ranks agree on: means by name, metrics, decisions, results, random numbers."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchmetrics import Metric
from torchmetrics.regression import PearsonCorrCoef
from torchmetrics.utilities import dim_zero_cat

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import EarlyStopping, LRScheduler
from tests.harness.accelerators.cases import Lab

OPTIONS = {"batch_size": 4, "drop_last": False}


def data(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random rows, the same on every call."""
    drawn = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=drawn), torch.randn(rows, 1, generator=drawn)


def learner(build: Callable[[], nn.Module] | None = None, **options: Any) -> Any:
    """A learner of a linear layer."""
    made = harness.setup(
        build or (lambda: nn.Linear(4, 1)),
        loss=nn.MSELoss(),
        optimizer=torch.optim.SGD,
        **options,
    )
    return made.set_opt_hparams(lr=0.01)


def fit(
    lab: Lab, made: Any, train: Any, epochs: int = 1, *args: Any, **options: Any
) -> Any:
    """A quiet fit on the ranks."""
    settings = {
        "seed": 1,
        "tracker": False,
        "verbose": False,
        "accelerator": lab.make(),
    }
    if not isinstance(train, DataLoader):
        settings["dataloader_options"] = OPTIONS
    return made.fit(train, epochs, *args, **(settings | options))


def on_ranks(lab: Lab, value: Any) -> list[Any]:
    """A value of each rank."""
    return list(lab.make().gather_objects(value))


# ------------------------------------------------------------------ means by name


class Parts(nn.Linear):
    """A loss whose parts depend on the batch."""

    def __init__(self) -> None:
        super().__init__(4, 1)

    def step(self) -> None:
        ctx: Any = self.ctx
        x, y, task = ctx.batch
        ctx.pred = self(x)
        ctx.optimize(((ctx.pred - y) ** 2).mean())
        name = "b" if task[0] == 1 else "a"
        ctx.log_metric(name, 10.0 * len(task) if name == "b" else 1.0)


def parts(task: Tensor) -> DataLoader[Any]:
    """Rows with their task, in batches of four."""
    return DataLoader(TensorDataset(*data(len(task)), task), batch_size=4)


def fit_parts(lab: Lab, task: Tensor) -> Any:
    made = harness.setup(Parts, optimizer=torch.optim.SGD).set_opt_hparams(lr=0.01)
    return fit(lab, made, parts(task)).get_metrics().set_index("metric")["value"]


def case_values_of_other_names_on_each_rank_are_averaged_by_name(lab: Lab) -> None:
    task = (torch.arange(24) // 4 % max(lab.world, 2) > 0).float()
    if lab.rank == 0 and lab.world > 1:
        with pytest.warns(UserWarning, match=r"got a on ranks \[0.*\], b on ranks \[1"):
            found = fit_parts(lab, task)
    else:
        found = fit_parts(lab, task)
    assert (found["a"], found["b"]) == (1.0, 40.0)


def case_a_name_of_one_rank_alone_is_there_on_every_rank(lab: Lab) -> None:
    task = torch.zeros(24)
    task[20:] = 1  # the last batch of the last rank
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fit_parts(lab, task)
    assert (found["a"], found["b"]) == (1.0, 40.0)


# ------------------------------------------------------------------------ metrics


class Kept(Metric):
    """Keeps some predictions in a list, as `reduction` says."""

    full_state_update = False
    values: Any

    def __init__(
        self, take: Callable[[Tensor, Tensor], list[Tensor]], reduction: Any
    ) -> None:
        super().__init__()
        self.take = take
        self.add_state("values", [], dist_reduce_fx=reduction)

    def update(self, pred: Tensor, target: Tensor) -> None:
        self.values.extend(self.take(pred, target))

    def compute(self) -> Tensor:
        listed = self.values if isinstance(self.values, list) else [self.values]
        return torch.tensor(float(sum(item.sum() for item in listed)))


class Texts(Metric):
    """Keeps things that are not tensors."""

    full_state_update = False
    texts: Any

    def __init__(self) -> None:
        super().__init__()
        self.add_state("texts", [], dist_reduce_fx=None)

    def update(self, pred: Tensor, target: Tensor) -> None:
        self.texts += [f"{len(pred)} rows"] * len(pred)

    def compute(self) -> Tensor:
        return torch.tensor(float(len(self.texts)))


def first_rows(pred: Tensor, target: Tensor) -> list[Tensor]:
    """Rows of one kind: only one rank has some."""
    return [pred[target[:, 0] == 1]] if (target == 1).any() else []


def first_numbers(pred: Tensor, target: Tensor) -> list[Tensor]:
    """The same without a second dim."""
    return [rows[:, 0] for rows in first_rows(pred, target)]


def case_lists_of_any_length_on_each_rank_give_what_one_process_gives(lab: Lab) -> None:
    x, _ = data(19)
    y = torch.zeros(19, 1)
    y[0] = 1
    metrics = {
        "each": Kept(lambda pred, target: list(pred), None),
        "rows": Kept(first_rows, "cat"),
        "numbers": Kept(first_numbers, "cat"),
        "joined": Kept(lambda pred, target: [pred], dim_zero_cat),
        "texts": Texts(),
        "pearson": PearsonCorrCoef(),
    }
    fitted = fit(lab, learner(), (x, y))
    for rows in (1, 19):
        wanted, found = (
            evaluate_quietly(fitted, (x[:rows], y[:rows]), metrics, accelerator)
            for accelerator in (SingleDevice("cpu"), lab.make())
        )
        assert found == pytest.approx(wanted, rel=1e-5, nan_ok=True), rows


def evaluate_quietly(
    fitted: Any, some: Any, metrics: dict[str, Any], accelerator: Any
) -> dict[str, Any]:
    """Metrics of some data; one row has no correlation, which torchmetrics warns of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = fitted.evaluate(
            some,
            metrics=metrics,
            accelerator=accelerator,
            dataloader_options={"batch_size": 4},
        )
    return dict(found.records["metrics"]["valid"][0])


def case_other_metrics_on_a_rank_are_refused(lab: Lab) -> None:
    if lab.world == 1:
        return
    own = {f"m{lab.rank}": Texts()}
    with pytest.raises(
        ValueError, match=r"metrics: expected the same on every rank, got \['m0'\]"
    ):
        fit(lab, learner(metrics=own), data(8))
    turned = {"a": Texts(), "b": Kept(first_rows, "cat")}
    turned = turned if lab.rank else dict(reversed(turned.items()))
    found = fit(lab, learner(metrics=turned), data(8)).records["metrics"]["train"][0]
    assert found["a"] == 8.0


# ---------------------------------------------------------------------- decisions


class LogsItsRank(harness.Callback):
    """Logs a value that differs between ranks."""

    def on_epoch_end(self) -> None:
        accelerator, epoch = self.ctx.accelerator, self.ctx.epoch or 0
        assert accelerator is not None
        value = float(-epoch if accelerator.rank else epoch)
        self.ctx.log("metrics", "valid", {"own": value}, epoch)


def case_a_monitor_that_differs_is_decided_by_rank_0(lab: Lab) -> None:
    stopping = EarlyStopping("valid/own", patience=2, mode="min")
    callbacks = [LogsItsRank(), stopping]
    if lab.rank == 0 and lab.world > 1:
        with pytest.warns(
            UserWarning, match=r"the same value on every rank, got \[1.0, -1.0"
        ):
            found = fit(lab, learner(), data(8), 6, data(8), callbacks=callbacks)
    else:
        found = fit(lab, learner(), data(8), 6, data(8), callbacks=callbacks)
    assert on_ranks(lab, len(found.records["metrics"]["train"])) == [3] * lab.world


class ByLoss:
    """A scheduler whose step takes the loss."""

    def __init__(self, optimizer: Any) -> None:
        self.optimizer, self.seen = optimizer, []  # type: ignore[var-annotated]

    def step(self, loss: float) -> None:
        self.seen.append(loss)

    def state_dict(self) -> dict[str, Any]:
        return {}


def case_a_scheduler_gets_the_loss_of_all_ranks(lab: Lab) -> None:
    stepping = LRScheduler(ByLoss, call_on="on_train_batch_end")  # type: ignore[arg-type]
    fit(lab, learner(), data(23), callbacks=[stepping])
    seen = on_ranks(lab, stepping.scheduler.seen)  # type: ignore[attr-defined]
    assert seen == [seen[0]] * lab.world
    assert len(seen[0]) == -(-23 // (4 * lab.world))


def case_lr_finder_ends_alike_on_every_rank(lab: Lab) -> None:
    x, y = data(64)
    y = y * torch.exp(2 * y.flip(0))
    found = harness.lr_finder(
        learner(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))),
        (x, y),
        start_lr=1e-3,
        end_lr=10.0,
        num_steps=40,
        dataloader_options={"batch_size": 4},
        seed=0,
    )
    of_ranks = on_ranks(lab, (found.lrs, found.losses))
    assert of_ranks == [of_ranks[0]] * lab.world


# ------------------------------------------------------------------------ results


class Counts(nn.Module):
    """BatchNorm, a buffer that grows, one outside the state, and extra state."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("last", torch.zeros(1), persistent=False)
        self.batches = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.seen = torch.cat([self.seen, x[:, 0].detach()])
            self.last = x[:1, 0].detach().clone()
            self.batches += len(x)
        return self.head(self.norm(x))

    def get_extra_state(self) -> dict[str, int]:
        return {"batches": self.batches}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


def case_every_rank_ends_with_the_same_model(lab: Lab) -> None:
    model = fit(lab, learner(Counts), data(23), 2).model
    own = {name: value.tolist() for name, value in model.named_buffers()}
    own |= {name: value.tolist() for name, value in model.named_parameters()}
    of_ranks = on_ranks(lab, own | {"batches": model.batches})
    assert of_ranks == [of_ranks[0]] * lab.world


def case_a_last_step_with_one_row_on_a_rank_trains_with_batch_norm(lab: Lab) -> None:
    for rows in range(4 * lab.world + 2, 8 * lab.world):
        torch.manual_seed(0)
        fit(
            lab,
            learner(lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 1))),
            data(rows),
        )


def case_predict_gives_every_row_in_order_whatever_it_is(lab: Lab) -> None:
    kinds: dict[str, Callable[[Tensor], Any]] = {
        "tensor": lambda x: x,
        "texts": lambda x: [f"{value:.4f}" for value in x[:, 0].tolist()],
        "array": lambda x: x.numpy(),
        "dict": lambda x: {"x": x, "texts": [str(v) for v in x[:, 0].tolist()]},
        "wider": lambda x: x.repeat(1, len(x)),
        "number": lambda x: float(x.sum()),
        "none": lambda x: None,
    }
    fitted = fit(lab, learner(), data(8))
    for rows in (1, 23, 24):
        x, _ = data(rows)
        for name, kind in kinds.items():
            fitted.model.predict = kind
            found = fitted.predict(
                x, accelerator=lab.make(), dataloader_options={"batch_size": 4}
            )
            if name == "tensor":
                assert torch.equal(found, x)
            elif name == "texts":
                assert list(chain(*found)) == kind(x)
            elif name == "array":
                assert np.array_equal(np.concatenate(found), x.numpy())
            elif name == "dict":
                assert torch.equal(found["x"], x)
                assert list(chain(*found["texts"])) == kind(x)["texts"]
            elif name == "wider" and isinstance(found, list):
                assert torch.equal(torch.cat([one[:, :4] for one in found]), x)
            elif name == "number":
                assert sum(found) == pytest.approx(float(x.sum()), abs=1e-4)
            elif name == "none":
                assert set(found) == {None}


def case_a_second_fit_with_the_accelerator_is_as_a_first(lab: Lab) -> None:
    if lab.stage is None:
        return
    accelerator: Any = lab.make(train_batch_size=16 * lab.world)
    for size, accumulate in ((4, 4), (8, 2), (4, 4)):
        options = {"batch_size": size}
        fit(
            lab,
            learner(),
            data(64),
            accelerator=accelerator,
            dataloader_options=options,
        )
        assert accelerator.accumulate == accumulate


# ----------------------------------------------------------------- random numbers


class Augmented(Dataset[Any]):
    """Rows of random numbers from each generator."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, row: int) -> Any:
        drawn = [random.random(), np.random.random(), float(torch.rand(()))]
        return torch.tensor([*drawn, row]), torch.zeros(1)


class Look(harness.Callback):
    """Keeps the inputs, and what dropout did to them."""

    def __init__(self) -> None:
        self.inputs: list[list[float]] = []
        self.masks: list[list[bool]] = []

    def on_train_batch_after_pred(self) -> None:
        self.inputs += self.ctx.input.tolist()
        self.masks += (self.ctx.pred != 0).tolist()


def case_ranks_draw_numbers_of_their_own(lab: Lab) -> None:
    for workers in (0, 2):
        for generator in (None, torch.Generator().manual_seed(5)):
            look = Look()
            loader = DataLoader(
                Augmented(), batch_size=4, num_workers=workers, generator=generator
            )
            made = harness.setup(
                lambda: nn.Sequential(nn.Linear(4, 32), nn.Dropout()),
                loss=lambda pred, target: pred.square().mean(),
                optimizer=torch.optim.SGD,
            )
            fit(lab, made, loader, callbacks=[look])
            of_ranks = on_ranks(lab, (look.inputs, look.masks))
            rows = [row for inputs, _ in of_ranks for row in inputs]
            for place in range(3):
                assert len({row[place] for row in rows}) == 16
            masks = [tuple(mask) for _, found in of_ranks for mask in found]
            assert len(set(masks)) == 16


def case_a_split_without_a_seed_is_the_same_on_every_rank(lab: Lab) -> None:
    x, y = data(40)
    torch.manual_seed(lab.rank)
    random.seed(lab.rank)
    found = fit(lab, learner(), (x, y), 2, 0.2, seed=None)
    of_ranks = on_ranks(lab, found.records["metrics"]["valid"])
    assert of_ranks == [of_ranks[0]] * lab.world


CASES: dict[str, Callable[[Lab], None]] = {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
"""Every case, by name."""
