"""One pass over the training data: its windows, and how it begins in the middle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from harness.data import num_batches
from harness.randomness import generators_of, random_state, set_random_state

if TYPE_CHECKING:
    from harness.accelerator.base import Accelerator


class TrainPass:
    """Batches of one epoch; the accelerator learns how many each optimizer step averages.

    Parameters
    ----------
    loader
        Loader of the training data.
    accelerator
        Its ``window`` is set before the first batch of each optimizer step.
    epoch : >= 1
        Told to samplers and data sets that have ``set_epoch``.

    Notes
    -----
    Without a length, the batches of a window are fetched together, to know a short last
    one. A loader with ``state_dict`` and ``load_state_dict`` goes on by those; any other
    begins again from the random state it had, and passes over the batches already done.
    """

    def __init__(self, loader: Any, accelerator: Accelerator, epoch: int) -> None:
        self._loader, self._accelerator = loader, accelerator
        self._ahead: deque[Any] = deque()
        self._own = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        tell_epoch(loader, epoch)
        self._generators = generators_of(loader)
        self._began: Mapping[str, Any] | None = None
        self._done = 0

    def state_dict(self) -> dict[str, Any]:
        """Random state before the first batch, and the batches that were fetched ahead."""
        return {
            "began": self._began,
            "ahead": list(self._ahead),
            "window": self._accelerator.window,
            "loader": self._loader.state_dict() if self._own else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], done: int) -> None:
        """Begin after `done` batches; the random state of that moment is set afterwards."""
        self._began, self._done = state["began"], done
        self._ahead.extend(state["ahead"])
        self._accelerator.window = state["window"]
        if self._own and state["loader"] is not None:
            self._loader.load_state_dict(state["loader"])
        else:
            set_random_state(self._began, self._generators)

    def start(self) -> Iterator[Any]:
        """Make the loader's iterator, past what is done; the batches follow from it."""
        if self._began is None:
            self._began = random_state(self._generators)
        batches: Iterator[Any] = iter(self._loader)
        if self._done and not self._own:
            skip(batches, self._done + len(self._ahead))
        if self._accelerator.accumulate == 1:
            return batches
        return self._windows(batches)

    def _windows(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches, with the window told before the first one of each."""
        accelerator, done = self._accelerator, self._done
        size, total = accelerator.accumulate, num_batches(self._loader)
        into = done % size
        while True:
            if total is not None:
                window = min(size, total - (done - into))
                left = window - into
                if left <= 0:
                    return
                accelerator.window = window
                yield from islice(batches, left)
                done += left
            else:
                if not self._ahead:
                    self._ahead.extend(islice(batches, size))
                    accelerator.window = len(self._ahead)
                if not self._ahead:
                    return
                while self._ahead:
                    yield self._ahead.popleft()
            into = 0


def tell_epoch(loader: Any, epoch: int) -> None:
    """Call ``set_epoch``, from 0 as torch counts, where a loader or its parts have it."""
    parts = (loader, getattr(loader, "sampler", None), getattr(loader, "dataset", None))
    for part in parts:
        if part is not None and hasattr(part, "set_epoch"):
            part.set_epoch(epoch - 1)
            return


def skip(batches: Any, count: int) -> None:
    """Pass over batches: by their indices where nothing else depends on the fetching."""
    # torch 2.13: the iterator of a loader without workers; there is no public way.
    is_plain = type(batches).__name__ == "_SingleProcessDataLoaderIter"
    if is_plain and not isinstance(batches._dataset, IterableDataset):
        batches = batches._sampler_iter
    for _ in islice(batches, count):
        pass
