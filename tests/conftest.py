"""What every test has: no state of the user's, and a skip where there is no GPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Nothing of the caller's environment may steer a test or be written by one.
for name in [name for name in os.environ if name.startswith(("HARNESS_", "MLFLOW_"))]:
    del os.environ[name]

# Several threads on cores that other processes want wait for one another at every
# step, and the nets of the tests are too small to gain from them.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none; torch is imported only to find out."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
