"""Put saved attributes and variables back, into the live objects where these can take them."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.checkpoint.held.attributes import Attributes, Place
from harness.checkpoint.held.encoding import Decoder, address_of, find_memory
from harness.checkpoint.held.search import Search, list_library_fields
from harness.checkpoint.held.values import CONTAINERS, has_plain_items, is_equal
from harness.reshard.consolidated import copy_into
from harness.variables import fields_of, set_field


def restore_attributes(
    search: Search,
    saved: Attributes,
    device: torch.device,
    same: Iterable[list[Place]] = (),
) -> None:
    """Restore what ``capture_attributes`` returned; new tensors go to the device."""
    search.add_tensors(saved)
    memory = find_memory(search)
    decoder = Decoder(device, memory)
    places = [
        (owner, name, fields_of(owner).get(name), decoder.decode(value))
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
        if not is_equal(fields_of(owner).get(name), value):
            set_field(owner, name, value)
    _join_objects(search, saved, same)


def _pair(live: Any, value: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors at the same place of two plain values."""
    if isinstance(live, Tensor) and isinstance(value, Tensor):
        yield live, value
    elif isinstance(live, dict) and isinstance(value, dict):
        for key in live.keys() & value.keys():
            yield from _pair(live[key], value[key])
    elif has_plain_items(live):
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
        ours, theirs = ("live", address_of(live)), ("saved", address_of(value))
        if not (ours[1] and theirs[1]):
            continue
        shift = live.storage_offset() - value.storage_offset()
        is_same = live.shape == value.shape and live.dtype == value.dtype
        one = places.setdefault(ours, (theirs, shift)) == (theirs, shift)
        two = places.setdefault(theirs, (ours, shift)) == (ours, shift)
        if not (one and two and is_same and live.stride() == value.stride()):
            bad |= {ours, theirs}

    def is_alike(live: Tensor, value: Tensor) -> bool:
        ours, theirs = address_of(live), address_of(value)
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
    if type(live) not in CONTAINERS or not (is_dict or type(live) is type(value)):
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
