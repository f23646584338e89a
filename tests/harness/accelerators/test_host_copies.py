"""Copies in host memory: kept for the next ones, and waited for by events of the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.accelerators.host_copies import CudaCopyStream, HostCopies


class Tape(CudaCopyStream):
    """Writes down what is asked of the stream of a device."""

    def __init__(self, device: torch.device, calls: list[str]) -> None:
        self._name, self._calls = str(device), calls
        calls.append(f"{self._name} made")

    def begin(self) -> None:
        self._calls.append(f"{self._name} begin")

    def copy(self, host: Tensor, live: Tensor) -> None:
        assert host.device.type == "cpu"
        assert (host.shape, host.dtype) == (live.shape, live.dtype)
        self._calls.append(f"{self._name} copy {len(live)}")

    def end(self) -> Callable[[], object]:
        self._calls.append(f"{self._name} end")
        return lambda: self._calls.append(f"{self._name} waited")

    def synchronize(self) -> None:
        if "failed" in self._calls:
            raise RuntimeError("device-side assert")


def test_copies_of_a_device_are_queued_in_one_go_and_waited_for_later() -> None:
    calls: list[str] = []
    copies = HostCopies(lambda device: Tape(device, calls))
    with FakeTensorMode():  # has the devices, and no values
        live = {
            "a": torch.empty(3, device="cuda:0"),
            "b": torch.empty(5, device="cuda:1"),
            "c": torch.empty(4, device="cuda:0", dtype=torch.float16),
        }
    mixed = {**live, "own": torch.arange(2.0)}
    found, wait = copies.copy(mixed)
    assert list(found) == list(mixed)
    assert found["own"].tolist() == [0.0, 1.0]
    zero = ["cuda:0 made", "cuda:0 begin", "cuda:0 copy 3"]
    assert calls[:3] == zero
    assert calls[3:7] == [
        "cuda:1 made",
        "cuda:1 begin",
        "cuda:1 copy 5",
        "cuda:0 copy 4",
    ]
    assert sorted(calls[7:]) == ["cuda:0 end", "cuda:1 end"]
    calls.clear()
    wait()
    assert sorted(calls) == ["cuda:0 waited", "cuda:1 waited"]
    calls.clear()
    copies.copy(live)  # the streams are kept
    assert "cuda:0 made" not in calls
    assert calls.count("cuda:0 begin") == 1


def test_memory_is_used_again_where_a_tensor_has_the_same_form() -> None:
    copies = HostCopies()
    live = {"a": torch.ones(3), "b": torch.ones(2)}
    first, wait = copies.copy(live)
    wait()
    live["a"].fill_(2.0)
    assert first["a"].tolist() == [1.0] * 3
    second, _ = copies.copy({"a": live["a"], "b": torch.ones(4)})
    assert second["a"] is first["a"]
    assert second["a"].tolist() == [2.0] * 3
    assert second["b"].shape == (4,)


def test_allocated_memory_is_used_by_the_first_copy() -> None:
    copies = HostCopies()
    assert not copies
    copies.allocate({"a": (torch.Size([3]), torch.float32, False)})
    assert copies
    [kept] = copies._copies.values()
    found, _ = copies.copy({"a": torch.ones(3)})
    assert found["a"] is kept


@pytest.mark.parametrize("has_failed", [False, True])
def test_copies_of_a_device_that_failed_are_never_freed(has_failed: bool) -> None:
    calls: list[str] = []
    copies = HostCopies(lambda device: Tape(device, calls))
    with FakeTensorMode():
        live = {"a": torch.empty(3, device="cuda:0")}
    found, _ = copies.copy(live)
    host = weakref.ref(found["a"])
    calls += ["failed"] if has_failed else []
    del copies, found
    assert (host() is not None) == has_failed
