"""The first optimizer steps at every ZeRO stage and precision are those of plain torch.

DeepSpeed 0.19.8 changes some optimizers while it initializes: it steps those of 16-bit
weights at ZeRO 0, and replaces Adagrad at ZeRO 1 to 3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.deepspeed.library import keep_optimizers
from tests.harness.accelerators.cases import (
    Lab,
    Net,
    regression,
    seeded,
    train_window,
    windows,
)

PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": {"enabled": True}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5),
    "SGD": lambda groups: torch.optim.SGD(
        groups, lr=0.1, momentum=0.9, weight_decay=0.5
    ),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=0.1, weight_decay=0.5),
    "Adagrad": lambda groups: torch.optim.Adagrad(
        groups, lr=0.1, weight_decay=0.5, initial_accumulator_value=0.1
    ),
}


def two_groups(name: str, model: Any) -> torch.optim.Optimizer:
    """The optimizer with a learning rate for each of two groups."""
    groups = [
        {"params": list(model.body.parameters())},
        {"params": list(model.head.parameters()), "lr": 0.02},
    ]
    return OPTIMIZERS[name](groups)


def trained_by(
    accelerator: DeepSpeedAccelerator, build: Callable[[nn.Module], Mapping[str, Any]]
) -> dict[str, Tensor]:
    """Whole weights after three steps."""
    model = seeded(Net)
    model, opts, _ = accelerator.prepare(model, build(model))
    for window in windows(1, [1, 1, 1]):
        train_window(Lab(0, Path()), accelerator, model, opts, regression, window)
    return accelerator.full_state_dict(model)


def trained_by_torch(
    precision: str, build: Callable[[nn.Module], torch.optim.Optimizer]
) -> dict[str, Tensor]:
    """Whole weights after three steps of plain torch, bf16 with masters in float32."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = seeded(Net).to(dtype)
    master_weights = seeded(Net).to(dtype).float()
    opt = build(master_weights)
    pairs = list(zip(master_weights.parameters(), model.parameters(), strict=True))
    for ((x, y),) in (window[0] for window in windows(1, [1, 1, 1])):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            loss = regression(model, "opt", (x.to(dtype), y))
        for (master, _), grad in zip(
            pairs, torch.autograd.grad(loss, list(model.parameters())), strict=True
        ):
            # DeepSpeed keeps gradients in bfloat16 under autocast.
            is_cast = precision == "autocast"
            master.grad = (grad.bfloat16() if is_cast else grad).float()
        opt.step()
        with torch.no_grad():
            for master, weight in pairs:
                weight.copy_(master)
    return master_weights.state_dict()


@pytest.mark.parametrize(
    ("precision", "name"),
    [
        *((precision, "AdamW") for precision in PRECISIONS),
        *(("bf16", name) for name in OPTIMIZERS if name != "AdamW"),
        ("float32", "Adagrad"),
    ],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_first_steps_equal_plain_torch(
    stage: int, precision: str, name: str, make: Any
) -> None:
    accelerator = make(stage, **PRECISIONS[precision])
    found = trained_by(accelerator, lambda model: {"opt": two_groups(name, model)})
    wanted = trained_by_torch(precision, lambda model: two_groups(name, model))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, 1])
def test_first_steps_of_an_optimizer_of_the_config_equal_plain_torch(
    stage: int, make: Any
) -> None:
    params = {"lr": 0.1, "weight_decay": 0.5, "torch_adam": True}
    config = {"optimizer": {"type": "AdamW", "params": params}}
    found = trained_by(make(stage, **PRECISIONS["bf16"], **config), lambda model: {})
    wanted = trained_by_torch(
        "bf16",
        lambda model: torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5),
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_hooks_of_the_user_run_at_each_step_and_at_no_other_time(
    stage: int, make: Any
) -> None:
    calls: list[str] = []

    def hooked(model: nn.Module) -> Mapping[str, Any]:
        opt = two_groups("Adagrad", model)
        opt.register_step_pre_hook(lambda *_: calls.append("before"))
        opt.register_step_post_hook(lambda *_: calls.append("after"))
        return {"opt": opt}

    trained_by(make(stage, **PRECISIONS["bf16"]), hooked)
    # With ZeRO, DeepSpeed steps each of the two groups by itself.
    assert calls == ["before", "after"] * 3 * (2 if stage else 1)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_has_no_state_before_its_first_step(name: str, make: Any) -> None:
    accelerator = make(0, **PRECISIONS["bf16"])
    model = seeded(Net)
    _, opts, _ = accelerator.prepare(model, {"opt": two_groups(name, model)})
    # Adagrad makes its state in its constructor.
    own = two_groups(name, seeded(Net)).state
    found = list(opts["opt"].state.values())
    torch.testing.assert_close(found, list(own.values()), rtol=0, atol=0)


def test_step_of_an_optimizer_while_deepspeed_initializes_is_refused() -> None:
    opt = two_groups("AdamW", Net())
    with (
        pytest.raises(RuntimeError, match=r"expected no step.*got one of AdamW"),
        keep_optimizers(),
    ):
        opt.step()
    opt.step()
