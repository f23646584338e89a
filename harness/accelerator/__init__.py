"""Accelerators: one device, or many ranks by DeepSpeed, behind one protocol.

``harness.accelerator`` is this package and, called, gives the accelerator for how the
process was started: see ``harness.accelerator.pick.accelerator``.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from harness.accelerator.base import Accelerator, default_step_opt
from harness.accelerator.pick import accelerator
from harness.accelerator.single import SingleDevice

__all__ = ["Accelerator", "SingleDevice", "accelerator", "default_step_opt"]


class _Callable(ModuleType):
    """luz's word for package and function alike; calling the package calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Accelerator:
        return accelerator(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
