"""Plain attributes and variables: numbers, texts and tensors that a fit changes.

They are those of modules, of the user's own objects, of functions and modules that the code
of the fit names, and of data sets. What cannot be kept is named if it has changed.
"""

from __future__ import annotations

import copy
import marshal
import weakref
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from harness.checkpoint.held.encoding import Memory, address_of, encode, find_memory
from harness.checkpoint.held.search import PASSIVE, Search, list_library_fields
from harness.checkpoint.held.values import (
    CONTAINERS,
    MAX_BYTES,
    MAX_WALKED,
    SCALARS,
    find_obstacle,
    has_plain_items,
    is_compared,
    is_equal,
    is_long,
    is_plain,
    map_items,
    size_of,
)
from harness.pytree import StateDict, is_proxy
from harness.variables import Variables, fields_of, is_function

MAX_COPIED_BYTES = 1 << 20
"""Larger values are not compared with what they were when the fit began: all are kept.

Numbers and texts, whose copies are shallow, are compared as long as they can be kept.
"""

Attributes = dict[str, dict[str, StateDict]]
"""Values by root and path of a module, and by name of the attribute."""

Place = list[int | str]
"""Root, path and name of an attribute, and keys inside of it."""


def copy_attributes(search: Search) -> Attributes:
    """Copy the attributes that a search found, to compare them with later.

    Of large ones that may not belong to the fit, and of large tensors, only what tells a
    change is noted.
    """
    memory = find_memory(search)
    return {
        root: {
            path: {
                name: _copy(value, memory, is_passive=is_passive)
                for name, value in _own_fields(owner, {}, is_passive=is_passive)
                if _is_noted(value, is_passive=is_passive)
            }
            for path, owner in found.items()
            for is_passive in [_is_passive(search, root, path)]
        }
        for root, found in search.owners.items()
    }


def _is_passive(search: Search, root: str, path: str) -> bool:
    """Whether an owner may hold data, or what has nothing to do with the fit."""
    return root in PASSIVE or (root, path) in search.foreign


def _is_noted(value: object, *, is_passive: bool) -> bool:
    if type(value) in SCALARS or is_passive or not is_plain(value):
        return True
    return isinstance(value, Tensor) or size_of(value) <= _max_copied(value)


def capture_attributes(
    search: Search, before: Attributes
) -> tuple[Attributes, dict[str, str], list[list[Place]]]:
    """Capture the plain attributes that differ from what ``copy_attributes`` returned before.

    Returns
    -------
    attributes; why others are not kept, by name; and places that hold the same object
    """
    states: Attributes = {}
    met: dict[int, list[Place]] = {}
    left_out: dict[str, str] = {}
    memory = find_memory(search)
    for root, owners in search.owners.items():
        for path, owner in owners.items():
            is_passive = _is_passive(search, root, path)
            if is_passive and path not in before.get(root, {}):
                continue  # nothing tells whether it has changed
            old, place = before.get(root, {}).get(path, {}), f"{root}{path}"
            for name, value in _own_fields(owner, old, is_passive=is_passive):
                if name in old and _is_as_before(value, old[name], memory):
                    continue
                why = _find_reason(search, root, path, owner)
                if is_passive and is_long(value):
                    why = why or f"it has more than {MAX_WALKED} items"
                why = why or find_obstacle(value)
                if why:
                    is_whole = (root, path) in search.foreign
                    left_out[place if is_whole else f"{place}.{name}"] = why
                    continue
                found = states.setdefault(root, {}).setdefault(path, {})
                found[name] = encode(value, memory)
                _note_objects(value, [root, path, name], met)
    return states, left_out, [places for places in met.values() if len(places) > 1]


