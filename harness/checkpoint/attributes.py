"""Plain attributes and variables: numbers, texts and tensors that a fit changes.

They are those of modules, of the user's own objects, of functions and modules that the code
of the fit names, and of data sets. What cannot be kept is named if it has changed.
"""

from __future__ import annotations

import copy
import itertools
import marshal
import sys
import weakref
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
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
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor  # torch 2.13: no public way

from harness.checkpoint.search import (
    PASSIVE,
    PLAIN_TYPES,
    SCALARS,
    Search,
    is_trained_leaf,
    list_library_fields,
)
from harness.pytree import (
    StateDict,
    as_bytes,
    can_keep,
    has_named_factory,
    has_state,
    is_proxy,
)
from harness.reshard.consolidated import copy_into
from harness.variables import (
    Cached,
    Identity,
    Variables,
    fields_of,
    is_function,
    set_field,
)

MAX_COPIED_BYTES = 1 << 20
"""Larger values are not compared with what they were when the fit began: all are kept.

Numbers and texts, whose copies are shallow, are compared as long as they can be kept.
"""

MAX_BYTES = 1 << 24
"""Still larger ones are not kept: they may be activations."""

MAX_WALKED = 2000
"""Containers of more items are not searched, if they may be data."""

MAX_COMPARED = 100_000
"""The same for numbers and texts, which are compared fast."""

_MAX_DEPTH = 4
"""How deep containers may be in containers."""

Attributes = dict[str, dict[str, StateDict]]
"""Values by root and path of a module, and by name of the attribute."""

Place = list[int | str]
"""Root, path and name of an attribute, and keys inside of it."""

Memory = Mapping[int, tuple[str, Tensor]]
"""Name and tensor of each parameter and buffer, by the address of its memory."""

_VALUES = (
    *(complex, bytearray, array, range, PurePath, UUID, Cached, Identity),
    *(date, time, timedelta, Decimal, Fraction),
    *(torch.device, torch.dtype, torch.Size, np.generic),
)
"""Types that a checkpoint cannot hold, and whose values can be compared."""

_CONTAINERS = frozenset(
    {list, tuple, dict, deque, set, frozenset, OrderedDict, defaultdict, Counter}
)
_SIMPLE = SCALARS - {complex}
"""Types of numbers and texts, which are not looked at one by one."""

_NUMBER_BYTES = 16
"""What a number or a short text counts as beside the bytes of tensors."""


def copy_attributes(search: Search) -> Attributes:
    """Copy the attributes that a search found, to compare them with later.

    Of large ones that may not belong to the fit, and of large tensors, only what tells a
    change is noted.
    """
    memory = _memory_of(search)
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
    return isinstance(value, Tensor) or _size_of(value) <= _max_copied(value)


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
    memory = _memory_of(search)
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
                if is_passive and _is_long(value):
                    why = why or f"it has more than {MAX_WALKED} items"
                why = why or _find_obstacle(value)
                if why:
                    is_whole = (root, path) in search.foreign
                    left_out[place if is_whole else f"{place}.{name}"] = why
                    continue
                found = states.setdefault(root, {}).setdefault(path, {})
                found[name] = _detach(value, memory)
                _note_objects(value, [root, path, name], met)
    return states, left_out, [places for places in met.values() if len(places) > 1]


