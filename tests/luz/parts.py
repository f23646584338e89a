"""Small parts of luz's cases: a model and random rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import harness
from harness.pytree import flatten


class Net(nn.Module):
    """One linear layer on flattened inputs."""

    ctx: Any

    def __init__(self, input_size: int, output_size: int) -> None:
        super().__init__()
        self.fc = nn.Linear(input_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def rows(
    count: int = 100, size: Sequence[int] = (10,), seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Random inputs, and a random number for each."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, *size, generator=generator)
    return x, torch.randn(count, 1, generator=generator)


def classes(
    count: int = 100, size: Sequence[int] = (10,), num_classes: int = 10
) -> tuple[Tensor, Tensor]:
    """Random inputs, and a random class for each."""
    generator = torch.Generator().manual_seed(2)
    return (
        torch.randn(count, *size, generator=generator),
        torch.randint(num_classes, (count,), generator=generator),
    )


def linear(**options: Any) -> harness.Learner:
    """A learner of torch's own ``nn.Linear``."""
    options = {"loss": nn.MSELoss(), "optimizer": torch.optim.SGD} | options
    learner = harness.setup(nn.Linear, **options)
    return learner.set_hparams(in_features=10, out_features=1)


class Fail(harness.Callback):
    """Raises once, at the end or the beginning of an epoch."""

    weight = 2000.0  # after the checkpoint is saved

    def __init__(self, epoch: int, event: str = "on_epoch_end") -> None:
        self.epoch, self.has_failed = epoch, False
        setattr(self, event, self._fail)

    def _fail(self) -> None:
        if self.ctx.epoch == self.epoch and not self.has_failed:
            self.has_failed = True
            self.metrics = self.ctx.get_metrics_df()
            raise RuntimeError(f"failed on epoch {self.epoch}")


def assert_same(found: Any, expected: Any) -> None:
    """Nested states that are equal in every bit."""
    one, other = flatten(found), flatten(expected)
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        assert torch.equal(value, other[1][name]), name
