"""Ranks of one start share keys that no other start has, and files enough to connect."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from types import ModuleType
from typing import Any

import pytest
import torch.distributed as dist

from harness.accelerators.distributed.environment import Agent, Launch
from harness.accelerators.distributed.store import (
    agree_on_start,
    check_open_files,
    connect_store,
    count_files,
)


def test_ranks_that_nobody_starts_and_a_port_in_use_are_told(capfd: Any) -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        port = taken.getsockname()[1]
        launch = Launch(world_size=2, address="127.0.0.1", port=port)
        taken.listen()
        place = f"2 ranks to meet at 127.0.0.1:{port}, got: "
        with pytest.raises(RuntimeError, match=f"{place}The server socket has failed"):
            connect_store(launch, Agent())
    with pytest.raises(RuntimeError, match=f"{place}Timed out .* or unset RANK"):
        connect_store(launch, Agent(), timeout_s=1, slow_s=0.1)
    told = f"rank 0: waits for 2 ranks at 127.0.0.1:{port} since 0.1 s\n"
    assert told in capfd.readouterr().err


def start(store: Any, world: int, late: int | None = None) -> set[str]:
    """What the ranks of one start agree on, one of them late."""
    found: list[str] = [""] * world

    def run(rank: int) -> None:
        if rank == late:
            time.sleep(0.1)
        found[rank] = agree_on_start(store, rank, world, timeout_s=60)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive()
    return set(found)


def test_each_start_has_a_name_of_its_own_also_after_one_that_broke_off() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    names = [start(store, 3), start(store, 3, late=0), start(store, 3, late=2)]
    store.set("start/name/1", "of a rank that then died")
    names += [start(store, 2), start(store, 3)]
    assert [len(name) for name in names] == [1] * 5
    assert len(set.union(*names)) == 5


def test_rank_of_an_earlier_start_that_still_lives_stands_for_no_other_one() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    found: dict[str, str] = {}

    def run(name: str, rank: int) -> threading.Thread:
        def agree() -> None:
            found[name] = agree_on_start(store, rank, 3, timeout_s=60)

        thread = threading.Thread(target=agree)
        thread.start()
        return thread

    earlier = run("earlier 1", 1)
    store.wait(["start/name/1"])
    store.set("start/name/2", "of a rank that then died")
    first = run("0", 0)
    earlier.join(30)  # it has read the answer
    second = run("1", 1)
    second.join(30)
    first.join(0.5)
    assert first.is_alive()  # as rank 2 is not there yet
    for thread in (run("2", 2), first):
        thread.join(30)
        assert not thread.is_alive()
    assert found["0"] == found["1"] == found["2"]


def test_rank_that_does_not_come_is_named() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    store.set_timeout(timedelta(seconds=5))
    store.set("start/name/1", "here")
    text = r"launch: expected 3 ranks within 0.1 s, got none from 2\. See what that"
    with pytest.raises(TimeoutError, match=text):
        agree_on_start(store, 0, 3, timeout_s=0.1)


class Limits(ModuleType):
    """Limits of a system without a hard limit, such as macOS, but with one of its own."""

    RLIMIT_NOFILE, RLIM_INFINITY = 8, -1

    def __init__(self, own: int) -> None:
        self.own, self.soft = own, 256

    def getrlimit(self, kind: int) -> tuple[int, int]:
        return self.soft, self.RLIM_INFINITY

    def setrlimit(self, kind: int, limits: tuple[int, int]) -> None:
        if limits[0] > self.own:
            raise ValueError("current limit exceeds maximum limit")
        self.soft = limits[0]


def test_limit_that_the_system_refuses_is_raised_as_far_as_needed() -> None:
    limits = Limits(own=10_240)
    check_open_files(4, is_server=True, limits=limits)
    needed = count_files(4, is_server=True)
    assert needed <= limits.soft < 10_240
    with pytest.raises(ValueError, match="expected a limit of at least"):
        check_open_files(10_000, is_server=True, limits=limits)


LIMITS = """
import resource, sys
from harness.accelerators.distributed.store import check_open_files
soft, hard, world = map(int, sys.argv[1:4])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    check_open_files(world, is_server=sys.argv[4] == "serves")
except ValueError as error:
    print(error)
else:
    print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def limit(*words: object) -> str:
    """The limits after the check in a process that began with others, or its error."""
    command = [sys.executable, "-c", LIMITS, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.slow
def test_limit_of_open_files_is_raised_as_far_as_needed_or_refused() -> None:
    assert limit(1024, 4096, 2, "asks") == "1024 4096"  # enough
    assert limit(100, 4096, 2, "asks") == "4096 4096"
    assert limit(1024, 4096, 600, "serves") == "4096 4096"
    refused = limit(1024, 4096, 1024, "serves")
    needed = int(refused.partition("at least ")[2].split()[0])
    assert count_files(1024, is_server=True) == 256 + 2 * 1027 + 2 * 1024
    assert 0 <= needed - count_files(1024, is_server=True) < 64  # open already
    assert refused.endswith(
        "for the connections of 1024 ranks, got 1024 (hard limit 4096). Raise it where the"
        " ranks are started: 'ulimit -n', LimitNOFILE of systemd, or the hard limit in"
        " /etc/security/limits.conf."
    )
