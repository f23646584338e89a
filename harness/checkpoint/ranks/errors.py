"""Errors of one rank that all ranks raise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from harness.errors import CheckpointError

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


@contextmanager
def raise_together(
    accelerator: Accelerator,
    message: str,
    kinds: tuple[type[Exception], ...] = (CheckpointError,),
) -> Iterator[None]:
    """Raise on every rank if one raises inside; every rank must enter and leave it.

    If one rank stopped alone, the others would wait for it.

    Parameters
    ----------
    message
        Text of the ``CheckpointError`` on ranks without an error of their own.
    kinds
        Exceptions that are raised together.
    """
    error: Exception | None = None
    try:
        yield
    except kinds as found:
        error = found
    if accelerator.any(error is not None):
        raise error or CheckpointError(message)
