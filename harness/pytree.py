"""Nested values: walk their tensors, and write them as JSON and tensors.

A container is a list, tuple, named tuple, mapping, dataclass or ``PackedSequence``, or a
subclass of one. Everything else is a leaf.

``flatten`` and ``restore`` are the form of checkpoints: numbers, strings, bools, None, bytes,
tensors, NumPy arrays, and lists, tuples, dicts, deques, sets and counters of those. Tensors
that shared their memory share it again. Values that JSON cannot hold are
written as an object with one key that begins with ``$``, so reading never runs code.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import dataclasses
import functools
import math
import sys
import sysconfig
import types
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

T = TypeVar("T")


def as_bytes(tensor: Tensor) -> Tensor:
    """The elements of a tensor as bytes, in a row; a copy only where it is not contiguous."""
    flat = tensor.detach().reshape(-1).contiguous()
    # A single element counts as contiguous whatever its stride is.
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)


def cache_by_identity(function: Callable[[Any], T]) -> Callable[[Any], T]:
    """Cache a function of the user's classes and functions, by which object they are.

    Unlike ``functools.cache`` it needs no hash of them, and lets them die.
    """
    found: dict[int, T] = {}
    refs: dict[int, weakref.ref[Any]] = {}

    def forget(key: int, _: object) -> None:
        found.pop(key, None)
        refs.pop(key, None)

    def call(thing: Any) -> T:
        key = id(thing)
        try:
            return found[key]
        except KeyError:
            result = function(thing)
            # None, for one, has no weak reference.
            with contextlib.suppress(TypeError):
                refs[key] = weakref.ref(thing, functools.partial(forget, key))
                found[key] = result
            return result

    return functools.wraps(function)(call)


@functools.cache
def is_installed(name: str | None) -> bool:
    """Whether a module is of Python, this package or an installed one; else it is the user's.

    Generated functions, such as those of ``torch.fx``, have no module.
    """
    if name is None or name.partition(".")[0] in {"harness", "tracking"}:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return name != "__main__"
    # By these names, because users and systems have more such folders than sysconfig knows.
    is_package = not _PACKAGES.isdisjoint(Path(file).parts)
    return is_package or Path(file).is_relative_to(sysconfig.get_path("stdlib"))


_PACKAGES = frozenset({"site-packages", "dist-packages"})
"""Names of folders that packages are installed into."""


# ---------------------------------------------------------------- walking tensors

_LEAVES = frozenset({str, bytes, int, float, bool, type(None)})
"""Common types of leaves, known without further checks."""


def has_state(value: object) -> bool:
    """Whether an object can save and restore its state."""
    names = ("state_dict", "load_state_dict")
    return all(callable(getattr(type(value), name, None)) for name in names)


def is_proxy(value: object) -> bool:
    """Whether code of its own answers for an object's class and attributes.

    So do mocks, proxies and lazily loaded objects. A question to them may fail or take long.
    """
    return type(value) not in _LEAVES and _is_class_of_proxies(type(value))


@cache_by_identity
def _is_class_of_proxies(kind: type) -> bool:
    if issubclass(kind, (*weakref.ProxyTypes, torch.nn.Module, Tensor)):
        return issubclass(kind, weakref.ProxyTypes)
    for base in kind.__mro__[:-1]:
        own = vars(base)
        is_plain = isinstance(own.get("__dict__", _FIELDS), _OF_C)
        is_looked_up = isinstance(own.get("__getattribute__"), types.FunctionType)
        if "__class__" in own or is_looked_up or not is_plain:
            return True
    return False


_OF_C = types.GetSetDescriptorType | types.MemberDescriptorType
_FIELDS = vars(types.ModuleType)["__dict__"]


def items_of(value: Any) -> Sequence[Any] | None:
    """Items of a container, in order; None for a leaf."""
    kind = type(value)
    if kind is list or kind is tuple:
        return value  # type: ignore[no-any-return]
    if kind is dict:
        return list(value.values())
    if kind in _LEAVES:
        return None
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, PackedSequence):
        # The other fields say which row is where, and have no values of the user's.
        return (value.data,)
    if isinstance(value, tuple | list):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, name) for name in _fields_of(value)]
    return None


def with_items(value: Any, items: Sequence[Any]) -> Any:
    """A container of the same type with other items; `value` itself stays as it is.

    A mapping that is neither a ``dict`` nor a ``UserDict`` becomes a dict, because a copy
    of it could share its items.
    """
    kind = type(value)
    if kind is list or kind is tuple:
        return kind(items)
    if kind is dict:
        return dict(zip(value, items, strict=True))
    if isinstance(value, Mapping):
        return _with_values(value, items)
    if isinstance(value, PackedSequence):
        return value._replace(data=items[0])
    if isinstance(value, tuple):
        return kind(*items) if hasattr(value, "_fields") else kind(items)
    if isinstance(value, list):
        changed = copy.copy(value)
        changed[:] = items
        return changed
    return _with_fields(value, items)


def _with_values(
    value: Mapping[object, object], items: Sequence[object]
) -> Mapping[Any, Any]:
    pairs = dict(zip(value, items, strict=True))
    if not isinstance(value, dict | UserDict):
        return pairs
    changed = copy.copy(value)
    for key, item in pairs.items():
        changed[key] = item
    return changed


def _with_fields(value: object, items: Sequence[object]) -> Any:
    """The dataclass with other fields; itself where no field changes."""
    pairs = list(zip(_fields_of(value), items, strict=True))
    if all(item is getattr(value, name) for name, item in pairs):
        return value
    changed = copy.copy(value)
    for name, item in pairs:
        object.__setattr__(changed, name, item)  # a frozen one has no other way
    return changed


def _fields_of(value: Any) -> list[str]:
    names = (field.name for field in dataclasses.fields(value))
    return [name for name in names if hasattr(value, name)]


def map_tensors(value: object, function: Callable[[Tensor], object]) -> Any:
    """The value with ``function(tensor)`` in place of each tensor, in the same form.

    Parameters
    ----------
    value
        Tensor, container or anything else; other leaves are kept as they are.
    function
        Called with each tensor, in order; of a ``PackedSequence``, with its data alone.

    Examples
    --------
    >>> map_tensors({"a": torch.ones(2), "b": "text"}, lambda tensor: tensor.shape)
    {'a': torch.Size([2]), 'b': 'text'}
    """
    if isinstance(value, Tensor):
        return function(value)
    items = items_of(value)
    if items is None:
        return value
    return with_items(value, [map_tensors(item, function) for item in items])


def iter_tensors(value: object) -> Iterator[Tensor]:
    """The tensors of a nested value, in order."""
    if isinstance(value, Tensor):
        yield value
    else:
        for item in items_of(value) or ():
            yield from iter_tensors(item)


def named_leaves(
    value: Mapping[str, object], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Name and value of each leaf of nested mappings; nested names are joined by ``/``."""
    for name, item in value.items():
        if isinstance(item, Mapping):
            yield from named_leaves(item, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", item


# --------------------------------------------------------------- JSON and tensors

Options = dict[str, Any]
"""Keyword arguments or settings by name, of any kind."""

StateDict = dict[str, Any]
"""State by name: numbers, strings, tensors, and lists, tuples and dicts of those."""

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtypes that are written, by their safetensors names."""

_PLAIN = frozenset({int, bool, str, type(None)})
"""Types whose values are written as they are."""

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@dataclasses.dataclass(slots=True)  # frozen ones take three times as long to make
class _Leaf:
    """A tensor of a tree, its name and its plan."""

    name: str
    tensor: Tensor
    plan: dict[str, object]

    @property
    def form(self) -> tuple[object, ...]:
        """Tensors of one storage and form are the same."""
        tensor = self.tensor
        return tensor.storage_offset(), tensor.shape, tensor.stride()

    @property
    def span(self) -> tuple[int, int]:
        """First element in the storage, and the one behind the last."""
        start = int(self.tensor.storage_offset())
        sizes = zip(self.tensor.shape, self.tensor.stride(), strict=True)
        return start, start + 1 + sum((int(size) - 1) * step for size, step in sizes)


@dataclasses.dataclass(frozen=True, slots=True)
class _Found:
    """The tensors of a tree by name, and those of them that may share memory."""

    tensors: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    leaves: list[_Leaf] = dataclasses.field(default_factory=list)


def flatten(tree: object, place: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """A plan that JSON can hold, and the tensors that it refers to by name.

    Parameters
    ----------
    place
        Name of the state, for messages and for the names of tensors.

    Raises
    ------
    TypeError
        If a value is of another kind; the message names its path.
    """
    found = _Found()
    plan = _encode(tree, place, found)
    _share_memory(found)
    return plan, found.tensors


def _encode(value: Any, path: str, found: _Found) -> object:
    """The plan of one value; its tensors are added to `found` under their paths."""
    kind = type(value)
    if kind is dict:  # most values; the other questions take longer
        return _encode_mapping(value, path, found)
    if kind is Tensor or kind is nn.Parameter:
        return _encode_tensor(value, path, found)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return _encode_tensor(value, path, found)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        found.tensors[path] = torch.from_numpy(np.ascontiguousarray(value))
        return {"$array": path}
    if isinstance(value, np.generic):
        return _encode(value.item(), path, found)
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    return _encode_container(value, path, found)


def _encode_tensor(value: Tensor, path: str, found: _Found) -> object:
    """The tensor's name, with what safetensors cannot hold: complex, order of dims."""
    if value.requires_grad:
        value = value.detach()
    if value.is_complex() and value.layout == torch.strided:
        value = value.resolve_conj()
        return {"$complex": _encode_tensor(torch.view_as_real(value), path, found)}
    if value.layout == torch.sparse_coo and not value.is_complex():
        parts = [value._indices(), value._values()]
        plans = _encode_items(parts, path, found)
        return {"$sparse": [*plans, list(value.shape), value.is_coalesced()]}
    if value.layout != torch.strided or value.dtype not in DTYPES:
        msg = f"{path}: expected a dense tensor of a common dtype, got {value.dtype}"
        raise TypeError(f"{msg}, {value.layout}. Convert it in state_dict().")
    found.tensors[path] = value
    plan: dict[str, object] = {"$tensor": path}
    if not value.is_contiguous():
        order = sorted(range(value.dim()), key=value.stride().__getitem__, reverse=True)
        if value.permute(order).is_contiguous():
            # For example channels last: kernels round differently for another order.
            found.tensors[path] = value.permute(order)
            plan = {"$permuted": [path, order]}
    found.leaves.append(_Leaf(path, value, plan))
    return plan


def can_keep(value: Tensor | np.ndarray | np.generic) -> bool:
    """Whether ``flatten`` takes a tensor, an array or a number of NumPy."""
    if isinstance(value, Tensor):
        if value.layout == torch.sparse_coo:
            return value.dtype in DTYPES
        is_known = value.dtype in DTYPES or value.is_complex()
        return is_known and value.layout == torch.strided and not value.is_nested
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray | np.matrix):
            return False  # it would come back as an array
        is_number = value.dtype.kind in "biuf" and value.dtype.isnative
        return is_number and value.dtype.itemsize <= _MAX_NUMBER_BYTES
    return isinstance(value.item(), bool | int | float | str | bytes)


