"""Which kind of device DeepSpeed uses."""

from __future__ import annotations

import subprocess
import sys

import pytest

from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.deepspeed.library import choose_kind

ON_CPU = """
import torch
torch.cuda.is_available = lambda: True  # as where there is a GPU
torch.cuda.device_count = lambda: 1
from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
DeepSpeedAccelerator({}, device="cpu")
import deepspeed
print(deepspeed.get_accelerator().device_name(), deepspeed.get_accelerator().device_name(0))
"""


@pytest.mark.slow
def test_deepspeed_uses_the_cpu_if_it_is_asked_for_where_there_is_a_gpu() -> None:
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_CPU],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split()[-2:] == ["cpu", "cpu"]


def test_second_kind_of_device_in_a_process_is_refused() -> None:
    DeepSpeedAccelerator({}, device="cpu")
    with pytest.raises(
        ValueError,
        match=r"expected 'cpu', the kind .* in this process, got 'cuda'. Start another",
    ):
        choose_kind("cuda")
    choose_kind("cpu")
