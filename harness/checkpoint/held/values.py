"""Plain values: numbers, texts, arrays and tensors, and containers of those.

They are what a checkpoint keeps of attributes and variables.
"""

from __future__ import annotations

import copy
import sys
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from io import IOBase
from itertools import islice
from pathlib import PurePath
from typing import Any
from uuid import UUID

import numpy as np
import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # torch 2.13: no public way

from harness.pytree import as_bytes, can_keep, has_named_factory, has_state, is_proxy
from harness.variables import Cached, Identity, is_function

PLAIN_TYPES = (bool, int, float, complex, str, type(None))
SCALARS = frozenset(PLAIN_TYPES)
"""The same, to look a type up quickly: most attributes are of one of them."""

MAX_BYTES = 1 << 24
"""Larger values are not kept: they may be activations."""

MAX_WALKED = 2000
"""Containers of more items are not searched, if they may be data."""

MAX_COMPARED = 100_000
"""The same for numbers and texts, which are compared fast."""

_MAX_DEPTH = 4
"""How deep containers may be in containers."""

_VALUES = (
    *(complex, bytearray, array, range, PurePath, UUID, Cached, Identity),
    *(date, time, timedelta, Decimal, Fraction),
    *(torch.device, torch.dtype, torch.Size, np.generic),
)
"""Types that a checkpoint cannot hold, and whose values can be compared."""

CONTAINERS = frozenset(
    {list, tuple, dict, deque, set, frozenset, OrderedDict, defaultdict, Counter}
)
_SIMPLE = SCALARS - {complex}
"""Types of numbers and texts, which are not looked at one by one."""

_NUMBER_BYTES = 16
"""What a number or a short text counts as beside the bytes of tensors."""


def is_container(value: object) -> bool:
    """Whether a value is looked at item by item; named tuples and arrays of objects are."""
    return type(value) in CONTAINERS or is_rebuilt(value)


def is_rebuilt(value: object) -> bool:
    """Whether a value is a named tuple or an array of objects, which are made from a list."""
    if isinstance(value, np.ndarray):
        return type(value) is np.ndarray and bool(value.dtype.kind == "O")
    return is_named_tuple(type(value))


def is_named_tuple(kind: type) -> bool:
    """Whether a class is of named tuples."""
    return issubclass(kind, tuple) and hasattr(kind, "_make")


def rebuild(form: Any, items: list[Any]) -> Any:
    """A named tuple of a class, or an array of objects of a shape."""
    if isinstance(form, type):
        return form._make(items)  # type: ignore[attr-defined]
    made = np.empty(len(items), dtype=object)
    for n, item in enumerate(items):  # all at once, NumPy would look into lists
        made[n] = item
    return made.reshape(form)


def form_of(value: Any) -> Any:
    """What ``rebuild`` makes such a value of."""
    return type(value) if isinstance(value, tuple) else value.shape


def is_long(value: object) -> bool:
    """Whether a value has too many items to be looked at one by one."""
    if not is_container(value):
        return False
    waiting, num = [value], 0
    while waiting and num <= MAX_WALKED:
        inner: Any = waiting.pop()
        num += 1
        size = 0
        if is_container(inner):  # an array without dimensions has no length
            size = inner.size if isinstance(inner, np.ndarray) else len(inner)
        if size > MAX_WALKED:
            if size > MAX_COMPARED or not has_plain_items(inner):
                return True
        elif not has_plain_items(inner):
            waiting += list_items(inner)
    return num > MAX_WALKED


