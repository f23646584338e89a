"""Accelerators: one device, or many ranks by DeepSpeed, behind one protocol."""

from __future__ import annotations

from harness.accelerator.base import Accelerator, default_step_opt
from harness.accelerator.single import SingleDevice

__all__ = ["Accelerator", "SingleDevice", "default_step_opt"]
