"""Curriculum: short sequences first, and longer ones when the model is good at them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import harness


class Parity(Dataset[tuple[Tensor, Tensor]]):
    """Random bits; the target is whether an odd number of them is set."""

    def __init__(self, count: int, length: int) -> None:
        self.count, self.length = count, length

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        bits = torch.randint(2, (self.length, 1)).float()
        return bits, bits.sum() % 2


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
    """Makes the sequences longer whenever the model is good at the present length."""

    def __init__(self, first: int, last: int) -> None:
        self.length, self.last = first, last

    def on_epoch_begin(self) -> None:
        """Set the length of this epoch."""
        data: Any = self.ctx.train_data
        data.dataset.length = self.length
        self.ctx.log_metric("length", self.length)

    def on_epoch_end(self) -> None:
        """Decide about the next epoch."""
        if self.ctx.get_metric("accuracy", "train") > 0.95:
            self.length = min(self.length + 1, self.last)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resume is exact."""
        return {"length": self.length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the length that was reached."""
        self.length = state["length"]


def right(pred: Tensor, target: Tensor) -> Tensor:
    """Share of right answers."""
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
        fitted = learner.set_opt_hparams(lr=1e-2).fit(
            Parity(1600, length=first),
            14,
            Parity(200, length=10),
            callbacks=[Curriculum(first, last=10)],
            seed=1,
            tracker=tracker,
        )
        found[name] = fitted.records["metrics"]["valid"][-1]["accuracy"]
        print(f"{name}: {found[name]:.1%} right")
    return found


if __name__ == "__main__":
    main()
