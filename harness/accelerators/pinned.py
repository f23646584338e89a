"""Pinned memory that is freed only while its device works.

A tensor in pinned memory that was copied to a CUDA device makes an event on the device when it is
freed. After an error that ends the device's work for this process, such as a failed assertion in a
kernel, that raises in a destructor, and torch 2.13 ends the process: the error, which CUDA reports
late, is never seen.
"""

from __future__ import annotations

import ctypes
import weakref
from collections import deque
from collections.abc import Callable, Sized
from functools import partial

import torch

from harness.data.batch import Batch, move
from harness.pytree import iter_tensors


def keep_if_failed(value: Sized, wait: Callable[[], object]) -> None:
    """Keep a value until the process ends if waiting for its CUDA device raises."""
    try:
        if value:  # else a device that was never used would be opened
            wait()
    except RuntimeError:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def make_mover(device: torch.device) -> Callable[[Batch], Batch]:
    """Return the function that moves batches to a device."""
    return (
        PinnedMover(device) if device.type == "cuda" else partial(move, device=device)
    )


class PinnedMover:
    """Moves batches to a CUDA device, and holds pinned ones until they are copied."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._in_flight: deque[tuple[torch.cuda.Event, Batch]] = deque()
        weakref.finalize(
            self, keep_if_failed, self._in_flight, partial(_wait_for, device)
        )

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device."""
        moved = move(batch, self._device)
        if any(tensor.is_pinned() for tensor in iter_tensors(batch)):
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._device))
            self._in_flight.append((event, batch))
            while len(self._in_flight) > 1 and self._in_flight[0][0].query():  # type: ignore[no-untyped-call]
                self._in_flight.popleft()
        return moved


def _wait_for(device: torch.device) -> None:
    torch.cuda.current_stream(device).synchronize()
