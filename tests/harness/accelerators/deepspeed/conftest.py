"""Accelerators for the tests of DeepSpeed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def make() -> Iterator[Any]:
    """A function that makes accelerators at a ZeRO stage; they are finished afterwards."""
    with ExitStack() as stack:

        def made(stage: int = 0, accumulate: int = 1, **config: Any) -> Any:
            zero = {"stage": stage, **config.pop("zero_optimization", {})}
            found = DeepSpeedAccelerator(
                {"zero_optimization": zero, **config},
                device="cpu",
                accumulate=accumulate,
            )
            stack.callback(found.finish)
            return found

        yield made
