"""Tensors that are logged: copied at once, read out in bulk later.

torch is never imported here: a tensor can only come from a process that has it.
"""

from __future__ import annotations

import contextlib
import sys
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True)
class TensorCopy:
    """A tensor's value when it was logged, and the stream that is making the copy."""

    tensor: Any
    stream: Any


def is_tensor(value: object) -> bool:
    """Whether ``value`` has a tensor's ``detach``, ``clone``, ``numel``, ``tolist``."""
    return all(hasattr(value, name) for name in ("detach", "clone", "numel", "tolist"))


def copy_tensor(tensor: Any) -> TensorCopy:
    """TensorCopy of a tensor on its own device; waits for no device."""
    clone = tensor.detach().clone()
    stream = None
    if getattr(clone, "is_cuda", False):
        stream = sys.modules["torch"].cuda.current_stream(clone.device)
    return TensorCopy(clone, stream)


def fetch_values(copies: Iterable[TensorCopy]) -> dict[int, Any]:
    """Python values of copies, keyed by the ``id`` of each.

    Notes
    -----
    Scalars of one device, dtype and stream are stacked and fetched together: one wait
    for the device rather than one each. The stream that made a copy also reads it,
    so that no event is needed to order the two.
    """
    groups: defaultdict[Any, list[TensorCopy]] = defaultdict(list)
    values: dict[int, Any] = {}
    for copy in copies:
        if copy.tensor.ndim == 0:
            kind = (copy.tensor.device, copy.tensor.dtype, copy.stream)
            groups[kind].append(copy)
        else:
            with _on_stream(copy.stream):
                values[id(copy)] = copy.tensor.tolist()
    for (_, _, stream), group in groups.items():
        with _on_stream(stream):
            stack = sys.modules["torch"].stack([copy.tensor for copy in group])
            numbers = stack.tolist()
        values |= {
            id(copy): number for copy, number in zip(group, numbers, strict=True)
        }
    return values


def _on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Context in which CUDA work goes to ``stream``; nothing elsewhere."""
    if stream is None:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[Any] = sys.modules["torch"].cuda.stream(
        stream
    )
    return context
