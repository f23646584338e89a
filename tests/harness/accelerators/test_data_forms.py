"""Every form of data on one, two and three ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.accelerators.cases import Lab
from tests.harness.accelerators.data_forms import CASES
from tests.harness.accelerators.launches import Launches

MODULE = "tests.harness.accelerators.data_forms"


# Two ranks read these two as well; the other forms with workers show them on one.
SLOW = {"ready-workers", "batches-by-length-workers"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CASES],
)
def test_data_one_rank(name: str, tmp_path: Path) -> None:
    CASES[name](Lab(stage=None, folder=tmp_path))


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs the cases of each number of ranks in one launch."""
    return Launches(tmp_path_factory.mktemp("forms"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_data_on_ranks(name: str, world: int, on_ranks: Launches) -> None:
    said = on_ranks.said(world, [0], list(CASES), name, 0)
    assert said == "ok", said
