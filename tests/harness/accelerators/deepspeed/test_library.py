"""Which kind of device DeepSpeed uses."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.deepspeed.library import (
    choose_kind,
    get_tracked_random,
    import_deepspeed,
    order_reductions,
    set_tracked_random,
)
from tests.harness.accelerators.cases import prepared

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


def test_state_has_the_random_streams_of_activation_checkpointing(make: Any) -> None:
    accelerator = make(0)
    prepared(accelerator)
    assert "tracked_random" not in accelerator.state_dict()
    set_tracked_random({"own": torch.Generator().manual_seed(5).get_state()})
    try:
        state = copy.deepcopy(accelerator.state_dict())
        other = torch.Generator().manual_seed(6).get_state()
        set_tracked_random({"own": other})
        accelerator.load_state_dict(state)
        (found,) = get_tracked_random().values()
        assert torch.equal(found, state["tracked_random"]["own"])
        assert not torch.equal(found, other)
    finally:
        set_tracked_random({})


def test_deepspeed_takes_the_index_of_the_device_where_each_rank_sees_one(
    make: Any,
) -> None:
    accelerator = make(3)
    # The fourth rank of a machine, whose scheduler shows it a single device.
    accelerator.local_rank, accelerator.device = 3, torch.device("cpu", 0)
    prepared(accelerator)
    assert os.environ["LOCAL_RANK"] == "0"


@pytest.mark.slow
def test_functions_of_muon_are_compiled_when_they_are_called() -> None:
    import_deepspeed()
    from deepspeed.runtime.zero.muon import original_muon  # noqa: PLC0415

    turn = original_muon.zeropower_via_newtonschulz5
    value = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    with torch.compiler.set_stance("force_eager"):
        plain = turn(value, steps=5)
    compiles = torch._dynamo.utils.counters["stats"]
    compiles.clear()
    # Five iterations in bfloat16, rounded in other places.
    torch.testing.assert_close(turn(value, steps=5), plain, rtol=0, atol=0.2)
    assert compiles["unique_graphs"] == 1


def test_deepspeed_that_cannot_order_gradients_trains_with_a_warning() -> None:
    wrapper = SimpleNamespace(bit16_groups=[], partition_gradients=True)
    with pytest.warns(UserWarning, match="wrong if ranks use different layers"):
        order_reductions(wrapper, torch.nn.Linear(2, 1))
    assert vars(wrapper).keys() == {"bit16_groups", "partition_gradients"}
