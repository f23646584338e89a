"""The choice of a rank's device, which its threads use."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from harness.accelerators.devices import (
    choose_device,
    choose_rank_device,
    use_in_thread,
)
from harness.accelerators.distributed.watchdog import Watchdog
from harness.checkpoint.writer import CheckpointWriter


def test_rank_gets_the_cpu_where_it_is_asked_for() -> None:
    assert choose_rank_device("cpu", local_rank=3) == torch.device("cpu")


def test_rank_gets_the_best_device_by_default() -> None:
    best = choose_device().type
    wanted = "cpu" if best == "mps" else best  # DeepSpeed cannot train on MPS
    assert choose_rank_device(None, local_rank=0).type == wanted


def test_device_that_deepspeed_does_not_support_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected 'cpu' or 'cuda', got 'meta'"):
        choose_rank_device("meta", local_rank=0)


def test_missing_cuda_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(ValueError, match=r"expected a CUDA device, got none"):
        choose_rank_device("cuda", local_rank=0)


def fake_gpus(patch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Make torch tell of CUDA devices; gives the indexes that are made the current one."""
    chosen: list[int] = []
    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(
    ("asked", "count", "local_rank", "index"),
    [
        (None, 4, 3, 3),
        (None, 1, 3, 0),  # a scheduler shows each rank its own device
        ("cuda", 4, 2, 2),
        ("cuda:1", 4, 0, 1),
        (torch.device("cuda", 0), 4, 3, 0),
    ],
)
def test_rank_gets_the_device_of_its_number_or_the_one_asked_for(
    asked: Any, count: int, local_rank: int, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = fake_gpus(monkeypatch, count)
    assert choose_rank_device(asked, local_rank) == torch.device("cuda", index)
    assert chosen == [index]


def test_index_of_a_device_that_is_not_there_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_gpus(monkeypatch, 2)
    with pytest.raises(ValueError, match=r"an index below 2, .*got 'cuda:2'"):
        choose_rank_device("cuda:2", local_rank=0)


class Watched:
    """The part of a group that a watch asks."""

    rank, world_size, store, has_clients = 0, 1, None, False

    def __init__(self, device: torch.device) -> None:
        self.device, self.asked = device, threading.Event()

    def for_thread(self) -> Watched:
        return self

    def read_failure(self) -> None:
        self.asked.set()


def test_threads_use_the_device_of_their_rank(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen: list[tuple[str, torch.device]] = []

    def choose(device: torch.device) -> None:
        chosen.append((threading.current_thread().name, device))

    monkeypatch.setattr(torch.cuda, "set_device", choose)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    device = torch.device("cuda", 3)
    ranks = Watched(device)
    watch = Watchdog(ranks, poll_s=0.001)  # type: ignore[arg-type]
    assert ranks.asked.wait(30)
    watch.stop()
    assert chosen == [("harness-ask", device)]
    writer = object.__new__(CheckpointWriter)
    writer._ctx = SimpleNamespace(device=device)  # type: ignore[assignment]
    writer._is_idle = writer._error = None
    writer._start(lambda: chosen.append(("written", device)))
    assert writer.wait() is None
    assert [own for _, own in chosen] == [device] * 3
    assert chosen[1][0] != threading.main_thread().name
    use_in_thread(torch.device("cpu"))
    assert len(chosen) == 3
