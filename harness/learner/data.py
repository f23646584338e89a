"""Loaders of a fit, and the random numbers that its split is drawn with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeGuard

import torch
from torch import Tensor

from harness.accelerators.base import Accelerator
from harness.checkpoint.resume import Resume
from harness.data.loaders import (
    Data,
    Loader,
    get_device_options,
    make_eval_loader,
    make_train_loader,
    split_data,
    without_order,
)
from harness.data.valid_sets import name_sets


def is_fraction(valid_data: object) -> TypeGuard[float]:
    """Whether validation data are a share of the training data."""
    return isinstance(valid_data, float | int) and not isinstance(valid_data, bool)


def restore_split_state(resume: Resume | None, accelerator: Accelerator) -> Tensor:
    """Return torch's random state for a split; a resumed fit draws its split again."""
    if resume is not None and resume.is_exact:
        resume.restore_split_state(accelerator)
    return torch.get_rng_state()


def build_loaders(
    data: Data,
    valid_data: Data,
    options: Mapping[str, object] | None,
    accelerator: Accelerator,
) -> tuple[Loader, dict[str, Loader]]:
    """Return the loaders of training and validation data; a fraction splits `data`."""
    if is_fraction(valid_data):
        for name in {"sampler", "batch_sampler"} & set(options or {}):
            msg = f"dataloader_options({name}): expected validation data of their own"
            got = f"got valid_data={valid_data}, which numbers the rows anew"
            raise ValueError(f"{msg}, {got}. Split the data yourself.")
        data, valid_data = split_data(data, valid_data)
    like = get_device_options(accelerator.device)
    train = make_train_loader(data, options, accelerator.world_size, like)
    sets, loaders = name_sets(valid_data, "valid_data", data), {}
    for name, own in sets.items():
        place = "valid_data" if own is valid_data else f"valid_data[{name!r}]"
        loaders[name] = make_eval_loader(own, without_order(options), place, like)
    return train, loaders