_MAX_NUMBER_BYTES = 8
"""Larger numbers of NumPy, ``longdouble``, have no type in torch."""


def _encode_container(value: object, path: str, found: _Found) -> object:
    if isinstance(value, tuple):
        return {"$tuple": _encode_items(value, path, found)}
    if isinstance(value, list):
        return _encode_items(value, path, found)
    kind = type(value)
    if kind in _KINDS:
        # What a deque holds at most, or what a defaultdict makes, if its name says that.
        option = getattr(value, "maxlen", None)
        factory = getattr(value, "default_factory", None)
        option = factory.__name__ if factory in _FACTORIES else option
        items = dict(value) if isinstance(value, dict) else list(value)  # type: ignore[call-overload]
        return {"$kind": [kind.__name__, option, _encode(items, path, found)]}
    if isinstance(value, Mapping):
        return _encode_mapping(value, path, found)
    msg = f"{path}: expected numbers, strings, tensors, lists or dicts, got {value!r}."
    raise TypeError(f"{msg} Convert it in state_dict().")


_FACTORIES = (int, float, str, bool, list, dict, set, deque, Counter)
_FACTORY_OF: dict[object, type] = {made.__name__: made for made in _FACTORIES}

_KINDS: dict[type, Callable[[Any, Any], object]] = {
    deque: lambda items, maxlen: deque(items, maxlen),
    set: lambda items, _: set(items),
    frozenset: lambda items, _: frozenset(items),
    Counter: lambda items, _: Counter(items),
    OrderedDict: lambda items, _: OrderedDict(items),
    defaultdict: lambda items, name: defaultdict(_FACTORY_OF.get(name), items),
}
"""Other containers of Python, and what makes one of its items and its option."""


