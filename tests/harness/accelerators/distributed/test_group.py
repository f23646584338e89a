"""Process groups that user code made, and the store that a thread asks."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from harness.accelerators.distributed.group import RankGroup, check_backends


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        ("cpu:gloo", "cpu"),
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo,cuda:nccl", "cuda"),
        ("cuda:nccl,cpu:mpi", "cuda"),
    ],
)
def test_backends_that_serve_the_cpu_and_the_device_are_used(
    found: str, kind: str
) -> None:
    check_backends(found, kind)


@pytest.mark.parametrize(
    ("found", "kind"),
    [("cpu:gloo,cuda:gloo", "cuda"), ("cuda:nccl", "cuda"), ("cuda:nccl", "cpu")],
)
def test_backends_that_do_not_serve_them_are_refused(found: str, kind: str) -> None:
    wanted = "cpu:gloo,cuda:nccl" if kind == "cuda" else "cpu:gloo"
    with pytest.raises(ValueError, match=f"a process group with '{wanted}', got "):
        check_backends(found, kind)


def test_thread_asks_the_store_while_the_client_of_the_group_waits() -> None:
    made = dist.TCPStore("127.0.0.1", 0, 1, True)  # type: ignore[attr-defined]
    made.set_timeout(timedelta(seconds=5))
    group = object.__new__(RankGroup)
    group.rank, group.world_size, group.store = 0, 2, made
    asked = group.for_thread()
    for number in range(20):  # some of them wait before the answer comes
        waiting = threading.Thread(target=made.get, args=[f"answer/{number}"])
        waiting.start()
        assert asked.first_failure() is None
        asked.store.set(f"answer/{number}", "here")
        waiting.join()
    assert made.check(["answer/19"])
