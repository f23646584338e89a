"""Notice ranks that are stopped or vanish, which raise no error and close no connection.

A thread of each rank looks now and then at the next rank of its machine, by its process. It
also counts up a number of its machine in the store, and the first rank of each machine looks
whether that of the next machine grows. So a rank counts as alive while its process runs,
however long its program takes for one thing, and a machine while one of its ranks counts.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.accelerators.distributed.named_barrier import ENDED
from harness.data.processes import Process

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

BEAT_S = 5.0
"""Seconds between two looks of a rank, and between two beats."""

GONE_S = 5.0
"""Seconds after which a process of this machine that has ended counts as lost."""

STOPPED = "T"
"""State of a stopped process; one that a debugger holds has another (``t``), and is alive."""

WORKING = "working"
"""Begin of the key in the store that says whether a rank is in a fit, or such."""


class SilenceTimer:
    """Time without a sign of life, as far as this process itself was running.

    A process that was stopped for an hour, as all those of a suspended job, has heard
    nothing in that time, and it means nothing.

    Parameters
    ----------
    most_s : > 0
        Longest time between two signs that counts.
    """

    def __init__(self, clock: Callable[[], float], most_s: float) -> None:
        self._clock, self._most_s = clock, most_s
        self._sign: object = None
        self._at = clock()
        self.passed_s = 0.0
        self.heard_at = time.time()

    def update(self, sign: object) -> float:
        """Return the seconds in which the sign has been the same."""
        now = self._clock()
        gap_s, self._at = now - self._at, now
        if sign != self._sign:
            self._sign, self.passed_s, self.heard_at = sign, 0.0, time.time()
        else:
            self.passed_s += min(gap_s, self._most_s)
        return self.passed_s

    def describe(self) -> str:
        """Describe for how long, and since when."""
        clock = time.strftime("%H:%M:%S", time.localtime(self.heard_at))
        return f"not heard of for {self.passed_s:.0f} s, last at {clock}"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One rank, and where it runs."""

    rank: int
    host: str  #: name of its machine, for messages
    machine: str  #: the same for ranks that can see one another's processes
    process: Process

    @classmethod
    def current(cls, rank: int) -> Member:
        """Describe this process; without ``/proc``, it is on a machine of its own."""
        host, process = socket.gethostname(), Process.current()
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            space = Path("/proc/self/ns/pid").readlink()  # containers count their own
        except OSError:
            boot, space = str(rank), Path()
        machine = f"{host} {boot} {space}"
        return cls(rank=rank, host=host, machine=machine, process=process)

    @classmethod
    def read(cls, store: Store, rank: int) -> Member:
        """Read what ``write`` wrote."""
        values = json.loads(store.get(f"member/{rank}"))
        return cls(**values | {"process": Process(**values["process"])})

    def write(self, store: Store) -> None:
        """Tell the other ranks."""
        store.set(f"member/{self.rank}", json.dumps(asdict(self)))

    def is_running(self) -> bool:
        """Whether its process runs; only for ranks of the same machine."""
        return self.process.state() not in (None, STOPPED)


def _describe_lost(member: Member, does: str) -> str:
    where = f"its process {member.process.pid} on {member.host!r}"
    return f"it is lost: {where} {does}"


