"""Settings for all tests: a clean environment, and no GPU tests without a GPU."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Modules that were there at the last call of ``gc.freeze``.
_frozen_modules = 0

# The caller's settings must not influence a test, and a test must not use them.
for name in [name for name in os.environ if name.startswith(("HARNESS_", "MLFLOW_"))]:
    del os.environ[name]

# So are signals that the caller ignores, as `nohup` and a shell's `&` do.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, signal.SIG_DFL),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

# On busy cores, threads wait for each other at every step, and the models of the tests
# are too small to benefit from them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Time limits of single examples would depend on what else the machine does.
settings.register_profile("harness", deadline=None)
settings.load_profile("harness")


def pytest_runtest_setup() -> None:
    """Keep the garbage collector from searching imported modules again and again.

    DeepSpeed runs it for each ZeRO 3 model, and with MLflow and torch imported that takes
    half a second each time.

    What SIGTERM asked for in one test does not hold for the next one.
    """
    global _frozen_modules
    if "harness.signals" in sys.modules:
        sys.modules["harness.signals"].EndOfProcess.asked_by = None
    if len(sys.modules) > _frozen_modules + 100:
        gc.collect()
        gc.freeze()
        _frozen_modules = len(sys.modules)


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the project."""
    return ROOT


@pytest.fixture
def disk_calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Waits for the disk, and renames, in order: the call and the inode it was made on."""
    calls: list[tuple[str, int]] = []

    def record(name: str) -> None:
        real = getattr(os, name)

        def call(file: Any, *args: Any, **options: Any) -> None:
            found = os.fstat(file) if isinstance(file, int) else Path(file).stat()
            calls.append((name, found.st_ino))
            real(file, *args, **options)

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "rename", "replace"):
        record(name)
    return calls


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from all tests but those of ``-m gpu``: what is compared is the CPU's."""
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests on a machine without a GPU. Imports torch only if there are any."""
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
