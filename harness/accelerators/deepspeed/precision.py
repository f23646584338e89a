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

from harness.accelerators.deepspeed.config import PRECISION_KEYS
from harness.accelerators.precision import (
    DTYPES,
    HALVES,
    as_float32,
    check_precision,
    hook_autocast,
)
from harness.checks.model import get_method
from harness.pytree import Options, map_tensors

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
    """Add autocast to a config for a precision; None leaves it as it is."""
    if precision is None:
        return config
    check_precision(precision)
    given = [key for key in PRECISION_KEYS if _is_enabled(config, key)]
    if given:
        msg = f"accelerator(precision): expected no {given[0]!r} in the config too"
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


OWN_METHODS = ("step", "loss", "predict", "backward")
"""Methods of a model that may call its submodules."""


def hook_ends(model: nn.Module, dtype: torch.dtype) -> list[RemovableHandle]:
    """Convert floating inputs of the model to a dtype, and outputs to float32.

    Losses and metrics then have full precision, as under autocast: on a GPU ``MSELoss`` takes
    no 16-bit prediction beside a target in float32. The same holds for submodules with
    weights of that dtype that an own step or loss calls. Returns the hooks.
    """
    called, ends = [model], _EndCasts(model, dtype)
    has_own = any(get_method(model, name) is not None for name in OWN_METHODS)
    if has_own and model._compiled_call_impl is None:
        called += [
            module
            for module in model.modules()
            if module is not model
            and any(p.dtype == dtype for p in module.parameters())
        ]
    is_several, hooks = len(called) > 1, list[RemovableHandle]()
    for module in called:
        hooks.append(module.register_forward_pre_hook(ends.enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(ends.leave, always_call=is_several))
    return hooks


class _EndCasts:
    """Converts inputs and outputs of calls that come from no other module of a model."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._model, self._dtype, self._depth = model, dtype, 0
        self._is_outside, self._outermost = False, {model}

    def enter(self, module: nn.Module, args: object, kwargs: object) -> Any:
        self._depth = 1 if module is self._model else self._depth + 1
        if self._depth > 1:
            return None
        # In the backward pass, activation checkpointing calls any of them again.
        if module is not self._model and torch._C._current_graph_task_id() == -1:
            self._outermost.add(module)
        self._is_outside = module in self._outermost
        if not self._is_outside:
            return None
        return as_dtype(args, self._dtype), as_dtype(kwargs, self._dtype)

    def leave(self, module: nn.Module, args: object, output: object) -> object:
        self._depth = max(0, self._depth - 1)
        is_end = self._depth == 0 and self._is_outside
        return map_tensors(output, as_float32) if is_end else None


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
