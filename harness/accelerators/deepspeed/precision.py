"""Hooks that run a model's forward in the precision of DeepSpeed's config."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from harness.pytree import map_tensors

AUTOCAST_DTYPES = {
    "fp16": torch.float16,
    "half": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
"""DeepSpeed's names for the dtypes of ``torch_autocast``, without ``torch.``."""


def make_autocast(
    config: Mapping[str, Any], device: torch.device
) -> AbstractContextManager[object]:
    """Autocast as ``torch_autocast`` in the config describes it; nothing if it is off."""
    auto = config.get("torch_autocast", {})
    if not auto.get("enabled", False):
        return nullcontext()
    name = str(auto.get("dtype", "bfloat16")).removeprefix("torch.")
    return torch.autocast(device.type, AUTOCAST_DTYPES[name])


def hook_precision(
    model: nn.Module,
    engines: Iterable[Any],
    config: Mapping[str, Any],
    device: torch.device,
) -> list[Any]:
    """Run the model's forward in the config's precision; returns the hooks."""
    hooks: list[Any] = []
    if config.get("torch_autocast", {}).get("enabled", False):
        hooks += hook_autocast(model, config, device)
    # All engines of a model have the same dtype.
    engine = next(iter(engines), None)
    if engine is not None:
        dtype = next(iter(engine.module.parameters())).dtype
        if dtype in {torch.bfloat16, torch.float16}:
            hooks.append(hook_inputs(model, dtype))
    return hooks


def hook_autocast(
    model: nn.Module, config: Mapping[str, object], device: torch.device
) -> Any:
    """Run the model's forward under autocast; returns the hooks."""
    entered: list[AbstractContextManager[object]] = []

    def enter(module: nn.Module, args: object) -> None:
        entered.append(make_autocast(config, device))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: object, output: object) -> None:
        entered.pop().__exit__(None, None, None)

    return [
        model.register_forward_pre_hook(enter, prepend=True),
        model.register_forward_hook(leave, always_call=True),
    ]


def hook_inputs(model: nn.Module, dtype: torch.dtype) -> Any:
    """Convert floating inputs of the model's forward to a dtype; returns the hook."""

    def cast(module: nn.Module, args: object, kwargs: object) -> Any:
        return as_dtype(args, dtype), as_dtype(kwargs, dtype)

    return model.register_forward_pre_hook(cast, with_kwargs=True)


def as_dtype(value: object, dtype: torch.dtype) -> Any:
    """Convert the floating tensors of a nested value to a dtype."""
    return map_tensors(value, lambda x: x.to(dtype) if x.is_floating_point() else x)
