"""The store in which ranks find each other, with keys that no earlier start of them wrote.

Ranks connect to it and to one another, and need open files for that.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import torch.distributed as dist

from harness.accelerators.distributed.environment import Agent, Launch
from tracking.errors import write_stderr

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

RENDEZVOUS_S = 300.0
"""Time that the first rank waits for the last one to start."""

SLOW_S = 20.0
"""Time after which a rank says that it waits for others."""

_POLL_S = 0.02


def connect_store(
    launch: Launch,
    agent: Agent,
    timeout_s: float = RENDEZVOUS_S,
    slow_s: float = SLOW_S,
) -> Store:
    """Connect to the store of a launch, which rank 0 serves, or torchrun's agent.

    Variables of a launch that are left in a notebook make it wait for ranks that nobody
    starts, so it says what it waits for.
    """
    if launch.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    is_server = launch.rank == 0 and not agent.has_store
    check_open_files(launch.world_size, is_server=is_server)
    place = f"{launch.address or '127.0.0.1'}:{launch.port or 0}"
    waits = f"rank {launch.rank}: waits for {launch.world_size} ranks at {place}"
    slow = threading.Timer(slow_s, write_stderr, [f"{waits} since {slow_s:g} s\n"])
    slow.daemon = True
    if launch.local_rank == 0:  # one line for each machine
        slow.start()
    try:
        store: Store = dist.TCPStore(  # type: ignore[attr-defined]
            launch.address or "127.0.0.1",
            launch.port or 0,
            launch.world_size,
            is_master=is_server,
            timeout=timedelta(seconds=timeout_s),
        )
        store = dist.PrefixStore(f"harness/{agent.attempt}", store)  # type: ignore[attr-defined]
        if agent.has_store:
            start = agree_on_start(store, launch.rank, launch.world_size, timeout_s)
            store = dist.PrefixStore(start, store)  # type: ignore[attr-defined]
        return store
    except dist.DistError as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        msg = f"launch: expected {launch.world_size} ranks to meet at {place}, got: {reason}"
        advice = "Start all ranks with one launcher on a free port (--master-port), or"
        or_one = "unset RANK and WORLD_SIZE to train on one rank."
        raise RuntimeError(f"{msg}. {advice} {or_one}") from error
    finally:
        slow.cancel()


def agree_on_start(
    store: Store, rank: int, world_size: int, timeout_s: float = RENDEZVOUS_S
) -> str:
    """Agree on a name for this start of the ranks, which no other start has.

    The store of an agent outlives the ranks, and keeps their addresses and failures.
    torchrun counts its restarts after a failure, but not those after a machine has joined.

    Each rank writes a name of its own. Rank 0 answers every name that it finds until those
    who wrote the present names have read its answer. So what an earlier rank wrote does no
    harm, also if that still lives and reads an answer, as long as the new one has come.

    Raises
    ------
    TimeoutError
        On rank 0, if ranks do not come; it names them.
    """
    own = uuid.uuid4().hex
    if rank:
        answer = f"start/of/{own}"
        store.set(f"start/name/{rank}", own)
        store.wait([answer], timedelta(seconds=timeout_s))
        start = store.get(answer).decode()
        store.set(f"start/{start}/ready/{own}", "1")
        return start
    names = [f"start/name/{other}" for other in range(1, world_size)]
    answered: set[str] = set()

    def is_done() -> bool:
        if not store.check(names):
            return False
        present = {store.get(key).decode() for key in names}
        for name in present - answered:
            answered.add(name)
            store.set(f"start/of/{name}", own)
        return store.check([f"start/{own}/ready/{name}" for name in present])

    if not _wait(is_done, timeout_s):
        _refuse_missing(store, names, timeout_s)
    return own


def _wait(is_done: Callable[[], bool], timeout_s: float) -> bool:
    until = time.monotonic() + timeout_s
    while not is_done():
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_S)
    return True


def _refuse_missing(store: Store, names: Sequence[str], timeout_s: float) -> None:
    missing = [n for n, key in enumerate(names, start=1) if not store.check([key])]
    ranks = ", ".join(map(str, missing[:10])) or "an unknown rank"
    msg = f"launch: expected {len(names) + 1} ranks within {timeout_s:g} s"
    advice = "See what that rank wrote, and whether its machine can be reached."
    raise TimeoutError(f"{msg}, got none from {ranks}. {advice}")


# ----------------------------------------------------------------- open files

NUM_GROUPS = 2
"""Groups in which each rank is connected to each other one: torch's and DeepSpeed's."""

NUM_CLIENTS = 2
"""Connections of each rank to the store: the group's, and the watchdog's."""

NUM_OTHERS = 256
"""Files for all else: libraries, the journal, checkpoints, workers of loaders."""

ENOUGH = 65_536
"""Limit that is set where it has to be raised, as far as the hard limit allows."""


def count_files(world_size: int, *, is_server: bool) -> int:
    """Count the files that connections between ranks take on one of them, and the others.

    Parameters
    ----------
    is_server
        This rank serves the store to all ranks.

    Notes
    -----
    gloo connects each rank to each other one (torch 2.13: ``world_size + 3`` files for each
    group, on 2 to 16 ranks).
    """
    count = NUM_OTHERS + NUM_GROUPS * (world_size + 3)
    return count + NUM_CLIENTS * world_size if is_server else count


def check_open_files(
    world_size: int, *, is_server: bool, limits: ModuleType | None = resource
) -> None:
    """Raise the limit of open files as far as the ranks need it.

    Parameters
    ----------
    limits
        Module ``resource``; None where the system has no such limit.

    Raises
    ------
    ValueError
        If the hard limit, or the system's own, is lower than that.
    """
    if limits is None:
        return
    soft, hard = limits.getrlimit(limits.RLIMIT_NOFILE)
    needed = count_open_files() + count_files(world_size, is_server=is_server)
    most = math.inf if hard == limits.RLIM_INFINITY else hard
    if soft == limits.RLIM_INFINITY or soft >= needed:
        return
    if most >= needed:
        # macOS has no hard limit, and refuses more than a limit of its own.
        for raised in (int(min(max(needed, ENOUGH), most)), needed):
            with contextlib.suppress(ValueError, OSError):
                limits.setrlimit(limits.RLIMIT_NOFILE, (raised, hard))
                return
    msg = f"launch: expected a limit of at least {needed} open files for the"
    got = f"connections of {world_size} ranks, got {soft} (hard limit {hard})"
    advice = "Raise it where the ranks are started: 'ulimit -n'"
    more = "LimitNOFILE of systemd, or the hard limit in /etc/security/limits.conf"
    raise ValueError(f"{msg} {got}. {advice}, {more}.")


def count_open_files() -> int:
    """Count the files that this process has open; 0 where that cannot be seen."""
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        return 0
