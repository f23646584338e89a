"""Plain attributes of modules: numbers, texts and tensors that a model changes in training.

Those of the user's own objects that a module holds, such as a buffer of games, are kept too.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # torch 2.13: no public way

from harness.checkpoint.search import (
    PLAIN_TYPES,
    SCALARS,
    Search,
    is_trained_leaf,
    list_library_fields,
)
from harness.pytree import StateDict, has_named_factory
from harness.reshard.consolidated import copy_into

MAX_COPIED_BYTES = 1 << 20
"""Larger values are not compared with what they were when the fit began: all are kept.

Numbers and texts, whose copies are shallow, are compared as long as they can be kept.
"""

MAX_BYTES = 1 << 24
"""Still larger ones are not kept: they may be activations."""

Attributes = dict[str, dict[str, StateDict]]
"""Values by root and path of a module, and by name of the attribute."""

_CONTAINERS = frozenset(
    {list, tuple, dict, deque, set, frozenset, OrderedDict, defaultdict, Counter}
)
_SIMPLE = SCALARS - {complex}
"""Types of numbers and texts, which are not looked at one by one."""

_NUMBER_BYTES = 16
"""What a number or a short text counts as beside the bytes of tensors."""


def copy_attributes(search: Search) -> Attributes:
    """Copy the plain attributes of the modules that a search found."""
    return {
        root: {
            path: {
                name: _copy(value)
                for name, value in _plain_fields(owner)
                if type(value) in SCALARS or _size_of(value) <= _max_copied(value)
            }
            for path, owner in found.items()
        }
        for root, found in search.owners.items()
    }


def capture_attributes(
    search: Search, before: Attributes
) -> tuple[Attributes, dict[str, str]]:
    """Capture the plain attributes that differ from what ``copy_attributes`` returned before.

    Returns
    -------
    attributes, and why others are not kept, by name
    """
    states: Attributes = {}
    left_out: dict[str, str] = {}
    memory = _memory_of(search)
    for root, owners in search.owners.items():
        for path, owner in owners.items():
            is_own = root in search.stateless and not isinstance(owner, nn.Module)
            advice = "return it in state_dict" if is_own else ""
            old = before.get(root, {}).get(path, {})
            for name, value in _plain_fields(owner):
                if name in old and _is_equal(value, old[name]):
                    continue
                if any(_address(tensor) in memory for tensor in _tensors_of(value)):
                    continue
                why = advice or _find_obstacle(value)
                if why:
                    left_out[f"{root}{path}.{name}"] = why
                    continue
                found = states.setdefault(root, {}).setdefault(path, {})
                found[name] = _detach(value)
    return states, left_out


def restore_attributes(search: Search, saved: Attributes, device: torch.device) -> None:
    """Restore what ``capture_attributes`` returned; new tensors go to the device."""
    memory = _memory_of(search)
    for root, owners in saved.items():
        for path, fields in owners.items():
            owner = search.owners.get(root, {}).get(path)
            for name, value in fields.items() if owner is not None else ():
                moved = _map(value, lambda tensor: tensor.to(device))
                if not _copy_into(vars(owner).get(name), moved, memory):
                    vars(owner)[name] = moved


def _copy_into(live: object, value: Any, memory: set[int]) -> bool:
    """Put a value into the live object of the same form, which others may hold.

    Parameters
    ----------
    memory
        Addresses of parameters and buffers, of which a live tensor may be a view.
    """
    if isinstance(live, deque) and isinstance(value, deque):
        live.clear()
        live.extend(value)
        return True
    if type(live) in {OrderedDict, defaultdict} and isinstance(value, dict):
        live.clear()  # type: ignore[attr-defined]
        live.update(value)  # type: ignore[attr-defined]
        return True
    if not isinstance(live, Tensor) or not isinstance(value, Tensor):
        return False
    is_alike = live.shape == value.shape and live.dtype == value.dtype
    if not is_alike or _address(live) in memory or not live.is_leaf:
        return False
    with torch.no_grad():
        copy_into(live, value)
    return True


def _plain_fields(owner: object) -> Iterator[tuple[str, Any]]:
    skipped = list_library_fields(owner)
    for name, value in list(vars(owner).items()):
        if name in skipped or name.startswith(("ds_", "_ds", "_z3")):  # an engine's
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
        # A leaf that is trained is found as an object. Of any other, such as the state of a
        # recurrent model that the next batch detaches, the numbers are kept.
        if value.is_meta or is_functorch_wrapped_tensor(value):  # it escaped from vmap
            return False  # it has no numbers
        return not is_trained_leaf(value)
    if type(value) not in _CONTAINERS or not depth:
        return False
    return _has_plain_items(value) or all(
        _is_plain(item, depth - 1) for item in _items_of(value)
    )


def _items_of(value: Any) -> list[object]:
    """Keys and values of a dict, or the items of another container; empty for a leaf."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    return list(value) if type(value) in _CONTAINERS else []


