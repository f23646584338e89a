"""The same composer, smaller, on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.harness.accelerators.launches import run_cases


@pytest.mark.distributed
@pytest.mark.slow
def test_odd_programs_on_two_ranks(tmp_path: Path) -> None:
    said = run_cases(tmp_path, "tests.odd.ranks", 2, [0, 2], ["odd"])
    assert said == {"odd-0": "ok", "odd-2": "ok"}