def has_named_factory(value: defaultdict[Any, Any]) -> bool:
    """Whether ``restore`` can give a ``defaultdict`` its function again."""
    return value.default_factory is None or value.default_factory in _FACTORIES


def _encode_items(value: Sequence[object], path: str, found: _Found) -> list[Any]:
    # Python's random state is a tuple of 625 plain numbers: no plan for each of them.
    if _PLAIN.issuperset(map(type, value)):
        return list(value)
    return [_encode(item, f"{path}/{n}", found) for n, item in enumerate(value)]


def _encode_mapping(value: Mapping[Any, object], path: str, found: _Found) -> object:
    """The plan of a mapping; keys that JSON cannot hold are written as pairs."""
    is_plain = {*map(type, value)} <= {str} and "$" not in "".join(value)
    if is_plain or all(isinstance(key, str) and key[:1] != "$" for key in value):
        return {
            key: _encode(item, f"{path}/{key}", found) for key, item in value.items()
        }
    pairs = [
        [_encode(key, f"{path}/key{n}", found), _encode(item, f"{path}/{key}", found)]
        for n, (key, item) in enumerate(value.items())
    ]
    return {"$dict": pairs}


def _share_memory(found: _Found) -> None:
    """Let the plans of tensors that share memory name one tensor."""
    storages: dict[tuple[object, ...], list[_Leaf]] = {}
    for leaf in found.leaves:
        tensor = leaf.tensor
        try:
            address = tensor.untyped_storage().data_ptr()
        except (RuntimeError, NotImplementedError):  # it has no storage
            continue
        if address and tensor.numel():
            key = (tensor.device, address, tensor.dtype)
            storages.setdefault(key, []).append(leaf)
    for leaves in storages.values():
        if len(leaves) > 1 or 0 in leaves[0].tensor.stride():
            for group in _list_overlapping(leaves):
                _share(group, found.tensors)


