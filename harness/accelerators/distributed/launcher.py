"""Start ranks with DeepSpeed's launcher."""

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
    """Read the number of slots of each host from a hostfile, in its order.

    Parameters
    ----------
    path
        File with lines ``name slots=4``; empty lines and ``#`` comments are ignored.

    Raises
    ------
    ValueError
        If the file is missing, a line is malformed, a host is listed twice, or there is none.

    References
    ----------
    DeepSpeed 0.19.8, ``launcher/runner.py``, ``_parse_hostfile``. Differs from it: a missing
    file is an error; DeepSpeed would continue with this machine only.
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
                f"{msg} Write one host per line, with its number of devices."
            )
        host = found.group(1)
        if host in slots:
            msg = f"{place}: expected each host once, got {host!r} again on line {number}."
            raise ValueError(f"{msg} List it once, with all its slots.")
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
    """Build the command that runs `argv` on each rank with DeepSpeed's launcher.

    Parameters
    ----------
    argv
        A script and its arguments, or ``-m`` with a module and its arguments.
    num_gpus : >= 1
        Ranks on each machine; None uses every device.
    num_nodes : >= 1
        Number of machines, from the top of the hostfile; None uses all.
    hostfile
        File with lines ``name slots=N``; None uses this machine only.
    master_addr, master_port
        Where rank 0 listens; None lets DeepSpeed choose.
    launcher_options
        More options of DeepSpeed's launcher, for example ``--launcher=slurm``.
    verbose
        False silences DeepSpeed's launcher.

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
        raise ValueError(f"{msg} Name what the ranks should run.")
    for name, count in {"num_gpus": num_gpus, "num_nodes": num_nodes}.items():
        if count is not None and count < 1:
            msg = f"launch({name}): expected at least 1, got {count!r}."
            raise ValueError(f"{msg} Leave it out to use all.")
    if hostfile is not None:
        read_hostfile(hostfile)
    options = {
        "num_gpus": num_gpus,
        "num_nodes": num_nodes,
        "master_addr": master_addr,
        "master_port": master_port,
    }
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    # By default DeepSpeed reads /job/hostfile; an empty name turns that off.
    command.append(f"--hostfile={'' if hostfile is None else Path(hostfile).resolve()}")
    command += [] if verbose else ["--quiet"]
    command += launcher_options
    # Otherwise the launcher adds --local_rank=N to the script's arguments.
    command.append("--no_local_rank")
    command += [f"--{name}={n}" for name, n in options.items() if n is not None]
    if argv[0] == "-m":
        return [*command, "--module", *argv[1:]]
    return [*command, *argv]


def launch(command: Sequence[str], *, grace_s: float = 5.0) -> int:
    """Run a command of ``build_launch_command``, wait for it, and return its exit code.

    Ctrl-C and SIGTERM are passed on to every rank. The ranks then have half a minute to
    save, and no process is left behind. The exit code is not 0 after a signal.

    Parameters
    ----------
    command
        Command line.
    grace_s : >= 0
        Seconds that processes may outlive the command.
    """
    env = dict(os.environ)  # noqa: TID251 - passed on to the ranks
    if torch.version.cuda is None and torch.version.hip is None:
        # Otherwise DeepSpeed's launcher warns at every start that there is no device.
        env.setdefault("DS_ACCELERATOR", "cpu")
    env[LAUNCHER_PID] = str(os.getpid())
    # In a new process group, signals reach every rank even if DeepSpeed's launchers have
    # ended, and Ctrl-C reaches every rank only once, from here.
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
    # The code is negative if a signal ended the launcher; a shell cannot show that.
    return code if code >= 0 else 128 - code


def _signal_group(group: int, number: int) -> bool:
    """Signal every process of the group; False if none is left."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _end_group(group: int, *, grace_s: float) -> None:
    """Wait for the group to exit by itself, then kill it."""
    until = time.monotonic() + grace_s
    while _signal_group(group, 0):
        if time.monotonic() > until:
            _signal_group(group, signal.SIGKILL)
        time.sleep(0.1)