def _note_objects(value: Any, place: Place, met: dict[int, list[Place]]) -> None:
    """Note where lists, dicts and the like are, by their identity."""
    if isinstance(value, list | dict | deque | set | np.ndarray):
        met.setdefault(id(value), []).append(place)
    if isinstance(value, list | dict | deque) and not _has_plain_items(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in list(items):  # a thread may change it meanwhile
            if isinstance(key, int | str):
                _note_objects(item, [*place, key], met)


def _join_objects(
    search: Search, saved: Attributes, same: Iterable[list[Place]]
) -> None:
    """Put one object into all of the restored places that held one."""
    holder: Any
    key: int | str
    for places in same:
        first: object = None
        for root, path, name, *keys in places:
            owner = search.owners.get(str(root), {}).get(str(path))
            own = saved.get(str(root), {}).get(str(path), {})
            if owner is None or name not in own:
                continue
            holder, key = fields_of(owner), name
            try:
                for inner in keys:
                    holder, key = holder[key], inner
                found = holder[key]
            except (KeyError, IndexError, TypeError):  # of another form now
                continue
            if first is None:
                first = found
            elif keys:
                holder[key] = first
            else:
                set_field(owner, str(name), first)


def list_changed(copied: Attributes, before: Attributes) -> Attributes:
    """Those of two results of ``copy_attributes`` that differ and can be kept."""
    return {
        root: {
            path: {
                name: value
                for name, value in own.items()
                if not isinstance(value, _Mark) and is_plain(value)
                if name not in (old := before.get(root, {}).get(path, {}))
                or not _is_equal(value, old[name])
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


def restore_attributes(
    search: Search,
    saved: Attributes,
    device: torch.device,
    same: Iterable[list[Place]] = (),
) -> None:
    """Restore what ``capture_attributes`` returned; new tensors go to the device."""
    memory = _memory_of(search)
    move = _Mover(device, {view: tensor for _, (view, tensor) in memory.items()})
    places = [
        (owner, name, fields_of(owner).get(name), move.map(value))
        for root, owners in saved.items()
        for path, fields in owners.items()
        if (owner := search.owners.get(root, {}).get(path)) is not None
        for name, value in fields.items()
        if name not in list_library_fields(owner)  # engines', in checkpoints of before
    ]
    pairs = [pair for *_, live, value in places for pair in _pair(live, value)]
    is_alike = _compare_sharing(pairs, memory)
    for owner, name, live, value in places:
        set_field(owner, name, _put(live, value, is_alike))
    # Objects may be shared, and were not when saved.
    for owner, name, _, value in places:
        if not _is_equal(fields_of(owner).get(name), value):
            set_field(owner, name, value)
    _join_objects(search, saved, same)


class _Mover:
    """Moves saved values to a device; tensors that share memory share it there.

    Parameters
    ----------
    views
        Parameters and buffers by name, for attributes that are views of them.
    """

    def __init__(self, device: torch.device, views: dict[str, Tensor]) -> None:
        self._device, self._views = device, views
        self._moved: dict[tuple[int, torch.dtype], Tensor] = {}

    def map(self, value: Any) -> Any:
        """The value with its tensors on the device, and views of what they belong to."""
        if isinstance(value, dict) and value.keys() == _VIEW_KEYS:
            own = self._views.get(value[_VIEW])
            if own is None:
                return value
            offset = own.storage_offset() + value["offset"]
            return own.detach().as_strided(value["shape"], value["stride"], offset)
        if isinstance(value, dict) and value.keys() == _MEMBER_KEYS:
            kind = _find_enum(str(value["class"]))
            return value if kind is None else kind.__members__[value[_MEMBER]]
        if isinstance(value, Tensor):
            return self._move(value)
        return _map_items(value, self.map)

    def _move(self, tensor: Tensor) -> Tensor:
        address = _address(tensor)
        if tensor.device == self._device or not address:
            return tensor.to(self._device)
        key = address, tensor.dtype
        if key not in self._moved:
            num = tensor.untyped_storage().nbytes() // tensor.element_size()
            self._moved[key] = tensor.as_strided((num,), (1,), 0).to(self._device)
        form = tensor.shape, tensor.stride(), tensor.storage_offset()
        return self._moved[key].as_strided(*form)


def _pair(live: Any, value: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors at the same place of two plain values."""
    if isinstance(live, Tensor) and isinstance(value, Tensor):
        yield live, value
    elif isinstance(live, dict) and isinstance(value, dict):
        for key in live.keys() & value.keys():
            yield from _pair(live[key], value[key])
    elif _has_plain_items(live):
        return
    elif isinstance(live, list | tuple | deque) and type(live) is type(value):
        for one, two in zip(live, value, strict=False):
            yield from _pair(one, two)


def _compare_sharing(
    pairs: list[tuple[Tensor, Tensor]], memory: Mapping[int, object]
) -> Callable[[Tensor, Tensor], bool]:
    """Return what tells whether a live tensor can take the numbers of a saved one.

    It cannot if the two share their memory with others in different ways.
    """
    places: dict[tuple[str, int], object] = {}
    bad: set[tuple[str, int]] = set()
    for live, value in pairs:
        ours, theirs = ("live", _address(live)), ("saved", _address(value))
        if not (ours[1] and theirs[1]):
            continue
        shift = live.storage_offset() - value.storage_offset()
        is_same = live.shape == value.shape and live.dtype == value.dtype
        one = places.setdefault(ours, (theirs, shift)) == (theirs, shift)
        two = places.setdefault(theirs, (ours, shift)) == (ours, shift)
        if not (one and two and is_same and live.stride() == value.stride()):
            bad |= {ours, theirs}

    def is_alike(live: Tensor, value: Tensor) -> bool:
        ours, theirs = _address(live), _address(value)
        is_free = ("live", ours) not in bad and ("saved", theirs) not in bad
        same = live.shape == value.shape and live.dtype == value.dtype
        return same and is_free and ours not in memory and live.is_leaf

    return is_alike


def _put(live: Any, value: Any, is_alike: Callable[[Tensor, Tensor], bool]) -> Any:
    """Put a value into the live object of the same form, which others may hold.

    Returns
    -------
    the live object, or the value where it cannot take it
    """
    if isinstance(live, Tensor) and isinstance(value, Tensor):
        if not is_alike(live, value):
            return value
        with torch.no_grad():
            copy_into(live, value)
        return live
    if isinstance(live, np.ndarray) and isinstance(value, np.ndarray):
        is_same = live.shape == value.shape and live.dtype == value.dtype
        if not (is_same and live.flags.writeable):
            return value
        live[...] = value
        return live
    is_dict = isinstance(live, dict) and isinstance(value, dict)
    if type(live) not in _CONTAINERS or not (is_dict or type(live) is type(value)):
        return value
    if isinstance(live, dict):  # a defaultdict may have come back without its function
        own = {k: _put(live.get(k), item, is_alike) for k, item in value.items()}
        live.clear()
        live.update(own)
        return live
    if isinstance(live, set):
        live.clear()
        live.update(value)
        return live
    if isinstance(live, frozenset):
        return value
    rest = itertools.chain(live, itertools.repeat(None))
    items = [_put(one, two, is_alike) for one, two in zip(rest, value, strict=False)]
    if isinstance(live, tuple):
        return tuple(items)
    live.clear()
    live.extend(items)
    return live


def _own_fields(
    owner: object, old: Mapping[str, Any], *, is_passive: bool
) -> Iterator[tuple[str, Any]]:
    """Attributes that a checkpoint keeps or reports, without those that clearly did not change."""
    skipped = list_library_fields(owner)
    for name, value in fields_of(owner).items():
        if name in skipped or name.startswith(("ds_", "_ds", "_z3")):  # an engine's
            continue
        if is_proxy(value) or (name in old and _is_clearly_same(value, old[name])):
            continue
        if isinstance(owner, Variables) and is_function(value):
            continue  # code, which decorators and torch replace
        is_known = type(value) in SCALARS or (is_passive and _is_long(value))
        if is_known or is_plain(value) or _is_compared(value):
            yield name, value


def _is_long(value: object) -> bool:
    """Whether a value has too many items to be looked at one by one."""
    if type(value) not in _CONTAINERS:
        return False
    waiting, num = [value], 0
    while waiting and num <= MAX_WALKED:
        inner: Any = waiting.pop()
        num += 1
        if type(inner) in _CONTAINERS and len(inner) > MAX_WALKED:
            if len(inner) > MAX_COMPARED or not _has_plain_items(inner):
                return True
        elif not _has_plain_items(inner):
            waiting += _items_of(inner)
    return num > MAX_WALKED


def _is_compared(value: object, depth: int = _MAX_DEPTH) -> bool:
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
    items = _items_of(value)
    if type(value) not in _CONTAINERS or not depth or len(items) > MAX_WALKED:
        return False
    return all(is_plain(v) or _is_compared(v, depth - 1) for v in items)


def is_plain(value: object, depth: int = _MAX_DEPTH) -> bool:
    """Whether a value is a number, text, array or tensor, or a container of those."""
    if type(value) in SCALARS or is_proxy(value):
        return type(value) in _SIMPLE
    if isinstance(value, np.ndarray | np.generic):
        return can_keep(value)
    if isinstance(value, Enum):
        is_member = value.name in type(value).__members__  # not several flags
        return is_member and _find_enum(_name_enum(type(value))) is type(value)
    if isinstance(value, (*PLAIN_TYPES, bytes)):
        return not isinstance(value, complex)
    if isinstance(value, Tensor):
        # A leaf that is trained is found as an object. Of any other, such as the state of a
        # recurrent model that the next batch detaches, the numbers are kept.
        if value.is_meta or is_functorch_wrapped_tensor(value):  # it escaped from vmap
            return False  # it has no numbers
        return not is_trained_leaf(value) and can_keep(value)
    if type(value) not in _CONTAINERS or not depth:
        return False
    if _has_plain_items(value):
        return True
    keys = [*value] if isinstance(value, dict) else []
    if any(isinstance(own, Enum) for key in keys for own in _walk(key)):
        return False  # keys are written as they are
    return all(is_plain(item, depth - 1) for item in _items_of(value))


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
    if _size_of(value) > MAX_BYTES:
        return "it has more than 16 MB; make it a buffer"
    inside = islice(_walk(value), 1, None)
    if any(type(v) is defaultdict and not has_named_factory(v) for v in inside):
        return "a defaultdict in it has your own function; use a dict"
    return ""


def _memory_of(search: Search) -> Memory:
    """Parameters and buffers, which other parts save, by the address of their memory."""
    found = {
        _address(tensor): (f"{root}{path}.{name}", tensor)
        for root, owners in search.owners.items()
        for path, owner in owners.items()
        if isinstance(owner, nn.Module)
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if tensor is not None
    }
    found.pop(0, None)
    return found


def _address(tensor: Tensor) -> int:
    """Address of a tensor's memory; 0 if it has none, or no single one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, lazy and the like
        return 0


def _map_items(value: Any, function: Callable[[Any], Any]) -> Any:
    """A plain value with other items, in a new container of the same kind."""
    if type(value) not in _CONTAINERS:
        return value
    value = copy.copy(value)  # at once: a thread may change it meanwhile
    if _has_plain_items(value):
        return value
    if isinstance(value, dict):
        value.update({key: function(item) for key, item in value.items()})
        return value
    items = [function(item) for item in value]
    return (
        deque(items, value.maxlen) if isinstance(value, deque) else type(value)(items)
    )


def _detach(value: Any, memory: Memory) -> Any:
    """A plain value without graphs; of a view of a weight, only where in it it is."""
    if isinstance(value, Enum):
        return {_MEMBER: value.name, "class": _name_enum(type(value))}
    if isinstance(value, Tensor):
        view = memory.get(_address(value))
        return value.detach() if view is None else _describe_view(value, *view)
    return _map_items(value, lambda item: _detach(item, memory))


def _describe_view(tensor: Tensor, name: str, whole: Tensor) -> dict[str, Any]:
    return {
        _VIEW: name,
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset() - whole.storage_offset(),
    }


def _name_enum(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _find_enum(name: str) -> type[Enum] | None:
    """An enum of a module that is imported already; None if there is none."""
    module, _, path = name.partition(":")
    found: object = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, "__dict__", {}).get(part)
    return found if isinstance(found, type) and issubclass(found, Enum) else None


_MEMBER, _MEMBER_KEYS = "member", {"member", "class"}
_VIEW = "view of"
_VIEW_KEYS = {_VIEW, "shape", "stride", "offset"}


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
    if isinstance(value, Tensor) and _address(value) in memory:
        return _detach(value, memory)
    is_array = isinstance(value, Tensor | np.ndarray)
    if is_passive and _is_long(value):
        return _Mark.of(value)
    if (is_array or is_passive) and _size_of(value) > _max_copied(value):
        return _Mark.of(value)
    if not is_plain(value):
        return _freeze(value)
    own = _detach(value, memory)
    is_flat = type(own) in _CONTAINERS and _has_plain_items(own)
    return own if is_flat else copy.deepcopy(own)


def _freeze(value: Any) -> Any:
    """A copy to compare with later of what cannot be kept."""
    if type(value) in _CONTAINERS:
        return _map_items(value, _freeze)
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
        return _is_equal(value, old)
    return _is_equal(_detach(value, memory), old)


def _is_clearly_same(value: Any, old: Any) -> bool:
    """Whether a quick look shows that a value is unchanged.

    A save stops training, and code may name large tables that never change.
    """
    if isinstance(old, _Mark):
        return old.is_same(value)
    if type(value) is not type(old) or type(value) not in _CONTAINERS:
        return False
    try:  # version 2 tells types and bits apart, and nothing else
        return marshal.dumps(value, 2) == marshal.dumps(old, 2)
    except ValueError:  # it has other items than plain ones
        return False


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
        if not isinstance(two, Tensor) or one.layout != torch.strided:
            return False
        forms = [(own.dtype, own.shape, own.device) for own in (one, two)]
        return forms[0] == forms[1] and torch.equal(as_bytes(one), as_bytes(two))
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