class Heartbeat:
    """One rank's part in noticing those that are lost.

    Parameters
    ----------
    lost_after_s : > 0
        Seconds without a sign of life after which a rank is lost.
    is_waiting
        Whether this rank waits for the others to do the same, as in ``fit``.

    Notes
    -----
    With 1,024 ranks on 128 machines the store gets 205 numbers to count up and 26 questions
    a second. Ranks of one machine send nothing.
    """

    def __init__(
        self,
        member: Member,
        world_size: int,
        lost_after_s: float,
        is_waiting: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._member, self._world_size = member, world_size
        self._lost_after_s, self._is_waiting = lost_after_s, is_waiting
        self._clock, self._looked_at = clock, clock() - BEAT_S
        self._is_known = False
        self.members: list[Member] = []
        self._machines: list[str] = []
        self._near, self._far = (SilenceTimer(clock, 2 * BEAT_S) for _ in range(2))
        self._ended: set[str] = set()

    def look(self, store: Store) -> tuple[int, str] | None:
        """Give a sign of life, and look at others, every ``BEAT_S`` seconds.

        Returns
        -------
        a rank that is lost, and how; else None
        """
        if not self.members and not self._meet_members(store):
            return None
        if self._clock() - self._looked_at < BEAT_S:
            return None
        self._looked_at = self._clock()
        if len(self._machines) > 1:
            store.add(self._beat_key(self._member.machine), 1)
        return self._look_near(store) or self._look_far(store)

    def _meet_members(self, store: Store) -> bool:
        """Tell who this rank is, and read who the others are, when all have come."""
        if not self._is_known:
            self._member.write(store)
            self._is_known = True
        ranks = range(self._world_size)
        if not store.check([f"member/{rank}" for rank in ranks]):
            return False
        self.members = [Member.read(store, rank) for rank in ranks]
        self._machines = list(dict.fromkeys(m.machine for m in self.members))
        return True

    def _beat_key(self, machine: str) -> str:
        return f"beat/{self._machines.index(machine)}"

    # ---------------------------------------------------------- on this machine

    def _near_members(self) -> list[Member]:
        """The ranks of this machine, from the one after this rank around to itself."""
        near = [m for m in self.members if m.machine == self._member.machine]
        place = near.index(self._member)
        return near[place + 1 :] + near[: place + 1]

    def _look_near(self, store: Store) -> tuple[int, str] | None:
        """Look at the next rank of this machine that has not ended its program."""
        for member in self._near_members()[:-1]:
            state = member.process.state()
            runs = state not in (None, STOPPED)
            if not (runs or self._is_needed(store, member)):
                continue
            # A process that runs gives another sign each time.
            sign = object() if runs else state
            limit_s = GONE_S if state is None else self._lost_after_s
            if self._near.update((member, sign)) < limit_s:
                return None
            does = "has ended without a message"
            if state is not None:
                does = f"is stopped; {self._near.describe()}"
            return member.rank, _describe_lost(member, does)
        return None

    def find_gone(self, store: Store) -> tuple[int, str] | None:
        """Find a rank of this machine whose process has ended, though it is needed."""
        if not self.members and not self._meet_members(store):
            return None
        for member in self._near_members()[:-1]:
            if member.process.state() is None and self._is_needed(store, member):
                does = "has ended without a message"
                return member.rank, _describe_lost(member, does)
        return None

    def _is_needed(self, store: Store, member: Member) -> bool:
        """Whether others may wait for a rank: it has not ended, and is in a fit or such."""
        if store.check([f"{ENDED}/{member.rank}"]):
            return False
        key = f"{WORKING}/{member.rank}"
        is_working = store.check([key]) and store.get(key) == b"1"
        return is_working or self._is_waiting()

    # --------------------------------------------------------- on other machines

    def _look_far(self, store: Store) -> tuple[int, str] | None:
        """Look at the next machine, if this is the first rank of its own that runs."""
        before = [m for m in self._near_members() if m.rank < self._member.rank]
        if any(m.is_running() for m in before):
            return None
        place = self._machines.index(self._member.machine)
        next_ones = self._machines[place + 1 :] + self._machines[:place]
        for machine in (name for name in next_ones if name not in self._ended):
            count = store.add(self._beat_key(machine), 0)
            if self._far.update((machine, count)) < self._lost_after_s:
                return None
            ranks = [m for m in self.members if m.machine == machine]
            lost = next((m for m in ranks if self._is_needed(store, m)), None)
            if lost is not None:
                others = f", nor of its {len(ranks) - 1} others" if ranks[1:] else ""
                what = f"its machine {lost.host!r} was {self._far.describe()}{others}"
                return lost.rank, f"it is lost: {what}"
            # All its ranks have ended their programs: look at the machine after it.
            self._ended.add(machine)
        return None
