"""What only a CUDA device can show; one is enough."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.single import SingleDevice
from tests.harness.accelerators.cases import (
    TRAINING,
    Batch,
    Lab,
    Net,
    check_equal,
    plain,
    regression,
    seeded,
    train_window,
    windows,
)
from tests.harness.accelerators.launches import ROOT, free_port, rank_environment

pytestmark = pytest.mark.gpu

STAGES = [0, 1, 2, 3]


@pytest.fixture
def make() -> Iterator[Any]:
    """Accelerators on the GPU, finished afterwards."""
    with ExitStack() as stack:

        def made(stage: int, accumulate: int = 1, **config: Any) -> Any:
            zero = {"stage": stage, **config.pop("zero_optimization", {})}
            found = DeepSpeedAccelerator(
                {"zero_optimization": zero, **config}, accumulate=accumulate
            )
            assert found.device.type == "cuda"
            stack.callback(found.finish)
            return found

        yield made


def sgd(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Steps that follow the size of the gradient."""
    return {"opt": torch.optim.SGD(model.parameters(), lr=0.05)}


def trained(accelerator: Any, optimizers: Any, data: Any) -> dict[str, Tensor]:
    """Whole weights after a short training."""
    model = seeded(Net)
    model, opts, _ = accelerator.prepare(model, optimizers(model))
    for window in data:
        lab = Lab(0, Path())
        train_window(lab, accelerator, model, opts, regression, window)
    return accelerator.full_state_dict(model)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("config", "rtol", "atol"),
    [
        ({}, 1e-5, 1e-6),
        ({"bf16": {"enabled": True}}, 5e-2, 5e-3),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}}, 2e-2, 2e-3),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 5e-2, 5e-3),
    ],
    ids=["float32", "bf16", "fp16", "autocast"],
)
def test_precision_is_near_plain_torch(
    stage: int, config: dict[str, Any], rtol: float, atol: float, make: Any
) -> None:
    data = windows(1, [1, 2, 2])
    wanted = plain(Net, sgd, regression, data, each_micro=False)
    found = trained(make(stage, 2, **config), sgd, data)
    check_equal(found, wanted, rtol=rtol, atol=atol)


@pytest.mark.parametrize("stage", STAGES)
def test_fp16_overflow_is_skipped_and_counted(stage: int, make: Any) -> None:
    accelerator = make(stage, fp16={"enabled": True, "initial_scale_power": 32})
    found = trained_until_stepped(accelerator)
    assert accelerator.overflows["opt"] > 0
    assert accelerator.steps["opt"] == 1
    assert all(bool(value.isfinite().all()) for value in found.values())


def trained_until_stepped(accelerator: Any) -> dict[str, Tensor]:
    """Weights after the first step that was no overflow."""
    model = seeded(Net)
    model, _, _ = accelerator.prepare(model, sgd(model))
    batch: Batch = accelerator.to_device(windows(1, [1])[0][0][0])
    for _ in range(64):
        with accelerator.optimizing():
            accelerator.backward(regression(model, "opt", batch))
        if accelerator.step():
            break
    return accelerator.full_state_dict(model)


@pytest.mark.parametrize("stage", STAGES)
def test_fused_adam_of_the_config_trains(stage: int, make: Any) -> None:
    data = windows(1, [1, 1])
    params = {"lr": 1e-2, "weight_decay": 0.0}
    accelerator = make(stage, optimizer={"type": "AdamW", "params": params})
    model = seeded(Net)
    model, opts, _ = accelerator.prepare(model, {})
    for window in data:
        train_window(Lab(0, Path()), accelerator, model, opts, regression, window)

    def adam(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"opt": torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)}

    wanted = plain(Net, adam, regression, data, each_micro=False)
    check_equal(accelerator.full_state_dict(model), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_to_the_cpu_trains(stage: int, make: Any) -> None:
    data = windows(1, [1, 2])
    zero = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    found = trained(make(stage, 2, zero_optimization=zero), sgd, data)
    wanted = plain(Net, sgd, regression, data, each_micro=False)
    check_equal(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "saved_in_an_open_window_goes_on_bit_for_bit",
        "model_stays_the_users_object_and_is_plain_afterwards",
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_contract_on_the_gpu(name: str, stage: int, tmp_path: Path) -> None:
    class OnGpu(Lab):
        def make(self, accumulate: int = 1, **config: Any) -> Any:
            zero = {"zero_optimization": {"stage": stage}}
            return DeepSpeedAccelerator(zero | config, accumulate=accumulate)

    TRAINING[name](OnGpu(stage=stage, folder=tmp_path))


def test_whole_weights_come_back_on_the_cpu(make: Any) -> None:
    accelerator = make(3, bf16={"enabled": True})
    model = seeded(Net)
    accelerator.prepare(model, sgd(model))
    assert next(model.parameters()).device.type == "cuda"
    found = accelerator.full_state_dict(model)
    assert {value.device.type for value in found.values()} == {"cpu"}
    accelerator.finish()
    assert {param.device.type for param in model.parameters()} == {"cpu"}


def test_values_travel_by_nccl_and_gloo(make: Any) -> None:
    accelerator = make(0)
    mine = torch.arange(3, device="cuda")
    assert accelerator.gather(mine).device.type == "cuda"
    assert accelerator.reduce(mine.float(), "mean").tolist() == [0.0, 1.0, 2.0]
    assert not accelerator.any(False)


def test_two_ranks_on_one_device_are_refused(tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("there are several devices")
    text = "from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator as A; A({})"
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", text],
            env=rank_environment(rank, 2, port) | {"PYTHONPATH": os.fspath(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks)
    assert "".join(said).count("expected a device for each of 2 ranks, got 1") == 1


def test_one_device_needs_no_engine() -> None:
    found = trained(SingleDevice("cuda"), sgd, windows(1, [1, 2]))
    wanted = plain(Net, sgd, regression, windows(1, [1, 2]), each_micro=False)
    check_equal(found, wanted, rtol=1e-4, atol=1e-5)
