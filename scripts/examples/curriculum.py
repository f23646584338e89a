"""Curriculum: short sequences first, and longer ones when the model is good at them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import harness


class Parity:
    """Batches of random bits; the target is whether an odd number of them is set."""

    def __init__(self, num_batches: int, length: int) -> None:
        self.num_batches, self.length = num_batches, length

    def __len__(self) -> int:
        return self.num_batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(self.num_batches):
            bits = torch.randint(2, (32, self.length, 1)).float()
            yield bits, bits.sum((1, 2)) % 2


class Net(nn.Module):
    """Reads the bits one after another."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.reader, self.head = nn.GRU(1, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, bits: Tensor) -> Tensor:
        """Scores ``[batch]`` of sequences ``[batch, length, 1]``."""
        scores: Tensor = self.head(self.reader(bits)[0][:, -1]).squeeze(1)
        return scores


class Curriculum(harness.Callback):
    """Makes the sequences longer whenever the model is good at the current length."""

    def __init__(self, data: Parity, last: int) -> None:
        self.data, self.last = data, last

    def on_epoch_begin(self) -> None:
        """Record the length of this epoch."""
        self.ctx.log_metric("length", self.data.length)

    def on_epoch_end(self) -> None:
        """Decide about the next epoch."""
        if self.ctx.get_metric("accuracy", "train") > 0.95:
            self.data.length = min(self.data.length + 1, self.last)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resume is exact."""
        return {"length": self.data.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the length that was reached."""
        self.data.length = state["length"]


def right(pred: Tensor, target: Tensor) -> Tensor:
    """Share of correct answers."""
    return ((pred > 0) == (target > 0)).float().mean()


def main(tracker: object = None) -> dict[str, float]:
    """Train with and without a curriculum, and compare on sequences of full length."""
    learner = harness.setup(
        Net,
        loss=nn.BCEWithLogitsLoss(),
        optimizer=torch.optim.Adam,
        metrics={"accuracy": right},
    )
    found = {}
    for name, first in {"long from the start": 10, "curriculum": 2}.items():
        train = Parity(40, length=first)
        fitted = learner.set_opt_hparams(lr=1e-2).fit(
            train,
            14,
            Parity(10, length=10),
            callbacks=[Curriculum(train, last=10)],
            seed=1,
            tracker=tracker,
        )
        found[name] = fitted.records["metrics"]["valid"][-1]["accuracy"]
        print(f"{name}: {found[name]:.1%} correct")
    return found


if __name__ == "__main__":
    main()
