"""Accelerators: one device, or several ranks with DeepSpeed, behind one protocol.

Names are imported on first use: who asks for the launcher's variables does not need torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator
    from harness.accelerators.optimizer_step import default_step_opt
    from harness.accelerators.select import accelerator
    from harness.accelerators.single import SingleDevice

_HOMES = {
    "Accelerator": "base",
    "SingleDevice": "single",
    "accelerator": "select",
    "default_step_opt": "optimizer_step",
}

__all__ = ["Accelerator", "SingleDevice", "accelerator", "default_step_opt"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'harness.accelerators' has no attribute {name!r}")
    home = importlib.import_module(f"harness.accelerators.{_HOMES[name]}")
    value = globals()[name] = getattr(home, name)
    return value
