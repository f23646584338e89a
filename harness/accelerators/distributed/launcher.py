"""Start ranks with DeepSpeed's launcher."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import torch

from harness.accelerators.distributed.environment import (
    LAUNCH_OPTIONS,
    LAUNCHER_PID,
    read_visible_devices,
)
from tracking.durable import read_stat
from tracking.errors import describe_path

SSH_S = 10
"""Seconds in which a machine has to answer by ssh."""


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Read the number of slots of each host from a hostfile, in its order.

    Parameters
    ----------
    path
        File with lines ``name slots=4``; empty lines and ``#`` comments are ignored.

    References
    ----------
    DeepSpeed 0.19.8, ``launcher/runner.py``, ``_parse_hostfile``. Differs from it: a missing
    file is an error; DeepSpeed would continue with this machine only.
    """
    place = f"launch(hostfile={str(path)!r})"
    if not Path(path).is_file():
        got = describe_path(Path(path))
        msg = f"{place}: expected a file of lines 'name slots=N', got {got}."
        raise ValueError(f"{msg} Check the path, or leave --hostfile out.")
    content = Path(path).read_bytes()
    try:
        lines = content.decode().splitlines()
    except UnicodeDecodeError:
        lines = []
    if content.startswith(b"\xef\xbb\xbf") or (content and not lines):
        # DeepSpeed would take the mark for a part of the first name.
        msg = f"{place}: expected plain UTF-8, got {content[:3]!r} at its beginning."
        raise ValueError(f"{msg} Save it as UTF-8 without a byte-order mark.")
    slots: dict[str, int] = {}
    for number, text in enumerate(lines, start=1):
        line = text.partition("#")[0].strip()
        if not line:
            continue
        found = re.fullmatch(r"(\S+)\s+slots=(\d+)", line)
        if found is None or int(found.group(2)) == 0:
            msg = f"{place}: expected 'name slots=N' on line {number}, got {text!r}."
            advice = "Write one host per line, with its number of devices."
            raise ValueError(f"{msg} {advice}")
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
    include: str | None = None,
    exclude: str | None = None,
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
    include, exclude
        Machines and their devices to use, or not to: ``"node0@node1:0,2"``. Without a
        hostfile this machine is ``localhost``.
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
        If `argv` is empty, a count is below 1, the port does not exist, the hostfile is
        missing or malformed, or machines are chosen in two ways or are not listed.

    Examples
    --------
    >>> build_launch_command(["train.py", "--lr=1"], num_gpus=2)[-3:]
    ['--no_local_rank', 'train.py', '--lr=1']
    """
    if not argv or argv == ["-m"]:
        msg = f"launch: expected a script or -m module, got {list(argv)!r}."
        raise ValueError(f"{msg} Name what the ranks should run.")
    for name, count in {"num_gpus": num_gpus, "num_nodes": num_nodes}.items():
        if count is not None and count < 1:
            msg = f"launch({name}): expected at least 1, got {count!r}."
            raise ValueError(f"{msg} Leave it out to use all.")
    if master_port is not None and not 1 <= master_port <= 65535:
        msg = f"launch(master_port): expected 1..65535, got {master_port!r}."
        raise ValueError(f"{msg} Choose a free port of the first machine.")
    choose_hosts(hostfile, num_gpus, num_nodes, include, exclude)
    options = {
        "num_gpus": num_gpus,
        "num_nodes": num_nodes,
        "include": include,
        "exclude": exclude,
        "master_addr": master_addr,
        "master_port": master_port,
    }
    is_plain = hostfile is None and all(map(_STARTS_RANKS.match, launcher_options))
    # With visible devices, the runner tells which of them it uses.
    if num_gpus and is_plain and not read_visible_devices():
        # The runner would only import all of DeepSpeed and start this.
        slots = json.dumps({"localhost": [*range(num_gpus)]}).encode()
        command = [sys.executable, "-u", "-m", "deepspeed.launcher.launch"]
        command.append(f"--world_info={base64.urlsafe_b64encode(slots).decode()}")
        options = {"master_port": master_port}
    else:
        command = [sys.executable, "-m", "deepspeed.launcher.runner"]
        # By default it reads /job/hostfile; an empty name turns that off.
        path = "" if hostfile is None else Path(hostfile).resolve()
        command.append(f"--hostfile={path}")
    command += [] if verbose else ["--quiet"]
    command += launcher_options
    # Otherwise the launcher adds --local_rank=N to the script's arguments.
    command.append("--no_local_rank")
    command += [f"--{name}={n}" for name, n in options.items() if n is not None]
    if argv[0] == "-m":
        return [*command, "--module", *argv[1:]]
    return [*command, *argv]


_STARTS_RANKS = re.compile("--(bind_core|enable_each_rank_log)")
"""Begins the options of DeepSpeed's runner that its process on each machine takes, too."""


