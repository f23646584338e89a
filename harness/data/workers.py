"""Worker processes of loaders: they leave signals to the main process, and end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.synchronize import Event
from typing import Any

from torch.utils.data import DataLoader

from harness.data.processes import Process, end_with
from harness.data.row_batches import iter_rows
from harness.data.tensors import TensorLoader, iter_tensors
from harness.signals import GROUP_SIGNALS


def iter_batches(loader: Any) -> Iterator[Any]:
    """Return an iterator of a loader whose workers leave signals to the main process.

    A loader of tensors reads each batch by one indexing, and one of rows without workers reads
    them with less around each batch, in the same order.

    If the main process handles a signal, such as Ctrl-C, it still needs the batches that its
    workers prepare. So a worker ignores it, except SIGTERM after the end of a pass. Signals
    are blocked in a worker until it starts to read data.

    If the main process is killed, its workers end, too. torch's own workers notice it only
    where the main process is their parent, and not while they read data.
    """
    if type(loader) in {DataLoader, TensorLoader}:
        found = iter_tensors(loader) or iter_rows(loader)
        if found is not None:
            return found
    numbers = [n for n in GROUP_SIGNALS if callable(signal.getsignal(n))]
    # A loader that is divided over ranks, or limited, has workers in the loaders below it.
    is_wrapped = hasattr(loader, "undivided") or hasattr(loader, "unlimited")
    has_workers = getattr(loader, "num_workers", 0) and not is_wrapped
    if not has_workers or not hasattr(signal, "pthread_sigmask"):
        return iter(loader)
    _start_helpers(loader, numbers)
    own = loader.worker_init_fn
    with _blocking(numbers) as blocked:
        try:
            loader.worker_init_fn = _WorkerInit(own, blocked, Process.current())
            return iter(loader)
        finally:
            loader.worker_init_fn = own


@contextmanager
def _blocking(numbers: Iterable[int]) -> Iterator[list[int]]:
    """Block signals for this thread and the processes that it starts; yields the new ones."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield sorted(set(numbers) - before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_helpers(loader: Any, numbers: Iterable[int]) -> None:
    """Start the two processes that multiprocessing starts only once.

    The resource tracker ignores Ctrl-C and SIGTERM, but SIGUSR1 must be blocked. The fork
    server must not inherit a block, because other processes of the user come from it.
    """
    context = loader.multiprocessing_context or multiprocessing.get_context()
    method = context.get_start_method()
    if method == "fork":
        return
    from multiprocessing import forkserver, resource_tracker  # noqa: PLC0415  Unix only

    with _blocking(numbers):
        resource_tracker.ensure_running()
    if method == "forkserver":
        forkserver.ensure_running()


@dataclass(frozen=True, slots=True)
class _WorkerInit:
    """What a worker calls first: set its signal handlers, then call the user's function."""

    own: Callable[[int], object] | None
    numbers: list[int]
    main: Process

    def __call__(self, worker: int) -> None:
        end_with(self.main)
        for number in self.numbers:
            is_term = number == signal.SIGTERM
            signal.signal(number, _EndIfDone() if is_term else signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.numbers)
        if self.own is not None:
            self.own(worker)


class _EndIfDone:
    """Handler of SIGTERM: by it torch ends a worker that hangs when the pass is over."""

    def __init__(self) -> None:
        # torch 2.13 passes the event to the worker process, and there is no public way.
        arguments = multiprocessing.current_process()._args  # type: ignore[attr-defined]
        events = [item for item in arguments if isinstance(item, Event)]
        self._done = events[0] if events else None

    def __call__(self, number: int, _: object) -> None:
        # In a thread, because this one may hold the lock of the event.
        threading.Thread(target=self._end, args=[number], daemon=True).start()

    def _end(self, number: int) -> None:
        if self._done is None or self._done.is_set():
            os._exit(128 + number)
