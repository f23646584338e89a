"""Which accelerator serves: one device, or DeepSpeed over many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from harness.accelerators.base import Accelerator
from harness.accelerators.distributed.environment import Launch, read_launch
from harness.accelerators.single import SingleDevice


def accelerator(
    config: Mapping[str, object] | str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    accumulate: int = 1,
) -> Accelerator:
    """The accelerator for how this process was started.

    Parameters
    ----------
    config
        DeepSpeed's own config, a dict or a JSON file, in DeepSpeed's words; None: DeepSpeed
        only where a launcher started more than one rank.
    device
        Device of this rank; None: the best there is.
    accumulate : >= 1
        Micro-batches to an optimizer step; with a config ``gradient_accumulation_steps``
        says it.

    Returns
    -------
    SingleDevice or DeepSpeedAccelerator

    References
    ----------
    luz 0.5.0, ``accelerator``. Differs from luz: DeepSpeed instead of accelerate.
    """
    launch: Launch = read_launch()
    if config is None and launch.world_size == 1:
        return SingleDevice(device, accumulate=accumulate)
    from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator  # noqa: PLC0415  slow, and not everywhere

    return DeepSpeedAccelerator(config, device=device, accumulate=accumulate)