def is_compared(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Whether a value cannot be kept, but a change of it can be told."""
    if is_proxy(value):
        return False
    if isinstance(value, Iterator):
        is_alone = depth == _MAX_DEPTH and not isinstance(value, IOBase)
        return is_alone and not has_state(value)
    if isinstance(value, (*_VALUES, Enum)) or is_function(value):
        return True
    if isinstance(value, np.ndarray) and not is_rebuilt(value):
        return bool(value.dtype.kind != "O")
    items = list_items(value)
    if not is_container(value) or not depth or len(items) > MAX_WALKED:
        return False
    return all(is_plain(v) or is_compared(v, depth - 1) for v in items)


def is_trained_leaf(tensor: Tensor) -> bool:
    """Whether a tensor is one that is trained, not one that is computed from others."""
    try:
        return tensor.requires_grad and tensor.is_leaf
    except RuntimeError:  # a view from no_grad of a weight that was changed since
        return False


def is_plain(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Whether a value is a number, text, array or tensor, or a container of those."""
    if type(value) in SCALARS or is_proxy(value):
        return type(value) in _SIMPLE
    if isinstance(value, np.ndarray | np.generic) and not is_rebuilt(value):
        return can_keep(value)
    if isinstance(value, Enum):  # several flags have no name
        return value.name in type(value).__members__ and _is_found(type(value))
    if isinstance(value, (*PLAIN_TYPES, bytes)):
        return not isinstance(value, complex)
    if isinstance(value, Tensor):
        # A leaf that is trained is found as an object. Of any other, such as the state of a
        # recurrent model that the next batch detaches, the numbers are kept.
        if value.is_meta or is_functorch_wrapped_tensor(value):  # it escaped from vmap
            return False  # it has no numbers
        return not is_trained_leaf(value) and can_keep(value)
    return is_container(value) and depth > 0 and _is_plain_container(value, depth)


def _is_plain_container(value: Any, depth: int) -> bool:
    if is_rebuilt(value) and isinstance(value, tuple) and not _is_found(type(value)):
        return False
    if has_plain_items(value):
        return True
    keys = [*value] if isinstance(value, dict) else []
    inner = [own for key in keys for own in walk_items(key)]
    if any(isinstance(own, Enum) or is_rebuilt(own) for own in inner):
        return False  # keys are written as they are
    return all(is_plain(item, depth - 1) for item in list_items(value))


def _is_found(kind: type) -> bool:
    return find_class(name_class(kind)) is kind


def find_obstacle(value: object) -> str:
    """Why a value cannot be kept; empty if it can."""
    if isinstance(value, Iterator):
        return "nothing tells the position of an iterator; keep a count instead"
    if not is_plain(value):
        if isinstance(value, Cached):
            return "it keeps results, which will be computed again"
        if isinstance(value, Identity):
            return f"the fit replaced it by another {type(value.thing).__name__}"
        kind = type(value).__name__
        return (
            f"a checkpoint cannot hold a value of type {kind}; keep a number or a text"
        )
    if size_of(value) > MAX_BYTES:
        return "it has more than 16 MB; make it a buffer"
    inside = islice(walk_items(value), 1, None)
    if any(type(v) is defaultdict and not has_named_factory(v) for v in inside):
        return "a defaultdict in it has your own function; use a dict"
    return ""


def list_items(value: Any) -> list[object]:
    """Keys and values of a dict, or the items of another container; empty for a leaf."""
    if isinstance(value, dict):
        return [*value, *value.values()]
    if type(value) is np.ndarray:
        return value.ravel().tolist() if is_rebuilt(value) else []
    return list(value) if is_container(value) else []


def has_plain_items(value: object) -> bool:
    """Whether a container holds numbers and texts alone, which are not looked at singly."""
    return _SIMPLE.issuperset(map(type, list_items(value)))


def walk_items(value: object) -> Iterator[object]:
    """Yield a value and all that it contains, but not single numbers and texts of many."""
    yield value
    if not has_plain_items(value):
        for item in list_items(value):
            yield from walk_items(item)


def map_items(value: Any, function: Callable[[Any], Any]) -> Any:
    """A plain value with other items, in a new container of the same kind."""
    if is_rebuilt(value):
        return rebuild(form_of(value), [function(item) for item in list_items(value)])
    if type(value) not in CONTAINERS:
        return value
    value = copy.copy(value)  # at once: a thread may change it meanwhile
    if has_plain_items(value):
        return value
    if isinstance(value, dict):
        value.update({key: function(item) for key, item in value.items()})
        return value
    items = [function(item) for item in value]
    return (
        deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)
    )


def size_of(value: object) -> int:
    """Bytes of a plain value, about."""
    size = 0
    for inner in walk_items(value):
        if isinstance(inner, np.ndarray) and not is_rebuilt(inner):
            size += inner.nbytes
        elif isinstance(inner, Tensor):
            size += inner.numel() * inner.element_size()
        else:
            size += _NUMBER_BYTES * len(list_items(inner))
    return size


def is_equal(one: Any, two: Any) -> bool:
    """Whether two plain values are equal, with their types."""
    if isinstance(one, Tensor):
        if not isinstance(two, Tensor) or one.layout != torch.strided:
            return False
        forms = [(own.dtype, own.shape, own.device) for own in (one, two)]
        return forms[0] == forms[1] and torch.equal(as_bytes(one), as_bytes(two))
    if type(one) is not type(two):
        return False
    if isinstance(one, np.ndarray) and not (is_rebuilt(one) and is_rebuilt(two)):
        return bool(np.array_equal(one, two))
    if not is_container(one) or isinstance(one, set | frozenset):
        return bool(one == two)
    items, others = list_items(one), list_items(two)  # of a dict in their order
    if has_plain_items(one):
        return items == others and [*map(type, items)] == [*map(type, others)]
    return len(items) == len(others) and all(map(is_equal, items, others))


def name_class(kind: type) -> str:
    """Name of a class, by which ``find_class`` finds it."""
    return f"{kind.__module__}:{kind.__qualname__}"


def find_class(name: str) -> type[Any] | None:
    """An enum or a named tuple of a module that is imported already; None if there is none."""
    module, _, path = name.partition(":")
    found: object = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    if isinstance(found, type) and (is_named_tuple(found) or issubclass(found, Enum)):
        return found
    return None
