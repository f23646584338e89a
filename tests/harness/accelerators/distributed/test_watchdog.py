"""The processes whose end also ends a rank."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from harness.accelerators.distributed.watchdog import Watchdog, find_launchers, is_alive


def test_launcher_of_a_plain_process_is_its_parent() -> None:
    assert find_launchers(os.getpid()) == (os.getpid(),)


def test_launcher_of_a_process_that_does_not_exist_is_itself() -> None:
    assert find_launchers(2**22 + 1) == (2**22 + 1,)


def test_launchers_of_deepspeed_are_two_processes() -> None:
    # As DeepSpeed's inner launcher, a child of this process.
    words = ["print('started', flush=True); input()", "deepspeed.launcher.launch"]
    command = [sys.executable, "-c", *words]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as process:
        assert process.stdout.readline() == b"started\n"  # its command can be read now
        assert find_launchers(process.pid) == (process.pid, os.getpid())
        assert is_alive(process.pid)
        process.communicate(b"\n")
    assert not is_alive(process.pid)


class Ranks:
    """One rank of two, whose store has nothing."""

    rank, world_size, device = 0, 2, torch.device("cpu")
    store, has_clients = None, False

    def for_thread(self):
        return self

    def read_failure(self):
        return None


def test_watchdog_is_found_where_another_hook_shows_exceptions(monkeypatch):
    # A second one would count meetings anew, and find those of the first one.
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    assert Watchdog.find() is None
    watchdog = Watchdog(Ranks(), poll_s=1e-3)  # type: ignore[arg-type]
    sys.excepthook = lambda *_: None
    try:
        assert Watchdog.find() is watchdog
    finally:
        watchdog.stop()
    assert Watchdog.find() is None


ENDING = """
import os, sys
import torch
import torch.distributed as dist
from harness.accelerators.distributed.watchdog import Watchdog

class Ranks:
    rank, world_size, device = 0, 2, torch.device("cpu")
    has_clients = True
    def __init__(self):
        self.store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True)
    def for_thread(self):
        return self
    def read_failure(self):
        self.store.check(["failed"])

children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        # Without the end, a third of them is stopped in a call of the store.
        watchdogs = [Watchdog(Ranks(), poll_s=1e-4) for _ in range(12)]
        sys.exit(0)
    children.append(child)
sys.exit(any([os.waitpid(child, 0)[1] for child in children]))
"""


@pytest.mark.distributed
def test_watchdog_ends_before_the_interpreter() -> None:
    # Python ends other threads where they are; the store's C++ code would then abort.
    command = [sys.executable, "-c", ENDING]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