def _note_objects(value: Any, place: Place, met: dict[int, list[Place]]) -> None:
    """Note where lists, dicts and the like are, by their identity."""
    if isinstance(value, list | dict | deque | set | np.ndarray):
        met.setdefault(id(value), []).append(place)
    if isinstance(value, list | dict | deque) and not has_plain_items(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(items):  # a thread may change it meanwhile
            if isinstance(key, int | str):
                _note_objects(item, [*place, key], met)


def list_changed(copied: Attributes, before: Attributes) -> Attributes:
    """Those of two results of ``copy_attributes`` that differ and can be kept."""
    return {
        root: {
            path: {
                name: value
                for name, value in own.items()
                if not isinstance(value, _Mark) and is_plain(value)
                if name not in (old := before.get(root, {}).get(path, {}))
                or not is_equal(value, old[name])
            }
            for path, own in found.items()
        }
        for root, found in copied.items()
    }


def _find_reason(search: Search, root: str, path: str, owner: object) -> str:
    """Why nothing of an owner is kept; empty if its attributes may be."""
    if (root, path) in search.foreign:
        package = type(owner).__module__.partition(".")[0]
        return f"it is a {type(owner).__name__} of {package}, without state_dict"
    is_own = root in search.stateless and not isinstance(owner, nn.Module)
    return "return it in state_dict" if is_own else ""


def _own_fields(
    owner: object, old: Mapping[str, Any], *, is_passive: bool
) -> Iterator[tuple[str, Any]]:
    """Attributes that a checkpoint keeps or reports, without those that clearly did not change."""
    skipped = list_library_fields(owner)
    for name, value in fields_of(owner).items():
        if name in skipped or name.startswith(("ds_", "_ds", "_z3")):  # an engine's
            continue
        if (name in old and _is_clearly_same(value, old[name])) or is_proxy(value):
            continue
        if isinstance(owner, Variables) and is_function(value):
            continue  # code, which decorators and torch replace
        is_known = type(value) in SCALARS or (is_passive and is_long(value))
        if is_known or is_plain(value) or is_compared(value):
            yield name, value


@dataclass(frozen=True, eq=False)
class _Mark:
    """What tells whether a large value has changed, without a copy of it."""

    value: Callable[[], object]
    form: tuple[object, ...]

    @classmethod
    def of(cls, value: Any) -> _Mark:
        if isinstance(value, Tensor | np.ndarray):
            return cls(weakref.ref(value), _form_of(value))
        # A list has no weak references. It is kept as long as the mark.
        return cls(lambda: value, _form_of(value))

    def is_same(self, value: object) -> bool:
        return self.value() is value and self.form == _form_of(value)


def _form_of(value: Any) -> tuple[object, ...]:
    if isinstance(value, Tensor):
        version = None if value.is_inference() else value._version
        return value.data_ptr(), version
    return (len(value),)


def _copy(value: Any, memory: Memory, *, is_passive: bool) -> Any:
    """A copy to compare with later; numbers and texts are not copied one by one."""
    if type(value) in SCALARS:
        return value
    if isinstance(value, Tensor) and address_of(value) in memory:
        return encode(value, memory)
    is_array = isinstance(value, Tensor | np.ndarray)
    if is_passive and is_long(value):
        return _Mark.of(value)
    if (is_array or is_passive) and size_of(value) > _max_copied(value):
        return _Mark.of(value)
    if not is_plain(value):
        return _freeze(value)
    own = encode(value, memory)
    is_flat = type(own) in CONTAINERS and has_plain_items(own)
    return own if is_flat else copy.deepcopy(own)


def _freeze(value: Any) -> Any:
    """A copy to compare with later of what cannot be kept."""
    if type(value) in CONTAINERS:
        return map_items(value, _freeze)
    if isinstance(value, Tensor):
        return value.detach().clone()
    is_changed = isinstance(value, np.ndarray | bytearray | array)
    return copy.copy(value) if is_changed else value


def _is_as_before(value: Any, old: Any, memory: Memory) -> bool:
    """Whether a value is as it was when ``copy_attributes`` returned `old`."""
    if isinstance(value, Iterator):
        return False  # nothing tells where it is
    if isinstance(old, _Mark):
        return old.is_same(value)
    if not is_plain(value):
        return is_equal(value, old)
    return is_equal(encode(value, memory), old)


def _is_clearly_same(value: Any, old: Any) -> bool:
    """Whether a quick look shows that a value is unchanged.

    A save stops training, and code may name large tables that never change.
    """
    if type(value) in SCALARS:
        return type(value) is type(old) and bool(value == old)
    if isinstance(old, _Mark):
        return old.is_same(value)
    if type(value) is not type(old) or type(value) not in CONTAINERS:
        return False
    try:  # version 2 tells types and bits apart, and nothing else
        return marshal.dumps(value, 2) == marshal.dumps(old, 2)
    except ValueError:  # it has other items than plain ones
        return False


def _max_copied(value: object) -> int:
    return MAX_BYTES if has_plain_items(value) else MAX_COPIED_BYTES
