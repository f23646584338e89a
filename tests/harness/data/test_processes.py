"""Processes that end with another one."""

from __future__ import annotations

import os
import subprocess
import sys
from queue import Empty, SimpleQueue

import pytest

from harness.data.processes import Process, end_with


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="only Linux has it")
def test_process_whose_begin_is_not_known_is_outlived_by_none(monkeypatch):
    # As where /proc is not mounted.
    codes: SimpleQueue[int] = SimpleQueue()
    monkeypatch.setattr(os, "_exit", codes.put)
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE) as other:
        end_with(Process(other.pid, began=None))
        with pytest.raises(Empty):
            codes.get(block=False)
        other.communicate(b"\n")
    assert codes.get(timeout=30) == 1
