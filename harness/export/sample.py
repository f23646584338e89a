"""A small input of a fit, to call its model with later, and how it is called."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from harness.data.batch import num_rows
from harness.pytree import iter_tensors, map_tensors

NUM_ROWS = 2
"""Rows of a sample. With one alone, an exported model takes no other number of rows."""

MAX_BYTES = 1 << 26
"""A larger sample, such as a whole graph, is not kept."""


def take_sample(input: object) -> Any:
    """Return the first two rows of an input, copied to the CPU; None if there are none.

    Tensors whose first dimension does not count rows are kept whole. A tensor of a kind that
    has no rows, such as a nested one, must not take a finished fit from its user: None.
    """
    with contextlib.suppress(Exception):
        return _take_rows(input)
    return None


def _take_rows(input: object) -> Any:
    tensors = list(iter_tensors(input))
    rows = num_rows(input)
    if not tensors or rows is None or any(tensor.is_meta for tensor in tensors):
        return None
    kept = [count_kept(tensor, rows) for tensor in tensors]
    if sum(kept) > MAX_BYTES:
        return None
    return map_tensors(input, lambda tensor: _take(tensor, rows))


def has_rows(tensor: Tensor, rows: int | None) -> bool:
    """Whether the first dimension of a tensor counts so many rows."""
    return tensor.ndim > 0 and len(tensor) == rows


def count_kept(tensor: Tensor, rows: int) -> int:
    """Bytes that a sample keeps of a tensor."""
    num_elements = tensor.numel()
    if has_rows(tensor, rows):
        num_elements = num_elements // max(1, rows) * NUM_ROWS
    return num_elements * tensor.element_size()


def _take(tensor: Tensor, rows: int) -> Tensor:
    tensor = tensor.detach()
    if has_rows(tensor, rows) and rows > 0:
        at = torch.arange(NUM_ROWS, device=tensor.device) % rows
        tensor = tensor.index_select(0, at)
    return tensor.cpu().clone(memory_format=torch.contiguous_format)


def as_arguments(input: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments with which ``call_model`` calls a model."""
    if isinstance(input, tuple | list) and not hasattr(input, "_fields"):
        return tuple(input), {}
    if isinstance(input, Mapping):
        return (), dict(input)
    return (input,), {}


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Hide warnings and messages of what is called inside, which are about its own code."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
