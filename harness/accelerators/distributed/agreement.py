"""Agree on the batch at which all ranks do what some of them ask for, such as to stop.

No batch costs a message. A thread of each rank, the watchdog's, asks the store now and then
whether somebody asks for something. If so, it tells how many batches its rank has finished,
and rank 0 chooses the first batch that no rank has passed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from harness.accelerators.base import Agreement
from harness.accelerators.distributed.group import PeerError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_WAIT_S = 0.005


class BatchAgreement(Agreement):
    """A batch at which all ranks do what one of them asks for.

    Every rank must make it at the same point, and then call ``check`` after each batch.

    Parameters
    ----------
    key
        Begin of its keys in the store, the same on all ranks.
    wake
        Wakes the thread that calls ``exchange``; called in a signal handler.
    find_failure
        Gives the rank that failed, and its error, or None.
    """

    def __init__(
        self,
        key: str,
        rank: int,
        world_size: int,
        wake: Callable[[], object],
        find_failure: Callable[[], tuple[int, str] | None],
    ) -> None:
        super().__init__()
        self._key, self._rank, self._world_size = key, rank, world_size
        self._wake, self._find_failure = wake, find_failure
        self._count = self._round = 0
        self._lock = threading.Lock()
        self._is_sent = self.is_pending = False
        self._due: tuple[int, int] | None = None

    def ask(self, value: int = 1) -> None:
        """Ask for it, with a value that all ranks will get; safe in a signal handler."""
        super().ask(value)
        self._wake()

    def check(self) -> int | None:
        """Count a batch; return the value asked for if all ranks are to act after it.

        It does so after each later batch too, until ``renew``.

        Raises
        ------
        PeerError
            If another rank fails while this one waits for its answer.
        """
        self._count += 1
        if not self.is_pending:
            # Nobody answers any more once what serves the store has gone.
            failed = None if self._asked is None else self._find_failure()
            if failed is not None:
                raise PeerError(*failed)
            return None
        while self._due is None:
            failed = self._find_failure()
            if failed is not None:
                raise PeerError(*failed)
            time.sleep(_WAIT_S)
        batch, value = self._due
        return value if self._count >= batch else None

    @property
    def is_deciding(self) -> bool:
        """Whether the ranks still choose the batch, so that it is worth to ask often."""
        return self.is_pending and self._due is None

    def renew(self) -> None:
        """Begin anew, after ``check`` has returned a value; at the same batch on all ranks."""
        with self._lock:
            super().renew()
            self._round += 1
            self._is_sent = self.is_pending = False
            self._due = None

    def exchange(self, store: Store) -> None:
        """Ask and tell the other ranks; called in a thread, again and again."""
        with self._lock:
            self._exchange(store, f"{self._key}/{self._round}")

    def _exchange(self, store: Store, key: str) -> None:
        if self._asked is not None and not self._is_sent:
            store.set(f"{key}/asked", str(self._asked))
            self._is_sent = True
        if not self.is_pending:
            if not store.check([f"{key}/asked"]):
                return
            # From here on the main thread waits after its batch. It may be in the one
            # after those that it has counted, so it has not passed the end of that one.
            self.is_pending = True
            store.set(f"{key}/of/{self._rank}", str(self._count + 1))
            store.add(f"{key}/num_ranks", 1)
        if self._due is not None:
            return
        if self._rank == 0 and store.add(f"{key}/num_ranks", 0) == self._world_size:
            of_ranks = [store.get(f"{key}/of/{n}") for n in range(self._world_size)]
            value = store.get(f"{key}/asked").decode()
            store.set(f"{key}/due", f"{max(map(int, of_ranks))} {value}")
        if store.check([f"{key}/due"]):
            batch, value = store.get(f"{key}/due").decode().split()
            self._due = int(batch), int(value)
