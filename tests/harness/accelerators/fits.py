"""Whole fits on any number of ranks: the same numbers as one process gives."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, log_loss
from torch import Tensor, nn
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassF1Score,
)
from torchmetrics.wrappers import ClasswiseWrapper

import harness
from harness.accelerators.single import SingleDevice
from harness.callbacks import KeepBestModel
from tests.harness.accelerators.cases import Lab

CLASSES = 4


class Scorer(nn.Module):
    """A net of one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.layers(x)
        return scores


def learner() -> harness.Learner:
    """A classifier with two metrics."""
    metrics = {
        "accuracy": MulticlassAccuracy(CLASSES, average="micro"),
        "f1": MulticlassF1Score(CLASSES, average="macro"),
    }
    made = harness.setup(
        Scorer, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.AdamW, metrics=metrics
    )
    return made.set_opt_hparams(lr=3e-2)


def data(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows whose class can be learnt; the same on every call."""
    drawn = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 6, generator=drawn)
    return x, (x[:, 0] > 0).long() * 2 + (x[:, 1] > 0.3).long()


def fitted(
    lab: Lab, accelerator: Any, batch_size: int, **options: Any
) -> harness.Fitted:
    """A short fit on prime-sized data; four ranks' batches make one of 24."""
    return learner().fit(
        data(211),
        epochs=2,
        valid_data=data(97, seed=1),
        seed=4,
        tracker=False,
        verbose=False,
        accelerator=accelerator,
        dataloader_options={"batch_size": batch_size, "drop_last": False},
        **options,
    )


def case_fit_gives_what_one_process_gives(lab: Lab) -> None:
    torch.manual_seed(0)
    wanted = fitted(lab, SingleDevice("cpu"), 24)
    found = fitted(lab, lab.make(), 24 // lab.world)
    if lab.rank:
        return
    for (_, before), (_, after) in zip(
        sorted(wanted.model.state_dict().items()),
        sorted(found.model.state_dict().items()),
        strict=True,
    ):
        torch.testing.assert_close(after, before, rtol=2e-4, atol=2e-5)
    torch.testing.assert_close(
        torch.tensor(list(found.get_metrics()["value"])),
        torch.tensor(list(wanted.get_metrics()["value"])),
        rtol=1e-4,
        atol=1e-5,
    )


def case_evaluation_equals_scikit_learns(lab: Lab) -> None:
    found = fitted(lab, lab.make(), 6)
    for rows in (1, 2, 101):
        x, y = data(rows, seed=2)
        with torch.no_grad():
            probabilities = found.model(x).double().softmax(1)
        guesses = probabilities.argmax(1)
        wanted = {
            "loss": log_loss(y, probabilities, labels=range(CLASSES)),
            "accuracy": accuracy_score(y, guesses),
        }
        if rows == 101:
            wanted["f1"] = f1_score(y, guesses, average="macro")
        said = found.evaluate((x, y), accelerator=lab.make()).records["metrics"][
            "valid"
        ][0]
        for name, value in wanted.items():
            assert abs(said[name] - value) < 1e-5, (rows, name, said[name], value)


def case_keep_best_ends_with_the_best_weights(lab: Lab) -> None:
    def kept(accelerator: Any) -> Any:
        best = KeepBestModel("train/loss", mode="max")  # the first epoch's
        return fitted(lab, accelerator, 24 // accelerator.world_size, callbacks=[best])

    found = kept(lab.make()).model.state_dict()
    for name, value in kept(SingleDevice("cpu")).model.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
    last = fitted(lab, lab.make(), 24 // lab.world).model.state_dict()
    assert not torch.allclose(found["layers.0.weight"], last["layers.0.weight"])


def case_lists_of_a_rank_without_samples_do_not_hang(lab: Lab) -> None:
    found = fitted(lab, lab.make(), 6)
    metrics = {
        "auroc": MulticlassAUROC(CLASSES),
        "classes": ClasswiseWrapper(MulticlassAUROC(CLASSES, average=None)),
    }
    for rows in (1, 3, 101):
        x, y = data(rows, seed=2)
        with warnings.catch_warnings():
            # Some classes have no sample.
            warnings.simplefilter("ignore")
            wanted, said = (
                found.evaluate((x, y), metrics=metrics, accelerator=accelerator)
                for accelerator in (SingleDevice("cpu"), lab.make())
            )
        for name in ("loss", *metrics):
            values = [
                one.records["metrics"]["valid"][0][name] for one in (wanted, said)
            ]
            near = pytest.approx(values[1], abs=1e-6, nan_ok=True)
            assert values[0] == near, (rows, name, values)


def case_predict_gives_every_row_once_in_order(lab: Lab) -> None:
    found = fitted(lab, lab.make(), 6)
    for rows in (1, 2, 101):
        x, _ = data(rows, seed=2)
        with torch.no_grad():
            wanted = found.model(x)
        said = found.predict(
            x, accelerator=lab.make(), dataloader_options={"batch_size": 7}
        )
        if lab.rank == 0:
            torch.testing.assert_close(said, wanted, rtol=1e-5, atol=1e-6)


def case_early_stopping_ends_every_rank(lab: Lab) -> None:
    stopping = harness.callbacks.EarlyStopping(patience=1, min_delta=10.0)
    found = learner().fit(
        data(211),
        epochs=9,
        valid_data=data(31, seed=1),
        callbacks=[stopping],
        seed=4,
        tracker=False,
        verbose=False,
        accelerator=lab.make(),
    )
    epochs = found.get_metrics()["epoch"].max()
    assert lab.make().gather(torch.tensor([int(epochs)])).tolist() == [2] * lab.world


def case_fit_by_steps_gives_what_one_process_gives(lab: Lab) -> None:
    def train(accelerator: Any, batch_size: int) -> harness.Fitted:
        return learner().fit(
            data(211),
            valid_data={"one": data(97, seed=1), "two": data(53, seed=2)},
            max_steps=13,
            valid_every="5 steps",
            limit_batches={"train": 7},
            seed=4,
            tracker=False,
            verbose=False,
            accelerator=accelerator,
            dataloader_options={"batch_size": batch_size, "drop_last": False},
        )

    torch.manual_seed(0)
    wanted = train(SingleDevice("cpu"), 24).get_metrics()
    found = train(lab.make(), 24 // lab.world).get_metrics()
    labels = ["set", "metric", "step"]
    assert wanted[labels].equals(found[labels])
    steps = wanted[wanted["set"] == "two"]["step"].unique()
    assert list(steps) == [5, 10, 13]
    torch.testing.assert_close(
        torch.tensor(list(found["value"])),
        torch.tensor(list(wanted["value"])),
        rtol=1e-4,
        atol=1e-5,
    )


class Taught(Scorer):
    """A net that follows a teacher, which nothing steps."""

    ctx: Any

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(6, CLASSES).requires_grad_(False)

    def loss(self, pred: Tensor, target: Tensor) -> Tensor:
        wanted: Tensor = self.teacher(self.ctx.input)  # outside of forward
        return (pred - wanted).square().mean()

    def set_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.layers.parameters(), lr=0.1)


class Teaches(harness.Callback):
    """Changes the teacher after each step."""

    def on_train_batch_after_step(self) -> None:
        assert isinstance(self.ctx.model, Taught)
        with torch.no_grad():
            for param in self.ctx.model.teacher.parameters():
                param.mul_(0.9)


def case_weights_that_nothing_steps_follow_the_users_code(lab: Lab) -> None:
    one, two = (
        harness.setup(Taught).fit(
            *(data(97), 3, data(31, seed=1)),
            callbacks=[Teaches()],
            seed=4,
            tracker=False,
            verbose=False,
            accelerator=accelerator,
            dataloader_options={"batch_size": 24 // accelerator.world_size},
        )
        for accelerator in (SingleDevice("cpu"), lab.make())
    )
    if lab.rank == 0:
        found = two.model.state_dict()
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)


CASES: dict[str, Callable[[Lab], None]] = {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
"""Every case, by name."""
