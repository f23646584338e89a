"""Ranks that meet, as threads with a store in memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from harness.accelerators.distributed.group import FAILED, PeerError
from harness.accelerators.distributed.named_barrier import NamedBarrier, find_collective


class Rank:
    """One of two ranks, with the part of a group that meetings use."""

    world_size = 2

    def __init__(self, rank: int, store: Any) -> None:
        self.rank, self.store = rank, store

    def first_failure(self) -> tuple[int, str] | None:
        if not self.store.check([FAILED]):
            return None
        rank, _, reason = self.store.get(FAILED).decode().partition(":")
        return int(rank), reason


def run_ranks(
    *programs: Callable[[NamedBarrier], object],
) -> list[BaseException | None]:
    """Run a program on each of two ranks; gives the error of each."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    errors: list[BaseException | None] = [None, None]

    def run(rank: int) -> None:
        try:
            programs[rank](NamedBarrier(Rank(rank, store)))  # type: ignore[arg-type]
        except Exception as error:  # noqa: BLE001  looked at below
            errors[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return errors


def test_meet_lets_ranks_pass_that_do_the_same() -> None:
    def program(barrier: NamedBarrier) -> None:
        for what in ("fit", "SkipEpoch", "SkipEpoch", "evaluate"):
            barrier.wait(what)

    assert run_ranks(program, program) == [None, None]


def test_meet_tells_what_another_rank_does_instead() -> None:
    errors = run_ranks(lambda one: one.wait("evaluate"), lambda one: one.wait("fit"))
    assert (
        "evaluate: expected the same on every rank, got it on rank 0 and fit on"
        in str(errors[0])
    )
    assert "fit: expected the same on every rank, got it on rank 1 and evaluate" in str(
        errors[1]
    )


def test_meet_tells_of_a_rank_that_has_ended() -> None:
    errors = run_ranks(lambda one: one.wait("predict"), lambda one: one.leave())
    assert "on rank 0, while rank 1 has ended its program" in str(errors[0])


def test_rank_that_could_not_meet_another_meets_it_no_more() -> None:
    def again(one: NamedBarrier) -> None:
        with pytest.raises(RuntimeError, match="waits in loss"):
            one.wait("fit")
        one.wait("evaluate")  # another would take it for a meeting of its own

    def block(one: NamedBarrier) -> None:
        one._ranks.store.set("meeting/1/blocked", "1:loss (net.py, line 3)")

    assert "waits in loss" in str(run_ranks(again, block)[0])


def test_meet_ends_with_a_rank_that_failed() -> None:
    errors = run_ranks(
        lambda one: one.wait("fit"), lambda one: one._ranks.store.set(FAILED, "1:boom")
    )
    assert isinstance(errors[0], PeerError)
    assert errors[0].rank == 1


def test_find_collective_is_none_outside_a_collective() -> None:
    assert find_collective() is None


def test_a_rank_waits_for_what_rank_0_does() -> None:
    done: list[str] = []

    def announce(one: NamedBarrier) -> None:
        for what in ("first", "second"):
            done.append(what)
            one.announce("save('x')")

    def wait(one: NamedBarrier) -> None:
        one.await_main("save('x')")
        assert "first" in done
        one.await_main("save('x')")
        assert done == ["first", "second"]

    assert run_ranks(announce, wait) == [None, None]


def test_a_rank_waits_for_rank_0_also_if_that_did_the_same_alone_before() -> None:
    has_waited = threading.Event()
    early: list[bool] = []

    def announce(one: NamedBarrier) -> None:
        one.announce("save('x')")
        one.wait("fit")
        early.append(has_waited.wait(0.3))
        one.announce("save('x')")

    def wait(one: NamedBarrier) -> None:
        one.wait("fit")
        one.await_main("save('x')")
        has_waited.set()

    assert run_ranks(announce, wait) == [None, None]
    assert early == [False]


def test_a_rank_is_told_that_rank_0_does_something_else_or_has_ended() -> None:
    def wait(one: NamedBarrier) -> None:
        try:
            one.await_main("save('x')")
        finally:
            one.leave()

    for program, does in (
        (lambda one: one.leave(), "the end of its program"),
        (lambda one: one.wait("evaluate"), "evaluate"),
    ):
        error = run_ranks(program, wait)[1]
        assert f"save('x'): expected it on rank 0, got {does} there" in str(error)
