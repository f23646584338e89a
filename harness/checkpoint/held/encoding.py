"""The form in which a checkpoint holds plain values: views of weights and enums by name."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from harness.checkpoint.held.search import Search
from harness.checkpoint.held.values import (
    find_class,
    form_of,
    is_rebuilt,
    list_items,
    map_items,
    name_class,
    rebuild,
)

Memory = Mapping[int, tuple[str, Tensor]]
"""Name and tensor of each parameter and buffer, by the address of its memory."""

_MEMBER, _MEMBER_KEYS = "member", {"member", "class"}
_FORM, _ITEMS = "rebuilt as", "of items"
_VIEW = "view of"
_VIEW_KEYS = {_VIEW, "shape", "stride", "offset"}


def find_memory(search: Search) -> Memory:
    """Parameters and buffers, which other parts save, by the address of their memory."""
    found = {
        address_of(tensor): (f"{root}{path}.{name}", tensor)
        for root, owners in search.owners.items()
        for path, owner in owners.items()
        if isinstance(owner, nn.Module)
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if tensor is not None
    }
    found.pop(0, None)
    return found


def address_of(tensor: Tensor) -> int:
    """Address of a tensor's memory; 0 if it has none, or no single one."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError, ValueError):  # sparse, lazy and the like
        return 0


def encode(value: Any, memory: Memory) -> Any:
    """A plain value without graphs; of a view of a weight, only where in it it is."""
    if isinstance(value, Enum):
        return {_MEMBER: value.name, "class": name_class(type(value))}
    if isinstance(value, Tensor):
        view = memory.get(address_of(value))
        return value.detach() if view is None else _describe_view(value, *view)
    if is_rebuilt(value):
        items = [encode(item, memory) for item in list_items(value)]
        form = form_of(value)
        name = name_class(form) if isinstance(form, type) else list(form)
        return {_FORM: name, _ITEMS: items}
    return map_items(value, lambda item: encode(item, memory))


def _describe_view(tensor: Tensor, name: str, whole: Tensor) -> dict[str, Any]:
    return {
        _VIEW: name,
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
        "offset": tensor.storage_offset() - whole.storage_offset(),
    }


class Decoder:
    """Moves saved values to a device; tensors that share memory share it there.

    Parameters
    ----------
    memory
        From `find_memory`, for attributes that are views of weights.
    """

    def __init__(self, device: torch.device, memory: Memory) -> None:
        self._device, self._views = device, dict(memory.values())
        self._moved: dict[tuple[int, torch.dtype], Tensor] = {}

    def decode(self, value: Any) -> Any:
        """The value with its tensors on the device, and views of what they belong to."""
        if isinstance(value, dict) and value.keys() == _VIEW_KEYS:
            own = self._views.get(value[_VIEW])
            if own is None:
                return value
            offset = own.storage_offset() + value["offset"]
            return own.detach().as_strided(value["shape"], value["stride"], offset)
        if isinstance(value, dict) and value.keys() == _MEMBER_KEYS:
            kind = find_class(str(value["class"]))
            if kind is None or not issubclass(kind, Enum):
                return value
            return kind.__members__[value[_MEMBER]]
        if isinstance(value, dict) and value.keys() == {_FORM, _ITEMS}:
            return self._rebuild(value[_FORM], [*map(self.decode, value[_ITEMS])])
        if isinstance(value, Tensor):
            return self._move(value)
        return map_items(value, self.decode)

    def _rebuild(self, form: str | list[int], items: list[Any]) -> Any:
        kind = find_class(form) if isinstance(form, str) else tuple(form)
        try:
            return rebuild(kind, items)
        except (TypeError, ValueError, AttributeError):  # of other fields or no class
            return items

    def _move(self, tensor: Tensor) -> Tensor:
        address = address_of(tensor)
        if tensor.device == self._device or not address:
            return tensor.to(self._device)
        key = address, tensor.dtype
        if key not in self._moved:
            num = tensor.untyped_storage().nbytes() // tensor.element_size()
            self._moved[key] = tensor.as_strided((num,), (1,), 0).to(self._device)
        form = tensor.shape, tensor.stride(), tensor.storage_offset()
        return self._moved[key].as_strided(*form)
