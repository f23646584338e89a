"""Nested state as JSON and tensors, so that reading it back can execute nothing.

Numbers, strings, bools, None, bytes, tensors, NumPy arrays, and lists, tuples and dicts of
those. What JSON lacks is written as an object with one key that begins with ``$``.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

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
"""Types whose values are their own plans."""

_FLOATS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def flatten(tree: Any, place: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """A plan that JSON can hold, and the tensors it refers to by name.

    Parameters
    ----------
    tree
        Nested state.
    place
        Name of the whole, for messages and names of tensors.

    Raises
    ------
    TypeError
        If something in it is of another kind; its path is named.
    """
    tensors: dict[str, Tensor] = {}
    return _plan(tree, place, tensors), tensors


def _plan(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The plan of one value; tensors are put aside under their path."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        value = float(value)
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, Tensor):
        return _tensor(value.detach(), path, tensors)
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        tensors[path] = torch.from_numpy(np.ascontiguousarray(value))
        return {"$array": path}
    if isinstance(value, np.generic):
        return _plan(value.item(), path, tensors)
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    return _container(value, path, tensors)


def _tensor(value: Tensor, path: str, tensors: dict[str, Tensor]) -> Any:
    """The plan of a tensor: its name, and what safetensors lacks: complex, order of dims."""
    if value.is_complex():
        return {"$complex": _tensor(torch.view_as_real(value), path, tensors)}
    if value.layout != torch.strided or value.dtype not in DTYPES:
        msg = f"{path}: expected a dense tensor of a common dtype, got {value.dtype}"
        raise TypeError(f"{msg}, {value.layout}. Convert it in state_dict().")
    order = sorted(range(value.dim()), key=value.stride().__getitem__, reverse=True)
    if not value.is_contiguous() and value.permute(order).is_contiguous():
        # Channels last, say: kernels round differently for another order.
        tensors[path] = value.permute(order)
        return {"$permuted": [path, order]}
    tensors[path] = value
    return {"$tensor": path}


def _container(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """The plan of a tuple, list or dict."""
    if isinstance(value, tuple):
        return {"$tuple": _items(value, path, tensors)}
    if isinstance(value, list):
        return _items(value, path, tensors)
    if isinstance(value, Mapping):
        return _mapping(value, path, tensors)
    msg = f"{path}: expected numbers, strings, tensors, lists or dicts, got {value!r}."
    raise TypeError(f"{msg} Turn it into those in state_dict().")


def _items(value: Any, path: str, tensors: dict[str, Tensor]) -> list[Any]:
    """Plans of the items of a list; Python's random state is a long one of plain numbers."""
    if _PLAIN.issuperset(map(type, value)):
        return list(value)
    return [_plan(item, f"{path}/{n}", tensors) for n, item in enumerate(value)]


def _mapping(value: Mapping[Any, Any], path: str, tensors: dict[str, Tensor]) -> Any:
    """The plan of a dict; keys that are no plain strings are kept in pairs."""
    if all(isinstance(key, str) and not key.startswith("$") for key in value):
        return {
            key: _plan(item, f"{path}/{key}", tensors) for key, item in value.items()
        }
    pairs = [
        [_plan(key, f"{path}/key{n}", tensors), _plan(item, f"{path}/{key}", tensors)]
        for n, (key, item) in enumerate(value.items())
    ]
    return {"$dict": pairs}


def restore(plan: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that ``flatten`` took apart.

    Raises
    ------
    ValueError
        If the plan has an unknown form or names a tensor that is not there.
    """
    if isinstance(plan, list):
        return [restore(item, tensors) for item in plan]
    if not isinstance(plan, dict):
        return plan
    if len(plan) == 1:
        ((key, value),) = plan.items()
        if key.startswith("$"):
            return _special(key, value, tensors)
    return {key: restore(item, tensors) for key, item in plan.items()}


def _special(key: str, value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The value behind an object with a ``$`` key."""
    if key in {"$tensor", "$array"} and isinstance(value, str) and value in tensors:
        found = tensors[value]
        return found if key == "$tensor" else found.numpy()
    if key == "$permuted" and isinstance(value, list) and len(value) == 2:
        name, order = value
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return tensors[name].permute(inverse)
    if key == "$complex" and isinstance(value, dict):
        return torch.view_as_complex(
            torch.as_tensor(restore(value, tensors)).contiguous()
        )
    if key == "$float" and value in _FLOATS:
        return _FLOATS[value]
    if key == "$bytes" and isinstance(value, str):
        return base64.b64decode(value, validate=True)
    if key == "$tuple" and isinstance(value, list):
        return tuple(restore(item, tensors) for item in value)
    if key == "$dict" and isinstance(value, list):
        return {restore(k, tensors): restore(item, tensors) for k, item in value}
    msg = f"state: expected a known form, got {key!r}: {str(value)[:80]!r}."
    raise ValueError(f"{msg} The file is torn or from another version.")
