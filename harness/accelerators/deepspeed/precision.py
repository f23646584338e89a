"""The precision that DeepSpeed's config asks for, and hooks that run a forward in it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from harness.accelerators.precision import (
    DTYPES,
    HALVES,
    as_float32,
    check_precision,
    hook_autocast,
)
from harness.pytree import Options, map_tensors

PRECISION_KEYS = ("fp16", "bf16", "bfloat16", "torch_autocast")
"""Keys of DeepSpeed's config, of which one at most is enabled."""

AUTOCAST_DTYPES = {
    "fp16": torch.float16,
    "half": torch.float16,
    "float16": torch.float16,
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
}
"""DeepSpeed's names for the dtypes of ``torch_autocast``, without ``torch.``."""


def find_autocast_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """Dtype of ``torch_autocast`` in the config; None if it is off."""
    auto = config.get("torch_autocast", {})
    if not auto.get("enabled", False):
        return None
    return AUTOCAST_DTYPES[str(auto.get("dtype", "bfloat16")).removeprefix("torch.")]


def name_precision(config: Mapping[str, Any]) -> str:
    """Name the precision that a complete config asks for: fp32, bf16 or fp16."""
    dtype = find_autocast_dtype(config)
    for key, name in (("fp16", "fp16"), ("bf16", "bf16"), ("bfloat16", "bf16")):
        if _is_enabled(config, key) or dtype == DTYPES[name]:
            return name
    return "fp32"


def find_weights_dtype(config: Mapping[str, Any]) -> torch.dtype | None:
    """Dtype to which the config casts the weights; None if it leaves them as they are."""
    name = next((key for key in PRECISION_KEYS[:3] if _is_enabled(config, key)), None)
    return None if name is None else DTYPES["fp16" if name == "fp16" else "bf16"]


def _is_enabled(config: Mapping[str, Any], key: str) -> bool:
    """True if a precision is on; ``"auto"`` leaves it to the caller."""
    section = config.get(key)
    if not isinstance(section, Mapping):  # other kinds are refused later
        return False
    return section.get("enabled", False) not in (False, "auto")


def add_precision(config: Options, precision: str | None) -> Options:
    """Add autocast to a config for a precision; None leaves it as it is.

    Raises
    ------
    ValueError
        If the config already says in which precision to train.
    """
    if precision is None:
        return config
    check_precision(precision)
    given = [key for key in PRECISION_KEYS if _is_enabled(config, key)]
    if given:
        msg = (
            f"accelerator(precision): expected no {given[0]!r} in the config beside it"
        )
        raise ValueError(f"{msg}, got both. Leave one of them out.")
    dtype = DTYPES[precision]
    config = {key: value for key, value in config.items() if key not in PRECISION_KEYS}
    if dtype is None:
        return config
    name = str(dtype).removeprefix("torch.")
    return {**config, "torch_autocast": {"enabled": True, "dtype": name}}


def hook_precision(
    model: nn.Module,
    engines: Iterable[Any],
    config: Mapping[str, Any],
    device: torch.device,
) -> list[RemovableHandle]:
    """Run the model's forward in the config's precision; returns the hooks."""
    hooks: list[RemovableHandle] = []
    autocast = find_autocast_dtype(config)
    if autocast is not None:
        hooks += hook_autocast(model, device, autocast)
    # All engines of a model have the same dtype.
    engine = next(iter(engines), None)
    if engine is not None:
        dtype = next(iter(engine.module.parameters())).dtype
        if dtype in HALVES:
            hooks += hook_ends(model, dtype)
            hooks += hook_batch_norms(model)
    return hooks


def hook_ends(model: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Convert floating inputs of the model's forward to a dtype, and outputs to float32.

    Losses and metrics then have full precision, as under autocast: on a GPU ``MSELoss`` takes
    no 16-bit prediction beside a target in float32. Returns the hooks.
    """

    def cast(module: nn.Module, args: object, kwargs: object) -> Any:
        return as_dtype(args, dtype), as_dtype(kwargs, dtype)

    def uncast(module: nn.Module, args: object, output: object) -> object:
        return map_tensors(output, as_float32)

    return [
        model.register_forward_pre_hook(cast, with_kwargs=True),
        model.register_forward_hook(uncast),
    ]


class _FullBatchNorm(TorchFunctionMode):
    """Normalizes batches with weights in float32, as the running statistics are."""

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func is nn.functional.batch_norm:
            # torch 2.13 names these two when it asks.
            weights = {name: kwargs[name] for name in ("weight", "bias")}
            kwargs |= {
                name: None if value is None else value.float()
                for name, value in weights.items()
            }
        return func(*args, **kwargs)


def hook_batch_norms(model: nn.Module) -> list[RemovableHandle]:
    """Let batch norms with 16-bit weights keep float32 statistics; returns the hooks.

    torch has no kernel for this pair: the weights are cast for the call.
    """
    hooks: list[RemovableHandle] = []
    for module in model.modules():
        if not isinstance(module, _BatchNorm) or module.running_mean is None:
            continue
        if module.running_mean.dtype != torch.float32:
            continue
        mode = _FullBatchNorm()
        hooks.append(module.register_forward_pre_hook(partial(_enter, mode)))
        leave = partial(_leave, mode)
        hooks.append(module.register_forward_hook(leave, always_call=True))
    return hooks


def _enter(mode: TorchFunctionMode, *_: object) -> None:
    mode.__enter__()  # type: ignore[no-untyped-call]


def _leave(mode: TorchFunctionMode, *_: object) -> None:
    mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def as_dtype(value: object, dtype: torch.dtype) -> Any:
    """Convert the floating tensors of a nested value to a dtype."""
    return map_tensors(value, lambda x: x.to(dtype) if x.is_floating_point() else x)