def _list_overlapping(leaves: list[_Leaf]) -> list[list[_Leaf]]:
    """Groups of the tensors of one storage whose spans overlap."""
    groups: list[list[_Leaf]] = []
    end = -1
    for leaf in sorted(leaves, key=lambda leaf: leaf.span[0]):
        if leaf.span[0] >= end:
            groups.append([])
        groups[-1].append(leaf)
        end = max(end, leaf.span[1])
    return groups


def _share(group: list[_Leaf], tensors: dict[str, Tensor]) -> None:
    """Let the plans of a group name the memory of all, and equal tensors have one plan."""
    firsts: dict[object, _Leaf] = {}
    for leaf in group:
        if firsts.setdefault(leaf.form, leaf) is not leaf:
            del tensors[leaf.name]
    forms = list(firsts.values())
    start = min(leaf.span[0] for leaf in forms)
    length = max(leaf.span[1] for leaf in forms) - start
    num_values = sum(leaf.tensor.numel() for leaf in forms)
    # Columns may lie so far apart that the memory between them is most of it.
    if num_values > length or (len(forms) > 1 and num_values == length):
        for leaf in forms:
            del tensors[leaf.name]
            form = [list(leaf.tensor.shape), list(leaf.tensor.stride())]
            view = [group[0].name, *form, leaf.span[0] - start]
            _replace_plan(leaf, {"$view": view})
        memory = group[0].tensor.as_strided((length,), (1,), start)
        tensors[group[0].name] = memory
    for leaf in group:
        _replace_plan(leaf, dict(firsts[leaf.form].plan))


def _replace_plan(leaf: _Leaf, plan: dict[str, object]) -> None:
    leaf.plan.clear()
    leaf.plan.update(plan)