def choose_hosts(
    hostfile: str | Path | None,
    num_gpus: int | None = None,
    num_nodes: int | None = None,
    include: str | None = None,
    exclude: str | None = None,
) -> list[str]:
    """List the machines that options of ``build_launch_command`` choose."""
    slots = None if hostfile is None else read_hostfile(hostfile)
    hosts = ["localhost"] if slots is None else list(slots)
    if num_nodes is not None and num_nodes > len(hosts):
        msg = f"launch(num_nodes): expected at most {len(hosts)} machines"
        raise ValueError(f"{msg}, got {num_nodes!r}. List them in a hostfile.")
    if include and exclude:
        got = f"{include!r} and {exclude!r}"
        msg = f"launch(include, exclude): expected one, got {got}."
        raise ValueError(f"{msg} Leave one of them out.")
    name, choice = ("include", include) if include else ("exclude", exclude)
    if not choice:
        return hosts[:num_nodes]
    if num_gpus is not None or num_nodes is not None:
        msg = f"launch({name}): expected no num_gpus or num_nodes with it, got both."
        raise ValueError(f"{msg} Leave num_gpus and num_nodes out.")
    chosen: dict[str, list[int]] = {}
    for part in choice.split("@"):
        found = re.fullmatch(r"([^:,\s]+)(?::(\d+(?:,\d+)*))?", part)
        if found is None:
            msg = f"launch({name}): expected NAME or NAME:SLOT,SLOT, joined by '@'"
            advice = "Write for example 'localhost:0,1'."
            raise ValueError(f"{msg}, got {choice!r}. {advice}")
        host, listed = found.groups()
        if host not in hosts:
            msg = f"launch({name}): expected one of {', '.join(hosts)}, got {host!r}."
            raise ValueError(f"{msg} Without a hostfile, this machine is 'localhost'.")
        chosen[host] = [int(slot) for slot in (listed or "").split(",") if slot]
        last = max(chosen[host], default=0)
        if slots is not None and last >= slots[host]:
            msg = f"launch({name}): expected a slot in 0..{slots[host] - 1} of {host!r}"
            raise ValueError(f"{msg}, got {last}. Slots count from 0.")
    if include:
        return [host for host in hosts if host in chosen]
    return [host for host in hosts if chosen.get(host, [0])]


def check_hosts(hosts: Sequence[str], ssh_port: int | None = None) -> None:
    """Check that machines answer by ssh, without a password."""
    for program in ("ssh", "pdsh")[: 1 + (len(hosts) > 1)]:
        if shutil.which(program) is None:
            msg = f"launch: expected {program!r} for ranks on {', '.join(hosts)}"
            raise ValueError(f"{msg}, found no such program. Install it.")
    command = ["ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_S}"]
    command += [] if ssh_port is None else ["-p", str(ssh_port)]
    asked = {
        host: subprocess.Popen(
            [*command, host, "true"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for host in hosts
    }
    answers = {host: process.communicate()[1] for host, process in asked.items()}
    for host, process in asked.items():
        if process.returncode:
            reason = (answers[host].strip().splitlines() or ["no answer"])[-1]
            msg = f"launch: expected {host!r} to answer by ssh, got {reason!r}."
            advice = "Check its name, and set up ssh without a password."
            raise ValueError(f"{msg} {advice}")


def launch(
    command: Sequence[str],
    *,
    options: Mapping[str, object] | None = None,
    grace_s: float = 5.0,
) -> int:
    """Run a command of ``build_launch_command``, wait for it, and return its exit code.

    Ctrl-C and SIGTERM are passed on to every rank, once. A fit then saves and stops, and no
    process is left behind. The exit code is not 0 after a signal.

    Parameters
    ----------
    options
        The options that it was built with; the ranks can read them (``Launch.options``).
    grace_s : >= 0
        Seconds that processes may outlive the command.
    """
    env = dict(os.environ)  # noqa: TID251 - passed on to the ranks
    if torch.version.cuda is None and torch.version.hip is None:
        # Otherwise DeepSpeed's launcher warns at every start that there is no device.
        env.setdefault("DS_ACCELERATOR", "cpu")
    env[LAUNCHER_PID] = str(os.getpid())
    env[LAUNCH_OPTIONS] = json.dumps(dict(options or {}))
    # In a new process group, signals reach every rank even if DeepSpeed's launchers have
    # ended, and Ctrl-C reaches every rank only once, from here.
    process = subprocess.Popen(command, env=env, start_new_session=True)
    stopped: list[int] = []

    def forward_signal(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        # DeepSpeed's launchers would kill ranks that still save after half a minute, and
        # the workers of their loaders at once. They end with the ranks.
        ranks = find_ranks(process.pid) if len(stopped) < 3 else []
        for pid in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        if not ranks:
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


def find_ranks(group: int) -> list[int]:
    """Process ids of the ranks that DeepSpeed's launcher started in a process group."""
    parents, launchers = {}, set()
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        fields = read_stat(pid)
        if fields is None or int(fields[2]) != group:
            continue
        parents[pid] = int(fields[1])
        if is_inner_launcher(pid):
            launchers.add(pid)
    return [pid for pid, parent in parents.items() if parent in launchers]


def is_inner_launcher(pid: int) -> bool:
    """True for DeepSpeed's process that starts a machine's ranks; needs ``/proc``."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"deepspeed.launcher.launch" in words


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
