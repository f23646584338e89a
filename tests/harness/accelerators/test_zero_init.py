"""Fits at ZeRO 3 of models that are divided while they are built."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.harness.accelerators.launches import Launches
from tests.harness.accelerators.zero_init import CASES, check_same, go_on

MODULE = "tests.harness.accelerators.zero_init"


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs all cases in one launch."""
    return Launches(tmp_path_factory.mktemp("zero-init"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_zero_init(world: int, name: str, on_ranks: Launches) -> None:
    said = on_ranks.said(world, [3], list(CASES), name, 3)
    assert said == "ok", said


@pytest.mark.distributed
def test_fit_of_two_ranks_resumes_on_one(on_ranks: Launches, tmp_path: Path) -> None:
    name = "resume_is_exact"
    assert on_ranks.said(2, [3], list(CASES), name, 3) == "ok"
    (left,) = on_ranks.folder.glob(f"*-2-3/{name}-3/left")
    torch.set_num_threads(1)
    found = []
    for zero_init in (True, False):
        folder = tmp_path / str(zero_init)
        shutil.copytree(left, folder)
        found.append(go_on(folder, zero_init=zero_init))
    check_same(*found)
