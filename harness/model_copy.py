"""Copy a model that something else holds, so that a fit trains its own."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook


def build_unshared(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model, and copy it if it or a part of it belongs to somebody else.

    Parameters
    ----------
    build
        Returns a model. Parts with parameters that it does not make itself, and that
        something else refers to, belong to somebody else.
    """
    new: set[tuple[int, str]] = set()
    handle = register_module_parameter_registration_hook(
        lambda module, name, param: new.add((id(module), name))
    )
    try:
        made = [build()]
    finally:
        handle.remove()
    is_new = all(
        (id(module), name) in new
        for module in made[0].modules()
        for name, param in module._parameters.items()
        if param is not None
    )
    if is_new or not _has_other_references(made):
        return made[0]
    return copy_model(made[0])


def copy_model(model: nn.Module) -> nn.Module:
    """Copy a model that somebody else holds."""
    msg = "setup(module): expected a new model for each fit, got one that is held"
    advice = "Build the model inside the function."
    try:
        copied = copy.deepcopy(model)
    except Exception as error:
        raise TypeError(
            f"{msg} elsewhere and cannot be copied: {error!r}. {advice}"
        ) from error
    pairs = zip(model.parameters(), copied.parameters(), strict=True)
    if any(hasattr(own, "ds_id") > hasattr(other, "ds_id") for own, other in pairs):
        got = "elsewhere and divided by deepspeed.zero.Init"
        raise TypeError(f"{msg} {got}. {advice}")
    return copied


@contextmanager
def keep_buffers(model: nn.Module, mode: str) -> Iterator[None]:
    """Put the buffers back that a prediction in training mode changes, also after an error."""
    if mode == "eval":
        yield
        return
    places = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, kept in places:
            buffer.data = kept
            module._buffers[name] = buffer


def _has_other_references(made: list[nn.Module]) -> bool:
    """Whether a module of a model may be held by something else than the model."""
    counts, fresh = _count_references(made), _count_references(_FRESH)
    return counts[0] > fresh[0] or any(count > fresh[1] for count in counts[1:])


_FRESH: list[nn.Module] = [nn.Sequential(nn.Identity())]
"""A model that nobody else holds, for comparison: counts differ between Pythons."""


def _count_references(made: list[nn.Module]) -> list[int]:
    """References to each module of a model beside those of the modules that contain it."""
    modules = list(made[0].modules())
    inner = Counter(id(child) for m in modules for child in m._modules.values())
    return [
        sys.getrefcount(modules[n]) - inner[id(modules[n])] for n in range(len(modules))
    ]
