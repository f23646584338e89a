"""Accelerators: one device, or many ranks with DeepSpeed, behind one protocol."""

from __future__ import annotations

from harness.accelerators.base import Accelerator, default_step_opt
from harness.accelerators.select import accelerator
from harness.accelerators.single import SingleDevice

__all__ = ["Accelerator", "SingleDevice", "accelerator", "default_step_opt"]
