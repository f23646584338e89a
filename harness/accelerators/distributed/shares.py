"""Which rows of a step belong to which rank."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RankShare:
    """One rank's part of a step."""

    #: index of the rank's first sample in the order of the whole loader (>= 0)
    start: int
    #: Samples of this rank that count. 0 means that its batch is a placeholder because
    #: the rank has no samples left in this step (>= 0).
    count: int
    total: int  #: samples of all ranks in the step (>= 1)

    def weight(self, world_size: int) -> float:
        """Factor for a mean loss, so that the average over ranks is the mean over samples."""
        return self.count * world_size / self.total


def assign_rows(
    total: int, size: int, rank: int, world_size: int, *, has_pairs: bool = False
) -> tuple[int, int]:
    """First sample and number of samples of a rank in a step of `total` samples.

    Parameters
    ----------
    total : in 1..size * world_size
        Samples in the step.
    size : >= 1
        Samples that fill a rank's batch.
    has_pairs
        Give no rank a single sample in a step that is not full, if there are more: the last
        ranks get none instead.

    Examples
    --------
    >>> [assign_rows(7, 3, rank, 3) for rank in range(3)]
    [(0, 3), (3, 2), (5, 2)]
    >>> [assign_rows(3, 3, rank, 2, has_pairs=True) for rank in range(2)]
    [(0, 3), (3, 0)]
    """
    assert 1 <= total <= size * world_size
    is_paired = has_pairs and size > 1 and total < size * world_size
    used = min(world_size, max(1, total // 2)) if is_paired else world_size
    if rank >= used:
        return total, 0
    each, more = divmod(total, used)
    return rank * each + min(rank, more), each + (rank < more)


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
        self._recent, self._recent_eval = (
            deque[tuple[object, RankShare]](maxlen=num_recent) for _ in range(2)
        )

    def record(self, batch: object, share: RankShare) -> Any:
        """Make a batch from the training loader the present one; returns the batch."""
        self._recent.append((batch, share))
        self.present = share
        return batch

    def record_eval(self, batch: object, share: RankShare) -> Any:
        """Make a batch from another loader the present one; returns the batch."""
        self._recent_eval.append((batch, share))
        self.present = share
        return batch

    def select(self, batch: object) -> None:
        """Make a recorded batch the present one again."""
        for recent in (self._recent, self._recent_eval):
            for place, (recorded, share) in enumerate(recent):
                if recorded is batch:
                    self.present = share
                    del recent[place]
                    return

    def clear(self) -> None:
        """Forget the present batch, at the end of a pass."""
        self.present = None
