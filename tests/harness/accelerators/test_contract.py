"""Both accelerators under one suite: in this process for one rank, launched for more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.accelerators.cases import TALKING, TRAINING, Lab
from tests.harness.accelerators.launches import Launches

STAGES = [0, 1, 2, 3]

ONE_RANK = [None, 0, 2, 3]
"""On one rank, stage 1 keeps all gradients and states as stage 2 does."""
MODULE = "tests.harness.accelerators.cases"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums of several threads come in any order."""
    torch.set_num_threads(1)


def stage_id(stage: int | None) -> str:
    """Name of a stage in a test's name."""
    return "single" if stage is None else f"zero{stage}"


@pytest.mark.parametrize("stage", ONE_RANK, ids=stage_id)
@pytest.mark.parametrize("name", TRAINING)
def test_training_one_rank(name: str, stage: int | None, tmp_path: Path) -> None:
    TRAINING[name](Lab(stage=stage, folder=tmp_path))


@pytest.mark.parametrize("stage", [None, 0], ids=stage_id)
@pytest.mark.parametrize("name", TALKING)
def test_data_and_talk_one_rank(name: str, stage: int | None, tmp_path: Path) -> None:
    TALKING[name](Lab(stage=stage, folder=tmp_path))


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs each group of cases once, when the first of them is asked for."""
    return Launches(tmp_path_factory.mktemp("ranks"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES, ids=stage_id)
@pytest.mark.parametrize("name", TRAINING)
def test_training_two_ranks(name: str, stage: int, on_ranks: Launches) -> None:
    said = on_ranks.said(2, STAGES, list(TRAINING), name, stage)
    assert said == "ok", said


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("name", TALKING)
def test_data_and_talk_ranks(name: str, world: int, on_ranks: Launches) -> None:
    said = on_ranks.said(world, [0], list(TALKING), name, 0)
    assert said == "ok", said
