"""The processes whose end also ends a rank."""

from __future__ import annotations

import os
import subprocess
import sys

from harness.accelerators.distributed.watchdog import find_launchers, is_alive


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
