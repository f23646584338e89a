"""Programs drawn at random, held against a plain loop and their own resumed fits.

A failure shows the smallest program that was found. ``check_program`` repeats it, and the
decorator ``reproduce_failure`` that is printed repeats the drawing.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.odd.compare import check_program
from tests.odd.programs import Program, programs

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

COMMON = settings(
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def check(program: Program) -> None:
    with TemporaryDirectory() as folder:
        check_program(program, Path(folder) / "saved")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of a repository, each fit starts fewer processes to describe its code."""
    monkeypatch.chdir(tmp_path)


@settings(COMMON, max_examples=15, derandomize=True, phases=[Phase.generate])
@given(programs())
def test_odd_programs_do_what_a_plain_loop_does(program: Program) -> None:
    check(program)


@pytest.mark.slow
@settings(COMMON, max_examples=400)
@given(programs(slow=True))
def test_more_odd_programs_do_what_a_plain_loop_does(program: Program) -> None:
    check(program)
