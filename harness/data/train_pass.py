"""One pass over the training data: accumulation windows, and a start in the middle."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from torch.utils.data import IterableDataset

from harness.data.batch import Batch, copy_by_value
from harness.data.loaders import num_batches, reads_rows_by_torch
from harness.data.pace import LimitedLoader
from harness.data.row_batches import RowBatches
from harness.data.stateful import (
    Note,
    find_stateful,
    get_states,
    set_states,
    update_states,
    walk_parts,
)
from harness.data.workers import iter_batches
from harness.pytree import StateDict, find_unkept_kind
from harness.rng import (
    Generators,
    derive_stream,
    find_generators,
    get_cpu_rng_state,
    get_rng_state,
    is_same_stream,
    set_cpu_rng_state,
    set_rng_state,
)

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


class TrainPass:
    """The batches of one epoch, with the accumulation window that each belongs to.

    Parameters
    ----------
    accelerator
        Its ``window`` is set before the first batch of each optimizer step.
    epoch : >= 1
        Passed to samplers and data sets that have ``set_epoch``.
    generators
        Random generators that the order may depend on; None: those of the loader.
    is_after_end
        Whether the pass before has read all of its data.

    Attributes
    ----------
    is_due
        Whether a validation within the epoch follows the last batch.
    is_paused
        Whether it has begun or is done, and no other batch has come yet.
    is_read
        Whether a loader that saves its own position has given its last batch. Its state may
        then be that of the next pass.
    is_at_end
        Whether this pass has read all data, as far as a part of the loader saves its state.
    notes
        What a resume reports on data sets and samplers that save their state.
    fields
        Attributes of other data sets and samplers before the pass.

    Notes
    -----
    The batches of a window are fetched together, because the last window may be short and a
    length may be wrong. Only torch's own loaders of rows are known to end at their length,
    so nothing is fetched ahead from them.

    A loader with ``state_dict`` and ``load_state_dict`` resumes by those. Any other loader
    restarts from its random state before the epoch, and the batches that are done are
    skipped. If the order may depend on random numbers drawn between batches, the loader
    draws apart from the model (``_SeparateStream``), so skipping draws the same numbers as
    training did. Data sets and samplers that save their own state get the one before the
    epoch.
    """

    def __init__(
        self,
        loader: Any,
        accelerator: Accelerator,
        epoch: int,
        generators: Generators | None = None,
        *,
        is_saved: bool = True,
        is_after_end: bool = False,
    ) -> None:
        self._loader, self._accelerator = loader, accelerator
        self._prefetched: deque[Batch] = deque()
        self._has_state = hasattr(loader, "state_dict") and hasattr(
            loader, "load_state_dict"
        )
        set_epoch(loader, epoch)
        self._generators = (
            Generators(find_generators(loader)) if generators is None else generators
        )
        self._start_state: StateDict | None = None
        self._left_at: dict[str, int] = {}
        self._apart: _SeparateStream | None = None
        self._saved_draws: StateDict | None = None
        self._num_done, self._num_to_prefetch, self._epoch = 0, 0, epoch
        self._has_workers = self._keeps_workers()
        self.is_due = self.is_paused = self.is_read = self.is_at_end = False
        self._parts, self._is_saved = find_stateful(loader), is_saved
        self._part_states: StateDict | None = None
        self._saved_parts: StateDict = {}
        self._is_after_end = is_after_end
        self.notes: list[Note] = []
        self.fields: StateDict = {}

    def state_dict(self) -> StateDict:
        """Random state before the first batch, or the state of the loader."""
        ahead = list(self._prefetched) if self._has_state else len(self._prefetched)
        draws = {} if self._apart is None else {"draws": self._apart.state_dict()}
        parts: StateDict = {}
        if self._parts and self._start_state is not None:
            parts["parts"] = {
                "began": self._part_states,
                "now": get_states(self._parts),
                "is_after_end": self._is_after_end,
            }
        return {
            **draws,
            **parts,
            "began": self._start_state,
            "apart": self._left_at,
            "ahead": ahead,
            "window": self._accelerator.window,
            "has_workers": self._has_workers,
            "is_due": self.is_due,
            "is_paused": self.is_paused,
            "is_read": self.is_read,
            "loader": self._loader.state_dict() if self._has_state else None,
        }

    def load_state_dict(self, state: StateDict, num_done: int) -> None:
        """Start after `num_done` batches; the caller then restores the random state."""
        self._start_state, self._num_done = state["began"], num_done
        self._left_at = state.get("apart", {})  # missing in older checkpoints
        self._saved_draws = state.get("draws")
        self.is_due = state.get("is_due", False)
        self.is_paused = state.get("is_paused", False)
        self.is_read = state.get("is_read", False)
        self._accelerator.window = state["window"]
        self._saved_parts = state.get("parts", {})  # missing in older checkpoints
        if self._has_state:
            self._prefetched.extend(state["ahead"])
            self._loader.load_state_dict(state["loader"])
            return
        # Older checkpoints do not tell whether an earlier epoch had started the workers.
        self._has_workers = state.get("has_workers", self._epoch > 1)
        if getattr(self._loader, "persistent_workers", False) and self._has_workers:
            # Starting workers draws a number; later epochs only reset them.
            iter_batches(self._loader)
        if self._parts and self._saved_parts:
            self._part_states = self._saved_parts["began"]
            self._is_after_end = self._saved_parts["is_after_end"]
            set_states(
                self._loader,
                self._parts,
                self._saved_parts["began"],
                is_after_end=self._is_after_end,
            )
        set_rng_state(state["began"], self._generators, self._accelerator.device)
        self._num_to_prefetch = state["ahead"]

    def _keeps_workers(self) -> bool:
        """Whether the loader has persistent workers from an earlier epoch."""
        # torch 2.13: the iterator that persistent workers belong to; no public way.
        return getattr(self._loader, "_iterator", None) is not None

    def check_kept_batches(self) -> None:
        """Check that a checkpoint can hold the batches that were fetched ahead.

        Raises
        ------
        TypeError
            If they are kept, because the loader saves its own position, and have parts of
            another kind than tensors, numbers, text, lists, tuples and dicts.
        """
        if not self._has_state:
            return
        for batch in self._prefetched:
            kind = find_unkept_kind(batch)
            if kind is not None:
                msg = (
                    "data: expected batches of tensors, lists, tuples and dicts from a"
                )
                place = (
                    "loader that saves its own position, to accumulate and checkpoint"
                )
                advice = "Use accumulate=1, or a loader without state_dict."
                raise TypeError(f"{msg} {place}, got {kind.__name__}. {advice}")

    def start(self) -> Iterator[Batch]:
        """Make the loader's iterator and skip what is done; yields the other batches."""
        if self._start_state is None:
            self._start_state = get_rng_state(
                self._generators, self._accelerator.device
            )
        if self._parts and self._is_saved and self._part_states is None:
            # A loader may make an iterator to tell its state, unless it has one that is
            # finished: beside the random numbers that ranks share.
            is_told = self._is_after_end
            own = {p: o for p, o in self._parts.items() if is_told or p != "loader"}
            self._part_states = get_states(own)
        batches: Iterator[Batch] = iter_batches(self._loader)
        if not self._has_state:
            if draws_between_batches(self._loader):
                batches = self._apart = _SeparateStream(batches, self._left_at)
            skip_batches(batches, self._num_done)
            self._prefetch(batches, self._num_to_prefetch)
            if self._apart is not None and self._saved_draws is not None:
                self._apart.load_state_dict(self._saved_draws)
            if self._parts:
                batches = self._follow_parts(batches)
        else:
            batches = self._take_rest(batches)
        if self._accelerator.accumulate == 1:
            return batches
        if reads_rows_by_torch(self._loader):
            return self._count_windows(batches)
        return self._prefetch_windows(batches)

    def _take_rest(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Return what is left of a loader that saves its own position."""
        rest = None
        if isinstance(self._loader, LimitedLoader):
            num_given = self._num_done + len(self._prefetched)
            rest = max(0, self._loader.limit - num_given)  # it may be lower than before
        if rest == 0 or self.is_read:
            next(batches, None)  # a loader may take up its position only now
            num_given = self._num_done + len(self._prefetched)
            self.is_at_end = self.is_read and self._is_below_limit(num_given)
            return iter(())
        return self._note_end(islice(batches, rest))

    def _note_end(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        num_given = self._num_done + len(self._prefetched)
        for batch in batches:
            num_given += 1
            yield batch
        self.is_at_end = self._is_below_limit(num_given)
        self.is_read = self._has_state or "loader" in self._parts

    def _is_below_limit(self, num_given: int) -> bool:
        """Whether the data ended after so many batches, and not the limit of the pass."""
        is_limited = isinstance(self._loader, LimitedLoader)
        return not is_limited or num_given < self._loader.limit

    def _follow_parts(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Compare the parts with the saved fit after the batches that are done."""
        if "now" in self._saved_parts and not self.is_read:
            saved = self._saved_parts["now"]
            self.notes, is_late = update_states(self._parts, saved)
            # Every rank iterates the loader at the same time.
            if self._accelerator.any(is_late) and not self._prefetched:
                anew: Iterator[Batch] = iter_batches(self._loader)
                if isinstance(self._loader, LimitedLoader):
                    anew = islice(anew, max(0, self._loader.limit - self._num_done))
                if self._apart is not None:
                    self._apart.batches = anew
                batches = self._apart or anew
        return self._note_end(batches)

    def _prefetch(self, batches: Iterator[Batch], count: int) -> None:
        """Fetch copies of the next batches; a loader may reuse its tensors."""
        copy = getattr(self._loader, "copy_batch", copy_by_value)
        # Only a whole window: a loader that fails within it leaves none of its batches.
        self._prefetched.extend([copy(batch) for batch in islice(batches, count)])

    def _count_windows(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of a loader whose length holds; a resume may start inside a window."""
        size, num_done = self._accelerator.accumulate, self._num_done
        total = num_batches(self._loader)
        assert total is not None
        while num_done < total:
            start = num_done // size * size
            self._accelerator.window = min(size, total - start)
            left = start + self._accelerator.window - num_done
            yield from islice(batches, left)
            num_done += left

    def _prefetch_windows(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches of any loader, fetched a window at a time."""
        while True:
            if not self._prefetched:
                self._prefetch(batches, self._accelerator.accumulate)
                if not self._prefetched:
                    return
                self._accelerator.window = len(self._prefetched)
            while self._prefetched:
                yield self._prefetched.popleft()


def set_epoch(loader: object, epoch: int) -> None:
    """Call every ``set_epoch`` of a loader and its parts once; torch counts from 0."""
    for own in find_epoch_setters(loader):
        own(epoch - 1)


def find_epoch_setters(loader: object) -> list[Callable[[int], object]]:
    """Find every ``set_epoch`` of a loader and its parts.

    The parts are its sampler, its batch sampler, the sampler in that, and the data set, also
    behind wrappers that keep what they wrap as ``sampler`` or ``dataset``. A loader that is
    divided over ranks passes the epoch on itself.
    """
    found: dict[int, Callable[[int], object]] = {}
    for _, part in walk_parts(loader, lambda part: hasattr(part, "undivided")):
        own = getattr(part, "set_epoch", None)
        if callable(own):
            # The owner is another part if a wrapper delegates.
            found.setdefault(id(getattr(own, "__self__", part)), own)
    return list(found.values())


def draws_between_batches(loader: object) -> bool:
    """True if the order of the data may depend on numbers drawn between batches.

    torch's samplers draw theirs before the first batch, and worker processes have their
    own generators. A loader that several ranks read alike keeps a stream itself.
    """
    if getattr(loader, "has_random_stream", False):
        return False
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return bool(getattr(loader, "num_workers", 0) == 0)
    return not reads_rows_by_torch(loader)


class _SeparateStream:
    """An iterator that draws the same random numbers whatever is drawn outside.

    It shares each of the global CPU generators with the outside as long as only one of the
    two draws from it, as in a plain loop. Once both do, the iterator continues with a
    stream of its own. Generators of devices are not involved.

    Parameters
    ----------
    left_at
        Batches that were fetched before the iterator got its own stream, by generator.
        Filled in here; after a resume, that of the interrupted pass.
    """

    def __init__(self, batches: Iterator[object], left_at: dict[str, int]) -> None:
        self.batches, self._left_at = batches, left_at
        self._inside, self._num_fetched = get_cpu_rng_state(), 0

    def state_dict(self) -> StateDict:
        """Where the iterator's streams are, and after how many batches."""
        return {"fetched": self._num_fetched, "inside": dict(self._inside)}

    def load_state_dict(self, state: StateDict) -> None:
        """Continue the saved streams, unless other batches were skipped, as on other ranks.

        Skipping may have drawn more or less: how many numbers a choice takes depends on how
        many things there are to choose from, such as games in a buffer.
        """
        if state["fetched"] == self._num_fetched:
            self._inside = dict(state["inside"])

    def __iter__(self) -> _SeparateStream:
        return self

    def __next__(self) -> Batch:
        outside, inside, left_at = get_cpu_rng_state(), self._inside, self._left_at
        for name, state in inside.items():
            if name not in left_at and not is_same_stream(state, outside[name]):
                left_at[name] = self._num_fetched
            if left_at.get(name) == self._num_fetched:
                inside[name] = derive_stream(name, state)
        if left_at:
            set_cpu_rng_state(inside)
        try:
            return next(self.batches)
        finally:
            self._inside = get_cpu_rng_state()
            self._num_fetched += 1
            if left_at:
                shared = {n: s for n, s in self._inside.items() if n not in left_at}
                set_cpu_rng_state(outside | shared)


def skip_batches(batches: Any, count: int) -> None:
    """Skip batches; only their indices are drawn if the order depends on nothing else."""
    # torch 2.13: the iterator of a loader without workers; there is no public way.
    is_plain = type(batches).__name__ == "_SingleProcessDataLoaderIter"
    if isinstance(batches, RowBatches):
        batches = batches.indices
    elif is_plain and not isinstance(batches._dataset, IterableDataset):
        batches = batches._sampler_iter
    for _ in islice(batches, count):
        pass
