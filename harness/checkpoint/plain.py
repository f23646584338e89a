"""Plain attributes of modules: numbers, texts and tensors that a model changes in training."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from harness.checkpoint.search import (
    MAX_ITEMS,
    MODULE_FIELDS,
    PLAIN_TYPES,
    SCALARS,
    Search,
)
from harness.pytree import StateDict, iter_tensors, map_tensors
from harness.reshard.consolidated import copy_into

MAX_COPIED_BYTES = 1 << 20
"""Larger tensors are not compared with what they were when the fit began: all are kept."""

MAX_BYTES = 1 << 24
"""Still larger ones are not kept: they may be activations."""

CALLBACK = "callback"
"""Path of a callback; those of modules are empty or begin with a dot."""

Fields = dict[str, dict[str, StateDict]]
"""Values by root and path of a module, and by name of the attribute."""


def copy_fields(search: Search) -> Fields:
    """Copy the plain attributes of the modules that a search found."""
    owners: dict[str, dict[str, object]] = {
        root: dict(modules) for root, modules in search.modules.items()
    }
    for root, callback in search.callbacks.items():
        owners[root][CALLBACK] = callback
    return {
        root: {
            path: {
                name: value if type(value) in SCALARS else copy.deepcopy(_detach(value))
                for name, value in _plain_fields(owner)
                if type(value) in SCALARS or _size_of(value) <= MAX_COPIED_BYTES
            }
            for path, owner in found.items()
        }
        for root, found in owners.items()
    }


def capture_fields(search: Search, before: Fields) -> tuple[Fields, dict[str, str]]:
    """Capture the plain attributes that differ from what ``copy_fields`` returned before.

    Returns
    -------
    attributes, and why others are not kept, by name
    """
    states: Fields = {}
    left_out: dict[str, str] = {}
    for root, modules in search.modules.items():
        memory = _memory_of(modules.values())
        for path, module in modules.items():
            old = before.get(root, {}).get(path, {})
            for name, value in _plain_fields(module):
                is_saved = any(_address(t) in memory for t in iter_tensors(value))
                if is_saved or (name in old and _is_equal(value, old[name])):
                    continue
                if _size_of(value) > MAX_BYTES:
                    reason = "it has more than 16 MB; make it a buffer"
                    left_out[f"{root}{path}.{name}"] = reason
                    continue
                found = states.setdefault(root, {}).setdefault(path, {})
                found[name] = _detach(value)
    for root, callback in search.callbacks.items():
        old = before.get(root, {}).get(CALLBACK, {})
        for name, value in _plain_fields(callback):
            if name not in old or not _is_equal(value, old[name]):
                left_out[f"{root}.{name}"] = "return it in state_dict"
    return states, left_out


def restore_fields(search: Search, saved: Fields, device: torch.device) -> None:
    """Restore what ``capture_fields`` returned; new tensors go to the device."""
    for root, modules in saved.items():
        for path, fields in modules.items():
            owner = search.modules.get(root, {}).get(path)
            for name, value in fields.items() if owner is not None else ():
                live = vars(owner).get(name)
                if not _copy_into(live, value):
                    vars(owner)[name] = map_tensors(value, lambda t: t.to(device))


def _copy_into(live: object, value: object) -> bool:
    """Copy a tensor into the live one, which others may hold, if it has the same form."""
    if not isinstance(live, Tensor) or not isinstance(value, Tensor):
        return False
    is_alike = live.shape == value.shape and live.dtype == value.dtype
    if not is_alike or not live.is_leaf:
        return False
    with torch.no_grad():
        copy_into(live, value)
    return True


def _plain_fields(owner: object) -> Iterator[tuple[str, Any]]:
    for name, value in list(vars(owner).items()):
        if name in MODULE_FIELDS or name.startswith(
            ("ds_", "_ds", "_z3")
        ):  # an engine's
            continue
        if _is_plain(value):
            yield name, value


def _is_plain(value: object, depth: int = 4) -> bool:
    """Whether a value is a number, text, array or tensor, or a container of those."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "biuf"
    if isinstance(value, (*PLAIN_TYPES, np.generic)):
        return type(value) is not complex
    if isinstance(value, Tensor):
        # A leaf is found as an object; any other is computed anew from parameters.
        return not value.requires_grad
    if not isinstance(value, list | tuple | dict) or not depth:
        return False
    if type(value) not in {list, tuple, dict} or len(value) > MAX_ITEMS:
        return False
    items = value.values() if isinstance(value, dict) else value
    return all(_is_plain(item, depth - 1) for item in items)


def _memory_of(modules: Iterable[nn.Module]) -> set[int]:
    """Addresses of the memory of parameters and buffers, which other parts save."""
    tensors = [
        tensor
        for module in modules
        for tensor in (*module._parameters.values(), *module._buffers.values())
    ]
    return {_address(tensor) for tensor in tensors if tensor is not None} - {0}


def _address(tensor: Tensor) -> int:
    """Address of a tensor's memory; 0 if it has none, or no single one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors and the like
        return 0


def _detach(value: object) -> Any:
    return map_tensors(value, Tensor.detach)


def _size_of(value: object) -> int:
    if isinstance(value, np.ndarray):
        return value.nbytes
    return sum(tensor.numel() * tensor.element_size() for tensor in iter_tensors(value))


def _is_equal(one: Any, two: Any) -> bool:
    """Whether two plain values are equal, with their types."""
    if isinstance(one, Tensor):
        is_alike = isinstance(two, Tensor) and one.dtype == two.dtype
        return is_alike and one.layout == torch.strided and torch.equal(one, two)
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_is_equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(_is_equal, one, two))
    return bool(one == two)
