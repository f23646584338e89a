"""The journal of a rank that has nothing of its own to record yet."""

from __future__ import annotations

from pathlib import Path

from tracking.journal.block import Block
from tracking.journal.reader import get_rank, list_blocks
from tracking.journal.segment import CAPACITY
from tracking.journal.writer import Journal


class LateJournal(Journal):
    """Stands for a journal until there is a row: it has no file, lock or thread.

    Parameters
    ----------
    rank_dir
        Folder of the rank's records, which may not exist.
    """

    def __init__(self, rank_dir: Path) -> None:
        self.rank_dir = rank_dir
        self.rank = get_rank(rank_dir)
        self.block = Block(0)
        self._init_state()
        self._last_seq: int | None = None

    def last_seq(self) -> int:
        """Return the highest ``seq`` that an earlier process may have written."""
        if self._last_seq is None:
            present = list_blocks(self.rank_dir)
            self._last_seq = (present[-1] + 1) * CAPACITY - 1 if present else -1
        return self._last_seq

    def begin_close(self) -> None:
        """Take no more rows."""
        if not self._why_closed:
            self._refuse_rows(self._describe_end())

    def close(self) -> None:
        """Take no more rows; safe to call twice."""
        self.begin_close()
