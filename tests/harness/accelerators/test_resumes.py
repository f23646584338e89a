"""Fits on two ranks that are broken off and go on bit for bit."""

from __future__ import annotations

import pytest

from tests.harness.accelerators.launches import Launches
from tests.harness.accelerators.resumes import CASES, NAMES

OTHERS = [name for name in CASES if name not in NAMES]

MODULE = "tests.harness.accelerators.resumes"


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs the cases of a stage in one launch."""
    return Launches(tmp_path_factory.mktemp("resumes"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "stage",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in (0, 2))) for n in range(4)],
)
@pytest.mark.parametrize("name", NAMES)
def test_resume_on_two_ranks_is_exact(
    name: str, stage: int, on_ranks: Launches
) -> None:
    said = on_ranks.said(2, [stage], NAMES, name, stage)
    assert said == "ok", said


@pytest.mark.distributed
@pytest.mark.parametrize("name", OTHERS)
def test_resume_of_validation_by_steps_on_two_ranks_is_exact(
    name: str, on_ranks: Launches
) -> None:
    said = on_ranks.said(2, [1], OTHERS, name, 1)
    assert said == "ok", said