def _has_plain_items(value: object) -> bool:
    """Whether a container holds numbers and texts alone, which are not looked at singly."""
    return _SIMPLE.issuperset(map(type, _items_of(value)))


def _walk(value: object) -> Iterator[object]:
    """Yield a value and all that it contains, but not single numbers and texts of many."""
    yield value
    if not _has_plain_items(value):
        for item in _items_of(value):
            yield from _walk(item)


def _find_obstacle(value: object) -> str:
    """Why a value cannot be kept; empty if it can."""
    if _size_of(value) > MAX_BYTES:
        return "it has more than 16 MB; make it a buffer"
    inside = islice(_walk(value), 1, None)
    if any(type(v) is defaultdict and not has_named_factory(v) for v in inside):
        return "a defaultdict in it has your own function; use a dict"
    return ""


def _tensors_of(value: object) -> list[Tensor]:
    return [inner for inner in _walk(value) if isinstance(inner, Tensor)]


def _memory_of(search: Search) -> set[int]:
    """Addresses of the memory of parameters and buffers, which other parts save."""
    tensors = [
        tensor
        for owners in search.owners.values()
        for owner in owners.values()
        if isinstance(owner, nn.Module)
        for tensor in (*owner._parameters.values(), *owner._buffers.values())
    ]
    return {_address(tensor) for tensor in tensors if tensor is not None} - {0}


def _address(tensor: Tensor) -> int:
    """Address of a tensor's memory; 0 if it has none, or no single one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse tensors and the like
        return 0


def _map(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A plain value with other tensors, in containers of the same kinds."""
    if isinstance(value, Tensor):
        return function(value)
    if _has_plain_items(value):
        return value
    if isinstance(value, dict):
        changed = copy.copy(value)
        changed.update({key: _map(item, function) for key, item in value.items()})
        return changed
    items = [_map(item, function) for item in value]
    return (
        deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)
    )


def _detach(value: object) -> Any:
    return _map(value, Tensor.detach)


def _copy(value: Any) -> Any:
    """A copy to compare with later; numbers and texts are not copied one by one."""
    if type(value) in SCALARS:
        return value
    is_long = type(value) in _CONTAINERS and _has_plain_items(value)
    return copy.copy(value) if is_long else copy.deepcopy(_detach(value))


def _max_copied(value: object) -> int:
    return MAX_BYTES if _has_plain_items(value) else MAX_COPIED_BYTES


def _size_of(value: object) -> int:
    """Bytes of a plain value, about."""
    size = 0
    for inner in _walk(value):
        if isinstance(inner, np.ndarray):
            size += inner.nbytes
        elif isinstance(inner, Tensor):
            size += inner.numel() * inner.element_size()
        else:
            size += _NUMBER_BYTES * len(_items_of(inner))
    return size


def _is_equal(one: Any, two: Any) -> bool:
    """Whether two plain values are equal, with their types."""
    if isinstance(one, Tensor):
        is_alike = isinstance(two, Tensor) and one.dtype == two.dtype
        return is_alike and one.layout == torch.strided and torch.equal(one, two)
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two))
    if type(one) not in _CONTAINERS or isinstance(one, set | frozenset):
        return bool(one == two)
    items, others = _items_of(one), _items_of(two)  # of a dict in their order
    if _has_plain_items(one):
        return items == others and [*map(type, items)] == [*map(type, others)]
    return len(items) == len(others) and all(map(_is_equal, items, others))