def find_unkept_kind(tree: object) -> type | None:
    """Type of the first part that would be refused by ``flatten``, or come back as another."""
    items = items_of(tree)
    kind = type(tree)
    if items is None:
        is_kept = isinstance(tree, Tensor | np.ndarray) or kind in _LEAVES
        return None if is_kept else kind
    if kind not in {list, tuple, dict}:
        return kind
    return next((found for item in items if (found := find_unkept_kind(item))), None)


def restore(plan: object, tensors: Mapping[str, Tensor]) -> Any:
    """The state that ``flatten`` wrote.

    Raises
    ------
    ValueError
        If the plan has an unknown form or names a tensor that does not exist.
    """
    if isinstance(plan, list):
        if _PLAIN.issuperset(map(type, plan)):  # as ``_encode_items`` writes them
            return list(plan)
        return [restore(item, tensors) for item in plan]
    if not isinstance(plan, dict):
        return plan
    if len(plan) == 1:
        ((key, value),) = plan.items()
        if key.startswith("$"):
            return _decode(key, value, tensors)
    return {key: restore(item, tensors) for key, item in plan.items()}


def _decode(key: str, value: object, tensors: Mapping[str, Tensor]) -> Any:
    """The value behind an object whose only key begins with ``$``."""
    kind, decoder = _DECODERS.get(key, (None, None))
    if decoder is not None and type(value) is kind:
        # LookupError: a tensor or a number that does not exist.
        with contextlib.suppress(LookupError):
            return decoder(value, tensors)
    msg = f"state: expected a known form, got {key!r}: {str(value)[:80]!r}."
    raise ValueError(f"{msg} The file is damaged or from another version.")


def _decode_permuted(value: list[Any], tensors: Mapping[str, Tensor]) -> Tensor:
    name, order = value
    return tensors[name].permute(sorted(range(len(order)), key=order.__getitem__))


def _decode_view(value: list[Any], tensors: Mapping[str, Tensor]) -> Tensor:
    name, shape, stride, offset = value
    memory = tensors[name]
    last = sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    if not 0 <= offset <= offset + last < memory.numel():
        msg = f"state: expected a view of {memory.numel()} values, got {value!r}."
        raise ValueError(f"{msg} The file is damaged or from another version.")
    return memory.as_strided(shape, stride, memory.storage_offset() + offset)


def _decode_mapping(
    value: list[Any], tensors: Mapping[str, Tensor]
) -> dict[Any, object]:
    found = {restore(key, tensors): restore(item, tensors) for key, item in value}
    if len(found) < len(value):
        keys = [key for key, _ in value]
        msg = f"state: expected each key once, got {keys!r:.200}."
        raise ValueError(f"{msg} The file is damaged or from another version.")
    return found


def _decode_sparse(value: list[Any], tensors: Mapping[str, Tensor]) -> Tensor:
    indices, values, shape, is_coalesced = value
    return torch.sparse_coo_tensor(
        restore(indices, tensors),
        restore(values, tensors),
        shape,
        is_coalesced=is_coalesced,
        check_invariants=True,
    )


def _decode_complex(value: dict[str, object], tensors: Mapping[str, Tensor]) -> Tensor:
    pairs = torch.as_tensor(restore(value, tensors))
    return torch.view_as_complex(pairs.contiguous())


def _decode_kind(value: list[Any], tensors: Mapping[str, Tensor]) -> object:
    name, option, items = value
    makers = {kind.__name__: make for kind, make in _KINDS.items()}
    return makers[name](restore(items, tensors), option)


_DECODERS: dict[str, tuple[type, Callable[[Any, Mapping[str, Tensor]], object]]] = {
    "$tensor": (str, lambda value, tensors: tensors[value]),
    "$array": (str, lambda value, tensors: tensors[value].numpy()),
    "$permuted": (list, _decode_permuted),
    "$view": (list, _decode_view),
    "$sparse": (list, _decode_sparse),
    "$complex": (dict, _decode_complex),
    "$float": (str, lambda value, tensors: _FLOATS[value]),
    "$bytes": (str, lambda value, tensors: base64.b64decode(value, validate=True)),
    "$kind": (list, _decode_kind),
    "$tuple": (list, lambda value, tensors: tuple(restore(value, tensors))),
    "$dict": (list, _decode_mapping),
}
"""For each ``$`` key, the JSON type behind it and what reads it."""
