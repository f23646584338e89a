"""Which rows of a step belong to which rank."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class RankShare:
    """One rank's part of a step."""

    #: index of the rank's first sample in the order of the whole loader (>= 0)
    start: int
    #: Samples of this rank that count. 0 means that its batch is a placeholder because
    #: the rank has no samples left in this step (>= 0).
    count: int
    total: int  #: samples of all ranks in the step (>= 1)

    @classmethod
    def of_counts(cls, place: int, counts: Sequence[int], rank: int) -> RankShare:
        """The share of a rank, from the samples of the first ranks; others have none."""
        own = counts[rank] if rank < len(counts) else 0
        return cls(place + sum(counts[:rank]), own, max(1, sum(counts)))

    def weight(self, world_size: int) -> float:
        """Factor for a mean loss, so that the average over ranks is the mean over samples."""
        return self.count * world_size / self.total


@dataclass(frozen=True, slots=True)
class RowSplit:
    """How the rows of a loader are divided over ranks, step by step."""

    size: int  #: rows that fill a rank's batch (>= 1)
    drops_last: bool  #: leave out the last step if it is not full
    rank: int
    world_size: int
    #: Give no rank a single row in a step that is not full, if there are more: the last
    #: ranks get none instead.
    has_pairs: bool = False

    @property
    def num_rows(self) -> int:
        """Rows of all ranks in a full step."""
        return self.size * self.world_size

    def count_steps(self, num_rows: int) -> int:
        """Steps that a number of rows gives."""
        full, rest = divmod(num_rows, self.num_rows)
        return full + bool(rest and not self.drops_last)

    def assign(self, total: int) -> tuple[int, int]:
        """First row, and number of rows, of this rank in a step of `total` rows.

        Examples
        --------
        >>> [RowSplit(3, False, rank, 3).assign(7) for rank in range(3)]
        [(0, 3), (3, 2), (5, 2)]
        >>> [RowSplit(3, False, rank, 2, has_pairs=True).assign(3) for rank in range(2)]
        [(0, 3), (3, 0)]
        """
        assert 1 <= total <= self.num_rows
        is_paired = self.has_pairs and self.size > 1 and total < self.num_rows
        used = (
            min(self.world_size, max(1, total // 2)) if is_paired else self.world_size
        )
        if self.rank >= used:
            return total, 0
        each, more = divmod(total, used)
        return self.rank * each + min(self.rank, more), each + (self.rank < more)

    def divide(
        self, steps: Iterable[list[T]]
    ) -> Iterator[tuple[list[T], RankShare, list[T]]]:
        """Yield this rank's rows of each step, or a placeholder, their share, and the step."""
        place = 0
        for step in steps:
            if len(step) < self.num_rows and self.drops_last:
                return
            start, count = self.assign(len(step))
            own = step[start : start + count] or step[: self.size]
            yield own, RankShare(place + start, count, len(step)), step
            place += len(step)


class ShareTracker:
    """Keeps the share of the present batch.

    Loaders may be read ahead, so a share is kept until its batch goes to the device.

    Parameters
    ----------
    num_recent : >= 1
        Batches that may be read ahead.

    Attributes
    ----------
    present : RankShare or None
        Share of the present batch; None if the loader is not divided over ranks.
    """

    def __init__(self, num_recent: int) -> None:
        self.present: RankShare | None = None
        # Apart, because a validation may come while training batches are read ahead.
        self._recent = {
            is_train: deque[tuple[object, RankShare]](maxlen=num_recent)
            for is_train in (True, False)
        }

    def record(self, batch: T, share: RankShare, *, is_train: bool) -> T:
        """Make a batch the present one, from the training loader or another; returns it."""
        self._recent[is_train].append((batch, share))
        self.present = share
        return batch

    def select(self, batch: object) -> None:
        """Make a recorded batch the present one again."""
        for recent in self._recent.values():
            for place, (recorded, share) in enumerate(recent):
                if recorded is batch:
                    self.present = share
                    del recent[place]
                    return

    def clear(self) -> None:
        """Forget the present batch, at the end of a pass."""
        self.present = None
