"""float16 autocast under DeepSpeed: clipping and overflows see unscaled gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.deepspeed.config import ConfigFacts
from tests.harness.accelerators.cases import Net, regression, seeded, windows

STAGES = [0, 1, 2, 3]
MAX_NORM = 0.5


class HalfOnCpu(DeepSpeedAccelerator):
    """On the CPU, where float16 is refused because it is slow; torch can do it."""

    def _collect_facts(self, **facts: Any) -> ConfigFacts:
        return replace(super()._collect_facts(**facts), device="cuda")


@pytest.fixture
def make_half() -> Iterator[Callable[[int], HalfOnCpu]]:
    """Makes accelerators at a ZeRO stage; they are finished afterwards."""
    with ExitStack() as stack:

        def make(stage: int) -> HalfOnCpu:
            config = {"zero_optimization": {"stage": stage}}
            found = HalfOnCpu(config, device="cpu", precision="fp16")
            stack.callback(found.finish)
            return found

        yield make


def two_groups(model: Any, fused: bool) -> torch.optim.Optimizer:
    """A step that shows the size of each gradient; ZeRO steps each group by itself."""
    groups = [
        {"params": list(model.body.parameters())},
        {"params": list(model.head.parameters()), "lr": 0.2},
    ]
    return torch.optim.SGD(groups, lr=0.5, fused=fused)


def batches(count: int) -> list[Any]:
    return [window[0][0] for window in windows(1, [1] * count)]


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("stage", STAGES)
def test_clipping_sees_gradients_without_the_scale(
    stage: int, fused: bool, make_half: Callable[[int], HalfOnCpu]
) -> None:
    accelerator, model = make_half(stage), seeded(Net)
    accelerator.prepare(model, {"opt": two_groups(model, fused)})
    wanted = seeded(Net)
    opt = two_groups(wanted, fused=False)
    for batch in batches(3):
        for _ in range(30):  # overflows lower the scale first
            with accelerator.optimizing():
                accelerator.backward(regression(model, "opt", batch))
            norm = accelerator.clip(MAX_NORM)
            if accelerator.step():
                break
        with torch.autocast("cpu", torch.float16):
            regression(wanted, "opt", batch).backward()  # type: ignore[no-untyped-call]
        exact = nn.utils.clip_grad_norm_(wanted.parameters(), MAX_NORM)
        assert exact > MAX_NORM
        opt.step()
        opt.zero_grad()
        torch.testing.assert_close(norm, exact, rtol=1e-2, atol=0)
    found = accelerator.full_state_dict(model)
    torch.testing.assert_close(found, wanted.state_dict(), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("stage", STAGES)
def test_overflow_is_no_step_and_lowers_the_scale(
    stage: int, fused: bool, make_half: Callable[[int], HalfOnCpu]
) -> None:
    accelerator, model = make_half(stage), seeded(Net)
    accelerator.prepare(model, {"opt": two_groups(model, fused)})
    before: dict[str, Tensor] = accelerator.full_state_dict(model)
    ((batch),) = batches(1)
    for tried in range(30):
        with accelerator.optimizing():
            accelerator.backward(regression(model, "opt", batch) * 1000)
        if accelerator.step():
            break
        assert accelerator.overflows["opt"] == tried + 1
        now = accelerator.full_state_dict(model)
        torch.testing.assert_close(now, before, rtol=0, atol=0)
    assert tried > 0
    assert accelerator.steps["opt"] == 1
    found = accelerator.full_state_dict(model)
    assert all(bool(value.isfinite().all()) for value in found.values())
