"""What luz's cases share: one model, its data, and fits that several of them look at."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import harness
from tests.luz.parts import Net, rows


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every case draws the same numbers, in any order of cases."""
    torch.manual_seed(1)


@pytest.fixture(scope="package")
def learner() -> harness.Learner:
    """A linear model that Adam trains on the squared error."""
    learner = harness.setup(Net, loss=nn.MSELoss(), optimizer=torch.optim.Adam)
    return learner.set_hparams(input_size=10, output_size=1)


@pytest.fixture(scope="package")
def fitted(learner: harness.Learner) -> harness.Fitted:
    """Five epochs with validation. Cases that change the model make their own."""
    return learner.fit(rows(), 5, rows(seed=1), seed=1, tracker=False)
