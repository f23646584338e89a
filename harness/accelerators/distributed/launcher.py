"""Starts ranks with DeepSpeed's launcher."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import torch

from harness.accelerators.distributed.environment import LAUNCHER_PID


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Slots by host of a hostfile, in its order.

    Parameters
    ----------
    path
        File with lines ``name slots=4``; empty lines and ``#`` comments are left out.

    Raises
    ------
    ValueError
        If the file is missing, or a line is no host, or a host comes twice, or there is none.

    References
    ----------
    DeepSpeed 0.19.8, ``launcher/runner.py``, ``_parse_hostfile``. Differs from it: a file
    that is missing is an error, where DeepSpeed goes on with this machine alone.
    """
    place = f"launch(hostfile={str(path)!r})"
    if not Path(path).is_file():
        msg = f"{place}: expected a file of lines 'name slots=N', got no such file."
        raise ValueError(f"{msg} Check the path, or leave --hostfile out.")
    slots: dict[str, int] = {}
    for number, text in enumerate(Path(path).read_text().splitlines(), start=1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if found is None or int(found.group(2)) == 0:
            msg = f"{place}: expected 'name slots=N' on line {number}, got {text!r}."
            raise ValueError(
                f"{msg} Write one host a line, with its number of devices."
            )
        host = found.group(1)
        if host in slots:
            msg = f"{place}: expected each host once, got {host!r} again on line {number}."
            raise ValueError(f"{msg} Add up its slots on one line.")
        slots[host] = int(found.group(2))
    if not slots:
        raise ValueError(f"{place}: expected at least one host, got none. Add a line.")
    return slots


def build_launch_command(
    argv: Sequence[str],
    *,
    num_gpus: int | None = None,
    num_nodes: int | None = None,
    hostfile: str | Path | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
    launcher_options: Sequence[str] = (),
    verbose: bool = False,
) -> list[str]:
    """Command line that runs `argv` on each rank by DeepSpeed's launcher.

    Parameters
    ----------
    argv
        A script and its arguments, or ``-m``, a module and its arguments.
    num_gpus : >= 1
        Ranks on each machine; None takes every device.
    num_nodes : >= 1
        Machines, the first ones of the hostfile; None takes all.
    hostfile
        Lines ``name slots=N``; None starts on this machine alone.
    master_addr, master_port
        Where rank 0 listens; None lets DeepSpeed choose.
    launcher_options
        Further options in DeepSpeed's own words, for example ``--launcher=slurm``.
    verbose
        False keeps DeepSpeed's launcher quiet.

    Raises
    ------
    ValueError
        If `argv` is empty, a count is below 1, or the hostfile is missing or malformed.

    Examples
    --------
    >>> build_launch_command(["train.py", "--lr=1"], num_gpus=2)[-4:]
    ['--no_local_rank', '--num_gpus=2', 'train.py', '--lr=1']
    """
    if not argv or argv == ["-m"]:
        msg = f"launch: expected a script or -m module, got {list(argv)!r}."
        raise ValueError(f"{msg} Name what the ranks run.")
    for name, count in {"num_gpus": num_gpus, "num_nodes": num_nodes}.items():
        if count is not None and count < 1:
            msg = f"launch({name}): expected at least 1, got {count!r}."
            raise ValueError(f"{msg} Leave it out to take all there are.")
    if hostfile is not None:
        read_hostfile(hostfile)
    options = {
        "num_gpus": num_gpus,
        "num_nodes": num_nodes,
        "master_addr": master_addr,
        "master_port": master_port,
    }
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    # DeepSpeed looks at /job/hostfile unasked; an empty name finds none.
    command.append(f"--hostfile={'' if hostfile is None else Path(hostfile).resolve()}")
    command += [] if verbose else ["--quiet"]
    command += launcher_options
    # Without it the launcher puts --local_rank=N among the script's own arguments.
    command.append("--no_local_rank")
    command += [f"--{name}={n}" for name, n in options.items() if n is not None]
    if argv[0] == "-m":
        return [*command, "--module", *argv[1:]]
    return [*command, *argv]


def launch(command: Sequence[str], *, grace_s: float = 5.0) -> int:
    """Run what ``build_launch_command`` gave and wait for it; its exit code, never 0 on a failure.

    Ctrl-C and SIGTERM are passed to every rank, which have half a minute to save; no
    process is left behind.

    Parameters
    ----------
    command
        Command line.
    grace_s : >= 0
        Seconds that processes may outlive the command.
    """
    env = dict(os.environ)  # noqa: TID251 - the one place
    if torch.version.cuda is None and torch.version.hip is None:
        # DeepSpeed's launcher warns on every start of a machine without devices.
        env.setdefault("DS_ACCELERATOR", "cpu")
    env[LAUNCHER_PID] = str(os.getpid())
    # A group of their own: whatever becomes of DeepSpeed's two launchers, every rank is
    # reached by its group, and Ctrl-C reaches all of them once, from here.
    process = subprocess.Popen(command, env=env, start_new_session=True)
    stopped: list[int] = []

    def forward_signal(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        _signal_group(process.pid, number)

    before = {
        number: signal.signal(number, forward_signal)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        code = process.wait()
        _end_group(process.pid, grace_s=30.0 if stopped else grace_s)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        return 128 + stopped[0]
    # A launcher that a signal ended reports a negative code, which a shell cannot show.
    return code if code >= 0 else 128 - code


def _signal_group(group: int, number: int) -> bool:
    """Signal every process of the group; False if none is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _end_group(group: int, *, grace_s: float) -> None:
    """Wait for the group to end by itself, then end it."""
    until = time.monotonic() + grace_s
    while _signal_group(group, 0):
        if time.monotonic() > until:
            _signal_group(group, signal.SIGKILL)
        time.sleep(0.1)
