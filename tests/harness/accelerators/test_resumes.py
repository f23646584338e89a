"""Fits on two ranks that are broken off and go on bit for bit."""

from __future__ import annotations

import pytest

from tests.harness.accelerators.launches import Launches
from tests.harness.accelerators.resumes import CASES, NAMES

STAGES = {0: NAMES, 1: [*CASES], 2: [*CASES], 3: [*NAMES, "damaged"]}
"""The cases of each ZeRO stage, run in one launch."""

MODULE = "tests.harness.accelerators.resumes"


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """Runs the cases of a stage in one launch."""
    return Launches(tmp_path_factory.mktemp("resumes"), MODULE)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "name"),
    [
        pytest.param(stage, name, marks=[pytest.mark.slow] * (stage in (0, 2)))
        for stage, names in STAGES.items()
        for name in names
    ],
)
def test_resume_on_two_ranks_is_exact(
    stage: int, name: str, on_ranks: Launches
) -> None:
    said = on_ranks.said(2, [stage], STAGES[stage], name, stage)
    assert said == "ok", said
