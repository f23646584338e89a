"""Choose the accelerator: one device, or many ranks with DeepSpeed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from harness.accelerators.base import Accelerator
from harness.accelerators.distributed.environment import Launch, read_launch
from harness.accelerators.single import SingleDevice
from harness.checks.calls import explain_calls


@explain_calls
def accelerator(
    config: Mapping[str, object] | str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    accumulate: int = 1,
    precision: Literal["fp32", "bf16", "fp16"] | None = None,
    zero_init: bool = False,
) -> Accelerator:
    """Choose the accelerator by how this process was started.

    Parameters
    ----------
    config
        DeepSpeed's own config: a dict or a JSON file, with DeepSpeed's keys. None uses
        DeepSpeed only if a launcher started more than one rank.
    device
        Device of this rank; None takes the best one.
    accumulate : >= 1
        Micro-batches per optimizer step, the same as ``gradient_accumulation_steps`` in a
        config.
    precision
        ``bf16`` or ``fp16``: torch's autocast, with the weights in float32; for ``fp16`` the
        losses are scaled. None: as the config says, else ``fp32``.
    zero_init
        Build the model of a fit under ``deepspeed.zero.Init``: each layer is divided over
        the ranks as soon as it is made, so that no rank ever holds the whole model. Its
        weights are the same. Needs ZeRO 3.

    Returns
    -------
    SingleDevice or DeepSpeedAccelerator

    Raises
    ------
    ValueError, TypeError
        If the arguments contradict each other, or the config cannot be trained with.

    References
    ----------
    luz 0.5.0, ``accelerator``. Differs from luz: DeepSpeed instead of accelerate.
    """
    launch: Launch = read_launch()
    if config is None and launch.world_size == 1 and not zero_init:
        precision = precision or "fp32"
        return SingleDevice(device, accumulate=accumulate, precision=precision)
    from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator  # noqa: PLC0415  slow, and not always installed

    return DeepSpeedAccelerator(
        config,
        device=device,
        accumulate=accumulate,
        precision=precision,
        zero_init=zero_init,
    )
