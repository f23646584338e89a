"""One pass over the training data: its windows, and how it begins in the middle."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import (
    BatchSampler,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from harness.data.loaders import num_batches
from harness.rng import (
    find_generators,
    get_cpu_rng_state,
    get_rng_state,
    set_cpu_rng_state,
    set_rng_state,
    spawn_cpu_rng_state,
)

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


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
    Where the order may depend on numbers drawn on the way, those are kept apart from what
    the model draws (``_Apart``), so that passing over draws the same.
    """

    def __init__(self, loader: Any, accelerator: Accelerator, epoch: int) -> None:
        self._loader, self._accelerator = loader, accelerator
        self._ahead: deque[Any] = deque()
        self._own = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        tell_epoch(loader, epoch)
        self._generators = find_generators(loader)
        self._began: Mapping[str, Any] | None = None
        self._done, self._left, self._epoch = 0, 0, epoch

    def state_dict(self) -> dict[str, Any]:
        """Random state before the first batch, or the loader's own state."""
        return {
            "began": self._began,
            "ahead": list(self._ahead) if self._own else len(self._ahead),
            "window": self._accelerator.window,
            "loader": self._loader.state_dict() if self._own else None,
        }

    def load_state_dict(self, state: Mapping[str, Any], done: int) -> None:
        """Begin after `done` batches; the random state of that moment is set afterwards."""
        self._began, self._done = state["began"], done
        self._accelerator.window = state["window"]
        if self._own:
            self._ahead.extend(state["ahead"])
            self._loader.load_state_dict(state["loader"])
            return
        if getattr(self._loader, "persistent_workers", False) and self._epoch > 1:
            iter(
                self._loader
            )  # starts workers, which draws; later epochs only reset them
        set_rng_state(state["began"], self._generators)
        self._left = state["ahead"]

    def start(self) -> Iterator[Any]:
        """Make the loader's iterator, past what is done; the batches follow from it."""
        if self._began is None:
            self._began = get_rng_state(self._generators)
        batches: Iterator[Any] = iter(self._loader)
        if not self._own:
            if draws_on_the_way(self._loader):
                batches = _Apart(batches)
            skip(batches, self._done)
            self._ahead.extend(islice(batches, self._left))
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


def draws_on_the_way(loader: Any) -> bool:
    """True if the order of the data may depend on numbers drawn between batches.

    torch's samplers draw theirs before the first batch, and worker processes have
    generators of their own.
    """
    dataset, workers = (
        getattr(loader, "dataset", None),
        getattr(loader, "num_workers", 0),
    )
    if isinstance(dataset, IterableDataset):
        return workers == 0
    batches = getattr(loader, "batch_sampler", None)
    samplers = [getattr(loader, "sampler", None)]
    if batches is not None:
        samplers = [getattr(batches, "sampler", None)]
        if type(batches) is not BatchSampler:
            return True
    return not all(isinstance(item, KNOWN) for item in samplers)


KNOWN = (
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
"""Samplers that draw all their random numbers before the first batch."""


class _Apart:
    """An iterator whose random numbers are a stream of their own.

    The stream is seeded by the global generators; what is drawn outside afterwards does
    not change it, nor the other way round. Devices' generators are left alone.
    """

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches, self._inside = batches, spawn_cpu_rng_state()

    def __iter__(self) -> _Apart:
        return self

    def __next__(self) -> Any:
        outside = get_cpu_rng_state()
        set_cpu_rng_state(self._inside)
        try:
            return next(self._batches)
        finally:
            self._inside = get_cpu_rng_state()
            set_cpu_rng_state(outside)


def skip(batches: Any, count: int) -> None:
    """Pass over batches: by their indices where nothing else depends on the fetching."""
    # torch 2.13: the iterator of a loader without workers; there is no public way.
    is_plain = type(batches).__name__ == "_SingleProcessDataLoaderIter"
    if is_plain and not isinstance(batches._dataset, IterableDataset):
        batches = batches._sampler_iter
    for _ in islice(batches, count):
        pass
