"""Where the weights are after a fit, on one rank and on two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.accelerators.cases import Lab
from tests.harness.accelerators.launches import Launches
from tests.harness.accelerators.whole import CASES

MODULE = "tests.harness.accelerators.whole"

STAGES = [0, 1, 3]

OF_ONE = [name for name in CASES if "rank" not in name]
"""Cases that say something of one process too."""


@pytest.mark.parametrize("name", OF_ONE)
def test_weights_one_rank(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    CASES[name](Lab(stage=None, folder=tmp_path))


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs all cases at all stages in one launch."""
    return Launches(tmp_path_factory.mktemp("whole"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_weights_two_ranks(name: str, stage: int, on_ranks: Launches) -> None:
    said = on_ranks.said(2, STAGES, list(CASES), name, stage)
    assert said == "ok", said
