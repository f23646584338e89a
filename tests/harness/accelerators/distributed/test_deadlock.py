"""Ranks that wait in different collectives, with a clock that the test sets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from harness.accelerators.deepspeed.library import keep_functions
from harness.accelerators.deepspeed.zero3_weights import WholeWeights
from harness.accelerators.distributed.deadlock import (
    WAITING,
    Deadlock,
    MainThread,
    Wait,
    describe_wait,
)
from harness.accelerators.distributed.named_barrier import describe_place, is_in

AFTER_S = 30.0
LOSS, NORM = Wait(place="loss, all_reduce", stack=1), Wait(place="norm, wait", stack=2)


class Ranks:
    """What ranks find when all look, one after another."""

    def __init__(self, count: int) -> None:
        self.now = 0.0
        self.waits: list[Wait | None] = [None] * count
        self.busy = [0.0] * count
        self._store: Any = dist.HashStore()  # type: ignore[attr-defined]
        self._ranks = [
            Deadlock(
                rank,
                count,
                AFTER_S,
                find_wait=lambda rank=rank: self.waits[rank],  # type: ignore[misc]
                clock=lambda: self.now,
                count_busy=lambda rank=rank: self.busy[rank],  # type: ignore[misc]
            )
            for rank in range(count)
        ]

    def look(self, seconds: float, busy_frac: float = 0.0) -> str | None:
        """What rank 0 tells first in the next seconds."""
        until = self.now + seconds
        while self.now < until:
            self.now += 0.5
            self.busy[-1] += 0.5 * busy_frac
            told = [one.look(self._store) for one in self._ranks]
            if any(told):
                return told[0]
        return None


def test_ranks_that_wait_in_different_collectives_are_told_where() -> None:
    ranks = Ranks(3)
    ranks.waits = [LOSS, NORM, LOSS]
    assert ranks.look(AFTER_S - 1) is None
    told = ranks.look(5)
    assert told is not None
    assert ": ranks 0, 2 in loss, all_reduce; rank 1 in norm, wait. Run" in told


@pytest.mark.parametrize(
    "waits",
    [[LOSS, LOSS], [LOSS, None], [None, None]],
    ids=["same", "one computes", "none"],
)
def test_ranks_that_can_go_on_are_left_alone(waits: list[Wait | None]) -> None:
    ranks = Ranks(2)
    ranks.waits = waits
    assert ranks.look(4 * AFTER_S) is None


def test_rank_that_sends_or_goes_on_is_not_taken_for_one_that_waits() -> None:
    ranks = Ranks(2)
    ranks.waits = [LOSS, NORM]
    assert ranks.look(4 * AFTER_S, busy_frac=0.1) is None
    for _ in range(9):  # rank 1 comes back to the same place
        ranks.waits[1] = None
        assert ranks.look(1) is None
        ranks.waits[1] = NORM
        assert ranks.look(AFTER_S - 2) is None
    assert ranks.look(5) is not None


COORDINATOR = """
def fetch_sub_module(current_submodule):
    return current_frame()
"""


def run_file(path: str, name: str) -> dict[str, Any]:
    names: dict[str, Any] = {
        "current_frame": lambda: sys._getframe(1),
        "__name__": name,
    }
    exec(compile(COORDINATOR, str(Path("/x") / path), "exec"), names)
    return names


def test_user_in_a_folder_called_deepspeed_and_what_writes_files_wait_for_no_rank() -> (
    None
):
    user = run_file("deepspeed/train.py", "__main__")["fetch_sub_module"](None)
    place = "torch/distributed/checkpoint/filesystem.py"  # which calls os.fsync
    name = place.removesuffix(".py").replace("/", ".")
    writer = run_file(place, name)["fetch_sub_module"](None)
    assert not is_in(user, WAITING)
    assert not is_in(writer, WAITING)
    assert describe_place(user) == "fetch_sub_module (train.py, line 3)"


def test_place_of_a_wait_is_in_code_that_uses_a_layer() -> None:
    with keep_functions():
        called = WholeWeights(nn.Identity())._leave(sys._getframe)(0)
    found = describe_place(called)
    assert found.startswith("test_place_of_a_wait"), found


def test_wait_is_another_for_another_layer() -> None:
    # As DeepSpeed's file of that name, called where a model would call a layer.
    names = run_file("deepspeed/coordinator.py", "deepspeed.runtime.zero.coordinator")

    class Linear:
        def __init__(self, number: int) -> None:
            self.ds_id = number

    one, two, again = (
        describe_wait(names["fetch_sub_module"](Linear(n))) for n in (1, 2, 1)
    )
    assert one == again != two
    assert one.place.endswith("fetch_sub_module of a layer Linear")
    assert "(test_deadlock.py, line" in one.place


def test_main_thread_outside_of_libraries_waits_in_nothing() -> None:
    thread = MainThread()
    assert [thread.find_wait() for _ in range(3)] == [None] * 3
