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


def is_long(value: object) -> bool:
    """Whether a value has too many items to be looked at one by one."""
    if type(value) not in CONTAINERS:
        return False
    waiting, num = [value], 0
    while waiting and num <= MAX_WALKED:
        inner: Any = waiting.pop()
        num += 1
        if type(inner) in CONTAINERS and len(inner) > MAX_WALKED:
            if len(inner) > MAX_COMPARED or not has_plain_items(inner):
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
    if isinstance(value, np.ndarray):
        return bool(value.dtype.kind != "O")
    items = list_items(value)
    if type(value) not in CONTAINERS or not depth or len(items) > MAX_WALKED:
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
    if isinstance(value, np.ndarray | np.generic):
        return can_keep(value)
    if isinstance(value, Enum):
        is_member = value.name in type(value).__members__  # not several flags
        return is_member and find_enum(name_enum(type(value))) is type(value)
    if isinstance(value, (*PLAIN_TYPES, bytes)):
        return not isinstance(value, complex)
    if isinstance(value, Tensor):
        # A leaf that is trained is found as an object. Of any other, such as the state of a
        # recurrent model that the next batch detaches, the numbers are kept.
        if value.is_meta or is_functorch_wrapped_tensor(value):  # it escaped from vmap
            return False  # it has no numbers
        return not is_trained_leaf(value) and can_keep(value)
    if type(value) not in CONTAINERS or not depth:
        return False
    if has_plain_items(value):
        return True
    keys = [*value] if isinstance(value, dict) else []
    if any(isinstance(own, Enum) for key in keys for own in walk_items(key)):
        return False  # keys are written as they are
    return all(is_plain(item, depth - 1) for item in list_items(value))


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
    return list(value) if type(value) in CONTAINERS else []


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
        if isinstance(inner, np.ndarray):
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
    if isinstance(one, np.ndarray):
        return bool(np.array_equal(one, two))
    if type(one) not in CONTAINERS or isinstance(one, set | frozenset):
        return bool(one == two)
    items, others = list_items(one), list_items(two)  # of a dict in their order
    if has_plain_items(one):
        return items == others and [*map(type, items)] == [*map(type, others)]
    return len(items) == len(others) and all(map(is_equal, items, others))


def name_enum(kind: type) -> str:
    """Name of an enum, by which ``find_enum`` finds it."""
    return f"{kind.__module__}:{kind.__qualname__}"


def find_enum(name: str) -> type[Enum] | None:
    """An enum of a module that is imported already; None if there is none."""
    module, _, path = name.partition(":")
    found: object = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) and issubclass(found, Enum) else None
