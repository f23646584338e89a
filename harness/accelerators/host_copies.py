"""Copies of tensors in host memory, made while the device goes on.

Copies from a CUDA device go into pinned memory, by a stream of their own. The host does not
wait for them: what the device computes next does, and whoever reads the copies waits for an
event.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from harness.accelerators.pinned import keep_if_failed


class CudaCopyStream:
    """Copies from a CUDA device by a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Let the copies wait for what the device has been asked to compute."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def copy(self, host: Tensor, live: Tensor) -> None:
        """Queue a copy."""
        with torch.cuda.stream(self._stream):
            host.copy_(live, non_blocking=True)

    def end(self) -> Callable[[], object]:
        """Let what the device is asked to do next wait for the copies.

        Returns
        -------
        Function that waits until the copies are made, in any thread.
        """
        # Blocking: the thread that waits sleeps, and takes no core from training.
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._stream)
        # The next step changes the tensors that are being copied.
        torch.cuda.current_stream(self._device).wait_event(event)
        return event.synchronize

    def synchronize(self) -> None:
        """Wait until all copies are made; raises what torch does if the device has failed."""
        self._stream.synchronize()


class HostCopies:
    """Copies of tensors by name, in memory that is kept for the next copies.

    Parameters
    ----------
    make_stream
        Makes the stream of a CUDA device.
    """

    def __init__(
        self, make_stream: Callable[[torch.device], CudaCopyStream] = CudaCopyStream
    ) -> None:
        self._make_stream = make_stream
        self._streams: dict[torch.device, CudaCopyStream] = {}
        self._copies: dict[str, Tensor] = {}
        weakref.finalize(self, _keep_if_failed, self._copies, self._streams)

    def __bool__(self) -> bool:
        return bool(self._copies)

    def allocate(
        self, live: Mapping[str, tuple[torch.Size, torch.dtype, bool]]
    ) -> None:
        """Allocate memory for copies, and touch it, which takes longer than the copy.

        Parameters
        ----------
        live
            Shape and dtype of each tensor, and whether it is on a CUDA device.
        """
        for name, (shape, dtype, is_cuda) in live.items():
            self._copies[name] = _make_empty(shape, dtype, is_cuda=is_cuda).zero_()

    def copy(
        self, live: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Callable[[], None]]:
        """Copy tensors; earlier copies are overwritten.

        Parameters
        ----------
        live
            Tensors of any device, by name. They may be changed when this returns.

        Returns
        -------
        The copies, and a function that waits, in any thread, until they are all made.
        """
        copies, busy = {}, set()
        for name, tensor in live.items():
            old = self._copies.get(name)
            if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
                old = _make_empty(tensor.shape, tensor.dtype, is_cuda=tensor.is_cuda)
            copies[name] = old
            if not tensor.is_cuda:
                # A copy from a device of another kind is made when this returns.
                old.copy_(tensor)
                continue
            if tensor.device not in self._streams:
                self._streams[tensor.device] = self._make_stream(tensor.device)
            stream = self._streams[tensor.device]
            if tensor.device not in busy:
                stream.begin()
                busy.add(tensor.device)
            stream.copy(old, tensor)
        self._copies.clear()
        self._copies.update(copies)
        waits = [self._streams[device].end() for device in busy]
        return copies, partial(_wait_for, waits)


def _make_empty(shape: torch.Size, dtype: torch.dtype, *, is_cuda: bool) -> Tensor:
    """Memory of the host: pinned for a CUDA device, as far as the system lets it be."""
    if is_cuda:
        try:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        except (
            RuntimeError
        ):  # more than may be locked: the copies are slower, and right
            pass
    return torch.empty(shape, dtype=dtype)


def _keep_if_failed(
    copies: Mapping[str, Tensor], streams: Mapping[torch.device, CudaCopyStream]
) -> None:
    for stream in streams.values():
        keep_if_failed(copies, stream.synchronize)


def _wait_for(waits: list[Callable[[], object]]) -> None:
    for wait in waits:
        wait()
