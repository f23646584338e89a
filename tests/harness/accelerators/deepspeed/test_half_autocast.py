"""float16 under DeepSpeed: clipping, overflows and steps see unscaled gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.deepspeed.config import ConfigFacts
from harness.accelerators.deepspeed.library import import_deepspeed
from tests.harness.accelerators.cases import (
    TRAINING,
    Lab,
    Net,
    check_equal,
    plain,
    regression,
    seeded,
    sgd,
    train_window,
    windows,
)

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


# ---------------------------------------------------------------- weights in float16


@pytest.fixture
def make_weights_in_half(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[int, int], HalfOnCpu]]:
    """Makes accelerators by a ZeRO stage and the power of two of the first scale."""
    found = import_deepspeed().accelerator.get_accelerator()
    dtypes = [torch.float16, *found.supported_dtypes()]
    monkeypatch.setattr(found, "is_fp16_supported", lambda: True, raising=False)
    monkeypatch.setattr(found, "supported_dtypes", lambda: dtypes)
    with ExitStack() as stack:

        def make(stage: int, power: int) -> HalfOnCpu:
            half = {"enabled": True, "initial_scale_power": power, "hysteresis": 1}
            config = {"zero_optimization": {"stage": stage}, "fp16": half}
            found = HalfOnCpu(config, device="cpu", accumulate=2)
            stack.callback(found.finish)
            return found

        yield make


@pytest.mark.parametrize("stage", STAGES)
def test_losses_of_weights_in_half_are_scaled_as_gradients_are_divided(
    stage: int, make_weights_in_half: Callable[[int, int], HalfOnCpu]
) -> None:
    accelerator, data = make_weights_in_half(stage, 8), windows(1, [1, 2, 2])
    model = seeded(Net)
    model, opts, _ = accelerator.prepare(model, sgd(model))
    for window in data:
        train_window(Lab(0, Path()), accelerator, model, opts, regression, window)
    assert accelerator.overflows == {"opt": 0}
    wanted = plain(Net, sgd, regression, data, each_micro=False)
    check_equal(accelerator.full_state_dict(model), wanted, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_overflow_of_weights_in_half_is_skipped_counted_and_ends(
    stage: int,
    make_half: Callable[[int], HalfOnCpu],
    make_weights_in_half: Callable[[int, int], HalfOnCpu],
) -> None:
    # DeepSpeed would keep the autocast of an earlier one, and its scale.
    earlier, model = make_half(stage), seeded(Net)
    earlier.prepare(model, sgd(model))
    earlier.finish()
    accelerator, model = make_weights_in_half(stage, 24), seeded(Net)
    accelerator.prepare(model, sgd(model))
    for _ in range(30):
        with accelerator.optimizing():
            accelerator.backward(regression(model, "opt", batches(1)[0]))
        if accelerator.step():
            break
    assert accelerator.overflows["opt"] > 0
    assert accelerator.steps["opt"] == 1


def test_float64_is_taken_at_zero_3_where_the_processor_computes_in_half(
    make_weights_in_half: object, tmp_path: Path
) -> None:
    TRAINING["float64_equals_plain_torch"](Lab(stage=3, folder=tmp_path))
