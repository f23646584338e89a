"""The states of the ranks that saved a checkpoint, each read when it is first needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path

from harness.checkpoint.format import INDEX, Manifest, read_index, read_rank
from harness.errors import CheckpointError
from harness.pytree import StateDict
from harness.reshard.index import PartIndex, make_index, summarize_part
from harness.reshard.model_part import MODEL_PART

RANK_STATE_KEYS = (
    *("accelerator", "callbacks", "extra", "journal", "pass", "random", "records"),
)
"""Keys that the state of every rank must have."""


NUM_OPEN = 4
"""Parts that stay open, beside that of rank 0, which is asked most often."""


class LazyStates(Sequence[StateDict]):
    """States by rank, each read when it is asked for; the first and the last few are kept.

    So a walk over all ranks has a few parts open at a time.

    Parameters
    ----------
    world_size : >= 1
        Number of states.
    """

    def __init__(self, world_size: int, read: Callable[[int], StateDict]) -> None:
        self._world_size, self._read = world_size, read
        self.known: dict[int, StateDict] = {}

    def __len__(self) -> int:
        return self._world_size

    def __getitem__(self, rank: int) -> StateDict:  # type: ignore[override]
        if not 0 <= rank < self._world_size:
            raise IndexError(f"a rank below {self._world_size}, got {rank}")
        if rank not in self.known:
            self.known[rank] = self._read(rank)
            for number in [*self.known][:-NUM_OPEN]:
                if number:
                    del self.known[number]
        return self.known[rank]


class SavedRanks:
    """The parts of a checkpoint whose files were compared with its manifest.

    Attributes
    ----------
    states
        State of each rank; tensors are views into the files.
    accelerators
        State of the accelerator of each rank. Of parts that are not in `states`, nothing
        else is restored.
    callbacks
        States of the callbacks on each rank, likewise.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path, self._manifest = path, manifest
        self.states = LazyStates(manifest.world_size, self._read_state)
        self.accelerators, self.callbacks = (
            LazyStates(manifest.world_size, partial(self._read, key))
            for key in ("accelerator", "callbacks")
        )

    def _read_state(self, rank: int) -> StateDict:
        return check_keys(read_rank(self._path, rank, is_mapped=True))

    def _read(self, key: str, rank: int) -> StateDict:
        if rank in self.states.known:
            found: StateDict = self.states[rank][key]
            return found
        return dict(read_rank(self._path, rank, is_mapped=True, key=key))

    def open_model_parts(self, callback: str) -> LazyStates:
        """The parts of the model that a callback kept on each rank."""
        return LazyStates(
            len(self.states), lambda rank: self.callbacks[rank][callback][MODEL_PART]
        )

    @cached_property
    def written_index(self) -> PartIndex | None:
        """The index of the parts; None if there is one part, or an earlier version saved."""
        is_there = INDEX in self._manifest.files
        return read_index(self._path, self._manifest) if is_there else None

    @cached_property
    def index(self) -> PartIndex:
        """The index of the parts; where none was written, it is made from all of them."""
        if self.written_index is not None:
            return self.written_index
        return make_index([summarize_part(state) for state in self.states])


def check_keys(state: object) -> StateDict:
    """Return the state of a rank, if it has the keys that every fit saves."""
    found = state if isinstance(state, dict) else {}
    missing = [name for name in RANK_STATE_KEYS if name not in found]
    if missing or not isinstance(found["accelerator"], dict):
        msg = f"resume: expected the state of a fit, got one without {missing}."
        raise CheckpointError(f"{msg} Take another checkpoint.")
    return dict(found)
