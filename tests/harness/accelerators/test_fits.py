"""Whole fits on one to four ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.accelerators.cases import Lab
from tests.harness.accelerators.fits import CASES
from tests.harness.accelerators.launches import Launches

MODULE = "tests.harness.accelerators.fits"

STAGES = {2: 3, 3: 1, 4: 0}
"""The ZeRO stage that each number of ranks is tried at."""


@pytest.mark.parametrize("stage", [None, 2])
@pytest.mark.parametrize("name", CASES)
def test_fit_one_rank(name: str, stage: int | None, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    CASES[name](Lab(stage=stage, folder=tmp_path))


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs the cases of each number of ranks in one launch."""
    return Launches(tmp_path_factory.mktemp("fits"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize("world", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_fit_on_ranks(name: str, world: int, on_ranks: Launches) -> None:
    stage = STAGES[world]
    said = on_ranks.said(world, [stage], list(CASES), name, stage)
    assert said == "ok", said
