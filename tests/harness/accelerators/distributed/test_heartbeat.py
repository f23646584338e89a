"""Ranks that are lost are noticed; those that are alive are not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import pytest
import torch.distributed as dist

from harness.accelerators.distributed.heartbeat import (
    BEAT_S,
    WORKING,
    Heartbeat,
    Member,
    SilenceTimer,
)
from harness.accelerators.distributed.named_barrier import ENDED
from harness.data.processes import Process
from tracking.durable import read_stat

LOST_S = 30.0


class Clock:
    """A clock that the test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def store() -> Any:
    return dist.HashStore()  # type: ignore[attr-defined]


@pytest.fixture
def others() -> Iterator[list[subprocess.Popen[bytes]]]:
    """Three processes that take the places of ranks."""
    found = [subprocess.Popen(["sleep", "1000"]) for _ in range(3)]
    yield found
    for process in found:
        process.kill()
        process.wait()


def make(store: Any, clock: Clock, machines: str, pids: list[int]) -> list[Heartbeat]:
    """Ranks on machines, one letter for each rank, with their processes."""
    found = []
    for rank, (machine, pid) in enumerate(zip(machines, pids, strict=True)):
        fields = read_stat(pid)
        assert fields is not None
        process = Process(pid, int(fields[19]))
        host = f"host-{machine}"
        member = Member(rank=rank, host=host, machine=machine, process=process)
        found.append(Heartbeat(member, len(machines), LOST_S, clock=clock))
        store.set(f"{WORKING}/{rank}", "1")
    for one in [*found, *found]:  # the first look tells who a rank is
        one.look(store)
    return found


def look(ranks: list[Heartbeat], store: Any, clock: Clock, seconds: float) -> list[Any]:
    """What ranks find in the next seconds."""
    found = []
    for _ in range(int(seconds / BEAT_S)):
        clock.now += BEAT_S
        found += [rank.look(store) for rank in ranks]
    return [lost for lost in found if lost is not None]


def wait_for_state(pid: int, wanted: str) -> None:
    until = time.monotonic() + 30
    while (fields := read_stat(pid)) and fields[0] != wanted:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_stopped_rank_is_lost_after_a_while_and_not_if_it_continues(
    store, clock, others
):
    own, stopped = os.getpid(), others[0].pid
    (rank, _) = make(store, clock, "aa", [own, stopped])
    assert look([rank], store, clock, 10 * LOST_S) == []
    os.kill(stopped, signal.SIGSTOP)
    wait_for_state(stopped, "T")
    assert look([rank], store, clock, LOST_S - BEAT_S) == []
    os.kill(stopped, signal.SIGCONT)
    wait_for_state(stopped, "S")
    assert look([rank], store, clock, LOST_S) == []
    os.kill(stopped, signal.SIGSTOP)
    wait_for_state(stopped, "T")
    (lost, *_) = look([rank], store, clock, LOST_S + BEAT_S)
    assert lost[0] == 1
    text = f"it is lost: its process {stopped} on 'host-a' is stopped; "
    assert lost[1].startswith(f"{text}not heard of for 30 s, last at")


def test_rank_whose_process_is_killed_is_lost_soon(store, clock, others):
    ranks = make(store, clock, "aaa", [os.getpid(), others[0].pid, others[1].pid])
    others[0].kill()
    others[0].wait()
    found = look(ranks[:1], store, clock, 3 * BEAT_S)
    assert found[0] == (
        1,
        f"it is lost: its process {others[0].pid} on 'host-a' has ended without a message",
    )


@pytest.mark.parametrize(("key", "value"), [(ENDED, "1"), (WORKING, "0")])
def test_rank_that_is_not_needed_any_more_may_end(key, value, store, clock, others):
    pids = [os.getpid(), others[0].pid, others[1].pid]
    ranks = make(store, clock, "aaa", pids)
    store.set(f"{key}/1", value)
    others[0].kill()
    others[0].wait()
    assert look(ranks[:1], store, clock, 3 * LOST_S) == []
    others[1].kill()  # the one after it is looked at instead
    others[1].wait()
    assert look(ranks[:1], store, clock, 3 * BEAT_S)[0][0] == 2


def test_silent_machine_is_lost_and_named_with_its_ranks(store, clock, others):
    pids = [os.getpid(), os.getpid(), *(process.pid for process in others)]
    ranks = make(store, clock, "abbcc", pids)
    assert look(ranks, store, clock, 3 * LOST_S) == []
    assert look([ranks[n] for n in (0, 2, 3)], store, clock, 3 * LOST_S) == []
    found = look([ranks[n] for n in (0, 3, 4)], store, clock, LOST_S + BEAT_S)
    assert len(found) == 1  # by the machine before it alone
    assert found[0][0] == 1
    text = "it is lost: its machine 'host-b' was not heard of for 30 s, last at "
    assert found[0][1].startswith(text)
    assert found[0][1].endswith(", nor of its 1 others")


def test_machine_whose_ranks_have_ended_is_passed_over(store, clock, others):
    pids = [os.getpid(), others[0].pid, others[1].pid]
    ranks = make(store, clock, "abc", pids)
    store.set(f"{ENDED}/1", "1")
    assert look([ranks[0], ranks[2]], store, clock, 4 * LOST_S) == []
    found = look([ranks[0]], store, clock, 2 * LOST_S)
    assert found[0][0] == 2


def test_next_rank_watches_where_the_first_of_a_machine_is_stopped(
    store, clock, others
):
    pids = [others[0].pid, os.getpid(), others[1].pid]
    ranks = make(store, clock, "aab", pids)
    os.kill(others[0].pid, signal.SIGSTOP)
    wait_for_state(others[0].pid, "T")
    store.set(f"{ENDED}/0", "1")
    found = look([ranks[1]], store, clock, LOST_S + 2 * BEAT_S)
    assert {lost[0] for lost in found} == {2}


def test_job_that_was_suspended_as_a_whole_is_alive(clock):
    silence = SilenceTimer(clock, 2 * BEAT_S)
    silence.update(1)
    clock.now += 3600
    assert silence.update(1) == 2 * BEAT_S
    assert silence.update(2) == 0


def test_messages_of_a_thousand_ranks_are_bounded(clock):
    class Counting:
        """Counts what a store is asked."""

        def __init__(self) -> None:
            self.store = dist.HashStore()  # type: ignore[attr-defined]
            self.count = 0

        def __getattr__(self, name: str) -> Any:
            self.count += 1
            return getattr(self.store, name)

    counting, own = Counting(), os.getpid()
    fields = read_stat(own)
    assert fields is not None
    process = Process(own, int(fields[19]))
    members = [
        Member(rank=n, host=f"h{n // 8}", machine=str(n // 8), process=process)
        for n in range(1024)
    ]
    for member in members:
        counting.store.set(f"member/{member.rank}", json.dumps(asdict(member)))
    # One machine's ranks; the others do the same.
    ranks = [Heartbeat(member, 1024, LOST_S, clock=clock) for member in members[8:16]]
    for rank in ranks:
        rank.look(counting)
    counting.count = 0
    for _ in range(20):
        counting.store.add("beat/2", 1)
        assert look(ranks, counting, clock, BEAT_S) == []
    per_second = 128 * counting.count / 100
    assert per_second == pytest.approx(1024 / BEAT_S + 128 / BEAT_S)
