"""Both accelerators under one suite: in this process for one rank, launched for more."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.harness.accelerator.cases import CASES, Lab
from tests.harness.accelerator.launches import run_cases

STAGES = [0, 1, 2, 3]
MODULE = "tests.harness.accelerator.cases"


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Sums of several threads come in any order."""
    torch.set_num_threads(1)


@pytest.mark.parametrize(
    "stage", [None, *STAGES], ids=lambda s: f"zero{s}" if s is not None else "single"
)
@pytest.mark.parametrize("name", CASES)
def test_contract_one_rank(name: str, stage: int | None, tmp_path: Path) -> None:
    CASES[name](Lab(stage=stage, folder=tmp_path))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Every case at every stage on two ranks, in one launch."""
    folder = tmp_path_factory.mktemp("ranks")
    return run_cases(folder, MODULE, 2, STAGES, list(CASES))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_contract_two_ranks(name: str, stage: int, two_ranks: dict[str, str]) -> None:
    assert two_ranks[f"{name}-{stage}"] == "ok", two_ranks[f"{name}-{stage}"]
