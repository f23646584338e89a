"""Fits on two ranks that are broken off and go on bit for bit."""

from __future__ import annotations

import pytest

from tests.harness.accelerator.launches import Launches
from tests.harness.accelerator.resumes import NAMES

MODULE = "tests.harness.accelerator.resumes"

QUICK = ["two-optimizers", "weighted-sampler"]
"""Cases of the quick form; the rest is slow."""


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs the cases of a stage in one launch."""
    return Launches(tmp_path_factory.mktemp("resumes"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize("name", QUICK)
def test_resume_on_two_ranks_is_exact(name: str, on_ranks: Launches) -> None:
    said = on_ranks.said(2, [3], QUICK, name, 3)
    assert said == "ok", said


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_every_resume_on_two_ranks_is_exact(
    name: str, stage: int, on_ranks: Launches
) -> None:
    said = on_ranks.said(2, [stage], NAMES, name, stage)
    assert said == "ok", said
