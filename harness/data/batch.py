"""What a batch is: its input and target, its rows, and how it is moved and joined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from harness.pytree import items_of, map_tensors, with_items


def input_of(batch: Any) -> Any:
    """The first item of a tuple or list; any other batch is itself the input."""
    return batch[0] if isinstance(batch, tuple | list) else batch


def target_of(batch: Any) -> Any:
    """The second item of a tuple or list; None where there is none."""
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def with_input(batch: Any, new: Any) -> Any:
    """The batch with another input."""
    return [new, *batch[1:]] if isinstance(batch, tuple | list) else new


def with_target(batch: Any, new: Any) -> list[Any]:
    """The batch with another target, as a list."""
    rest = batch[2:] if isinstance(batch, tuple | list) else ()
    return [input_of(batch), new, *rest]


def num_rows(batch: Any) -> int:
    """Rows in a batch: the first dim of its first tensor, 1 if there is none."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.dim() else 1
    if isinstance(batch, tuple | list):
        return num_rows(batch[0]) if batch else 1
    if isinstance(batch, Mapping):
        return num_rows(list(batch.values()))
    return 1


def move(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on `device`, in the same form.

    An object with a method ``to`` is moved by ``to(device)``; other objects are kept as
    they are.
    """
    if isinstance(batch, Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=True)
    if type(batch) not in _WITHOUT_TO and _has_own_move(batch):
        return batch.to(device)
    items = items_of(batch)
    if items is None:
        return batch
    return with_items(batch, [move(item, device) for item in items])


def _has_own_move(batch: Any) -> bool:
    return callable(getattr(batch, "to", None)) and not isinstance(batch, type)


_WITHOUT_TO = frozenset({tuple, list, dict, str, int, float, bool, type(None)})
"""Common types without a method ``to``, known without looking for it."""


def detach(value: Any) -> Any:
    """The value with its tensors detached from the graph, in the same form."""
    return map_tensors(value, Tensor.detach)


def join(outputs: Sequence[Any]) -> Any:
    """Outputs of several batches as one, in the same form, on the CPU.

    Tensors are concatenated, also in tuples and mappings; outputs of any other kind
    become a list.
    """
    first = outputs[0] if outputs else None
    if isinstance(first, Tensor) and first.dim():
        return torch.cat([output.cpu() for output in outputs])
    if isinstance(first, Mapping):
        items = [join([output[name] for output in outputs]) for name in first]
        return with_items(first, items)
    if isinstance(first, tuple) and not isinstance(first, PackedSequence):
        return with_items(first, [join(item) for item in zip(*outputs, strict=True)])
    return list(outputs)
