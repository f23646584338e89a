"""Ranks, as threads with a store in memory, that agree on a batch."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from harness.accelerators.base import Agreement
from harness.accelerators.distributed.agreement import BatchAgreement
from harness.accelerators.distributed.group import PeerError


class Rank:
    """One rank: batches in the thread that calls it, messages in a thread of its own."""

    def __init__(self, rank: int, world: int, store: Any) -> None:
        self.failure: tuple[int, str] | None = None
        self.is_over = threading.Event()
        self.agreement = BatchAgreement(
            "stop", rank, world, wake=lambda: None, find_failure=lambda: self.failure
        )
        self._store, self._random = store, random.Random(rank)
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()

    def _ask(self) -> None:
        while not self.is_over.wait(self._random.random() / 500):
            self.agreement.exchange(self._store)

    def end(self) -> None:
        self.is_over.set()
        self._thread.join()


def run(
    world: int, program: Callable[[int, Rank], object]
) -> tuple[list[Any], list[Rank]]:
    """What the program returns on each rank, and the ranks."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    ranks = [Rank(number, world, store) for number in range(world)]
    found: list[Any] = [None] * world

    def call(number: int) -> None:
        try:
            found[number] = program(number, ranks[number])
        except PeerError as error:
            found[number] = error

    threads = [threading.Thread(target=call, args=[n]) for n in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for rank in ranks:
        rank.end()
    return found, ranks


def count_until_due(rank: Rank, pause: Callable[[], object], most: int) -> Any:
    """Batches until one is due, and its value; None if none was."""
    for batch in range(1, most + 1):
        pause()
        value = rank.agreement.check()
        if value is not None:
            return batch, value
    return None


@pytest.mark.parametrize("step_s", [0.0, 0.003])
def test_ranks_of_any_speed_act_at_the_same_batch(step_s: float) -> None:
    def program(number: int, rank: Rank) -> Any:
        draw, found = random.Random(number), []
        for asking in range(3):
            if number == asking:
                rank.agreement.ask(15 + asking)
            found.append(
                count_until_due(rank, lambda: time.sleep(step_s * draw.random()), 10**7)
            )
            rank.agreement.renew()
        return found

    found, _ = run(3, program)
    assert found == [found[0]] * 3
    assert [value for _, value in found[0]] == [15, 16, 17]


def test_ranks_decide_until_the_batch_is_known() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    one, other = (
        BatchAgreement("x", n, 2, wake=lambda: None, find_failure=lambda: None)
        for n in range(2)
    )
    one.ask()
    one.exchange(store)
    assert one.is_deciding
    assert not other.is_deciding
    other.exchange(store)
    one.exchange(store)
    assert one.is_pending
    assert not one.is_deciding
    assert one.check() == 1


def test_ranks_that_wait_for_one_another_in_each_batch_act_at_the_same() -> None:
    meet = threading.Barrier(2)  # as a collective

    def program(number: int, rank: Rank) -> Any:
        def pause() -> None:
            meet.wait()
            if number == 0:
                time.sleep(0.002)

        if number:
            rank.agreement.ask(3)
        return count_until_due(rank, pause, 10**6)

    found, _ = run(2, program)
    assert found == [found[0]] * 2
    assert found[0][1] == 3


def test_what_is_asked_after_the_last_batch_of_one_rank_is_due_on_none() -> None:
    has_ended = threading.Event()

    def program(number: int, rank: Rank) -> Any:
        if number == 0:
            found = count_until_due(rank, lambda: None, 5)
            has_ended.set()
            return found
        found = count_until_due(rank, lambda: None, 4)
        has_ended.wait()
        rank.agreement.ask()
        while not rank.agreement.is_pending:
            time.sleep(0.001)
        return found or rank.agreement.check()  # the last batch, of which all know

    assert run(2, program)[0] == [None, None]


def test_rank_that_waits_for_one_that_fails_ends_with_it() -> None:
    def program(number: int, rank: Rank) -> Any:
        if number == 0:
            rank.end()
            return None
        rank.agreement.ask()
        threading.Timer(0.05, lambda: setattr(rank, "failure", (0, "boom"))).start()
        return count_until_due(rank, lambda: None, 10**7)

    found, _ = run(2, program)
    assert isinstance(found[1], PeerError)
    assert found[1].rank == 0


def test_rank_that_asks_after_the_store_has_gone_ends() -> None:
    gone: list[tuple[int, str]] = []
    find_failure = lambda: gone[0] if gone else None  # noqa: E731
    agreement = BatchAgreement("key", 1, 2, lambda: None, find_failure)
    assert agreement.check() is None
    gone.append((0, "its process has ended"))
    assert agreement.check() is None  # nobody asks for anything
    agreement.ask()
    with pytest.raises(PeerError, match="its process has ended"):
        agreement.check()


def test_no_batch_costs_a_message() -> None:
    store = dist.HashStore()  # type: ignore[attr-defined]
    agreement = BatchAgreement("stop", 0, 2, lambda: None, lambda: None)
    for _ in range(1000):
        assert agreement.check() is None
    assert store.num_keys() == 0


def test_one_rank_acts_at_once_and_until_it_begins_anew() -> None:
    own = Agreement()
    assert own.check() is None
    own.ask(15)
    own.ask(2)
    assert [own.check(), own.check()] == [15, 15]
    own.renew()
    assert own.check() is None
