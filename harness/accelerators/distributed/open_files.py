"""The limit of open files: enough for the connections between many ranks."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Protocol

try:
    import resource
except ImportError:  # Windows has no such limit
    resource = None  # type: ignore[assignment]


class Limits(Protocol):
    """What is used of Python's module ``resource``."""

    @property
    def RLIMIT_NOFILE(self) -> int: ...  # noqa: D102
    @property
    def RLIM_INFINITY(self) -> int: ...  # noqa: D102

    def getrlimit(self, resource: int, /) -> tuple[int, int]: ...  # noqa: D102
    def setrlimit(  # noqa: D102
        self, resource: int, limits: tuple[int, int], /
    ) -> None: ...


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
    world_size: int, *, is_server: bool, limits: Limits | None = resource
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
    msg = (
        f"launch: expected a limit of at least {needed} open files for the connections"
    )
    got = f"of {world_size} ranks, got {soft} (hard limit {hard})"
    advice = "Raise it where the ranks are started: 'ulimit -n'"
    more = "LimitNOFILE of systemd, or the hard limit in /etc/security/limits.conf"
    raise ValueError(f"{msg} {got}. {advice}, {more}.")


def count_open_files() -> int:
    """Count the files that this process has open; 0 where that cannot be seen."""
    try:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())
    except OSError:
        return 0
