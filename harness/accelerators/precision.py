"""Mixed precision: autocast in the forward, and scaled losses for float16."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from harness.accelerators.base import StepOpt, list_parameters
from harness.events import nearest
from harness.pytree import StateDict, map_tensors

DTYPES: Final[dict[str, torch.dtype | None]] = {
    "fp32": None,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""Dtype of autocast by precision; None: no autocast."""

HALVES: Final = frozenset({torch.bfloat16, torch.float16})


def check_precision(precision: object) -> str:
    """The precision, if it is the name of one."""
    if isinstance(precision, str) and precision in DTYPES:
        return precision
    names = list(DTYPES)
    guess = nearest(precision, names) if isinstance(precision, str) else ""
    msg = f"accelerator(precision): expected one of {names}, got {precision!r}."
    raise ValueError(f"{msg}{guess} The weights stay in float32 in each of them.")


def make_autocast(
    device: torch.device, dtype: torch.dtype | None
) -> AbstractContextManager[object]:
    """Autocast to a dtype; nothing for None."""
    if dtype is None:
        return nullcontext()
    return torch.autocast(device.type, dtype)


def hook_autocast(
    model: nn.Module, device: torch.device, dtype: torch.dtype
) -> list[RemovableHandle]:
    """Run the model's forward under autocast and return its output in float32.

    What is computed from the output (losses, metrics, arrays) then has full precision.
    """
    entered: list[AbstractContextManager[object]] = []

    def enter(module: nn.Module, args: object) -> None:
        entered.append(make_autocast(device, dtype))
        entered[-1].__enter__()

    def leave(module: nn.Module, args: object, output: object) -> object:
        entered.pop().__exit__(None, None, None)
        return map_tensors(output, as_float32)

    return [
        model.register_forward_pre_hook(_untraced(enter), prepend=True),
        model.register_forward_hook(_untraced(leave), always_call=True),
    ]


def _untraced(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Keep ``torch.compile``, if it is in use, from compiling a hook again at each call."""
    if "torch._dynamo" not in sys.modules:  # which takes a second to import
        return hook
    return torch.compiler.disable(hook)  # type: ignore[no-any-return, no-untyped-call]


def as_float32(tensor: Tensor) -> Tensor:
    """The tensor; in float32 if it has half of that precision."""
    return tensor.float() if tensor.dtype in HALVES else tensor


class LossScaler:
    """Scales the losses of one optimizer, so that small gradients survive in float16.

    It is torch's ``GradScaler``, with which a user's own function may step the optimizer.
    """

    def __init__(self, device: torch.device) -> None:
        self._scaler = torch.amp.GradScaler(device.type)
        self._target: _Target | None = None

    def scale(self, loss: Tensor) -> Tensor:
        """The loss times the scale."""
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    def unscale(self, opt: torch.optim.Optimizer) -> None:
        """Divide the gradients of a complete window by the scale, once."""
        if self._target is None and _has_gradient(opt):
            self._target = _Target(opt)
            self._scaler.unscale_(self._target)  # type: ignore[arg-type]  # duck-typed

    def step(self, opt: torch.optim.Optimizer, step_opt: StepOpt) -> bool:
        """Step, unless a gradient overflowed; True if it stepped. Adapts the scale."""
        self.unscale(opt)
        target, self._target = self._target, None
        if target is None:  # nothing to scale
            step_opt(opt)
            return True
        target.step_opt = step_opt
        self._scaler.step(target)  # type: ignore[arg-type]  # duck-typed
        self._scaler.update()
        return target.is_stepped

    def drop(self) -> None:
        """Forget a window that is not stepped."""
        if self._target is not None:
            self._target = None
            self._scaler.update(self._scaler.get_scale())

    def state_dict(self) -> StateDict:
        """The scale, and the steps since it last changed."""
        return dict(self._scaler.state_dict())

    def load_state_dict(self, state: StateDict) -> None:
        """Restore what ``state_dict`` returned."""
        self._scaler.load_state_dict(state)


class _Target:
    """What a ``GradScaler`` sees in place of the optimizer in one window.

    Optimizers that take the scale themselves count skipped steps; this one has no such
    option, so torch does not call it where a gradient overflowed.
    """

    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self._opt = opt
        self.param_groups = opt.param_groups
        self.step_opt: StepOpt | None = None
        self.is_stepped = False

    def step(self) -> None:
        """Step the optimizer as the user wants."""
        assert self.step_opt is not None
        self.is_stepped = True
        self.step_opt(self._opt)


def _has_gradient(opt: torch.optim.Optimizer) -> bool:
    return any(param.grad is not None for param in list_parameters(opt))
