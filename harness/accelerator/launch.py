"""Who this process is among the ranks, and how ranks are started.

The environment that launchers set is read here and nowhere else, turned into a ``Launch``
and passed down.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

DEFAULT_PORT = 29500
"""Port of rank 0 where the launcher names none; torch's and DeepSpeed's default."""


LAUNCHER_PID = "HARNESS_LAUNCHER_PID"
"""Variable by which ``launch`` tells ranks on its machine whose end is theirs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What a launcher told this process.

    Attributes
    ----------
    rank, local_rank, world_size, local_world_size : int
        torch's words; 0, 0, 1 and 1 without a launcher.
    address, port
        Where rank 0 listens; None without a launcher.
    by
        ``none``, ``torchrun`` (DeepSpeed's launcher sets the same names), ``slurm`` or ``mpi``.
    launcher_pid
        Process that ran ``launch`` on this machine; None where another one started ranks.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str | None = None
    port: int | None = None
    by: str = "none"
    launcher_pid: int | None = None

    def __post_init__(self) -> None:
        """Refuse ranks that do not exist."""
        if not 0 <= self.rank < self.world_size:
            msg = (
                f"launch: expected a rank in 0..{self.world_size - 1}, got {self.rank}."
            )
            raise ValueError(f"{msg} Check what the launcher ({self.by}) exports.")
        if self.world_size > 1 and self.address is None:
            msg = f"launch: expected MASTER_ADDR for {self.world_size} ranks, got none."
            advice = "Export MASTER_ADDR with the name of the first machine."
            raise ValueError(f"{msg} {advice}")


# Names of rank, local rank, world size, local world size, by launcher, in order of trust.
# Slurm's job-wide SLURM_NTASKS is also set where no task was started (sbatch, salloc), so
# the step's own count is asked for: it is set by srun only.
# https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
_LAUNCHERS = {
    "torchrun": (
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    ),
    "mpi": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "mpi (PMI)": ("PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", ("MPI_LOCALNRANKS",)),
    "slurm": (
        "SLURM_PROCID",
        "SLURM_LOCALID",
        "SLURM_STEP_NUM_TASKS",
        ("SLURM_STEP_TASKS_PER_NODE",),
    ),
}


def read_launch(env: Mapping[str, str] | None = None) -> Launch:
    """What the launcher of this process told it; one rank if there was none.

    Parameters
    ----------
    env
        Environment to read; None reads this process's.

    Raises
    ------
    ValueError
        If the launcher's variables are incomplete, no numbers, or contradict each other.
    """
    env = os.environ if env is None else env  # noqa: TID251 - the one place
    for by, (rank, local_rank, world_size, locals_) in _LAUNCHERS.items():
        if rank not in env or world_size not in env:
            continue
        world = _number(env, world_size)
        if world == 1:
            return Launch(by=by.partition(" ")[0])
        if local_rank not in env:
            msg = f"launch: expected {local_rank} beside {rank} and {world_size}"
            advice = "Start the ranks with torchrun, deepspeed, srun or mpirun."
            raise ValueError(f"{msg}, got none. {advice}")
        here = next((name for name in locals_ if name in env), None)
        local_world = world if here is None else _number(env, here)
        address, port = _meeting_point(env, by, world, local_world)
        return Launch(
            rank=_number(env, rank),
            local_rank=_number(env, local_rank),
            world_size=world,
            local_world_size=local_world,
            address=address,
            port=port,
            by=by.partition(" ")[0],
            launcher_pid=_number(env, LAUNCHER_PID) if LAUNCHER_PID in env else None,
        )
    return Launch()


def _number(env: Mapping[str, str], name: str) -> int:
    """The variable as a count; Slurm writes "4(x2)" for four tasks on each of two nodes."""
    found = re.fullmatch(r"(\d+)([(,].*)?", env[name].strip())
    if found is None:
        msg = f"launch: expected a number in {name}, got {env[name]!r}."
        raise ValueError(f"{msg} Unset it, or start the ranks with a launcher.")
    return int(found.group(1))


def _meeting_point(
    env: Mapping[str, str], by: str, world: int, local_world: int
) -> tuple[str | None, int]:
    """Address and port of rank 0; known without MASTER_ADDR on one machine and under Slurm."""
    address = env.get("MASTER_ADDR")
    if address is None and by == "slurm":
        address = _first_host(env.get("SLURM_STEP_NODELIST", ""))
    if address is None and local_world == world:
        address = "127.0.0.1"
    if "MASTER_PORT" in env:
        return address, _number(env, "MASTER_PORT")
    # Two jobs on one node must not meet: Slurm's job number tells them apart.
    job = env.get("SLURM_JOB_ID", "0")
    return address, DEFAULT_PORT + (int(job) % 10_000 if job.isdigit() else 0)


def _first_host(nodes: str) -> str | None:
    """First name in a Slurm node list: "gpu[03-06,9],login" -> "gpu03"."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return None if found is None else found.group(1) + (found.group(2) or "")


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set variables for libraries that can be told in no other way, and put them back."""
    before = {name: os.environ.get(name) for name in values}  # noqa: TID251
    os.environ.update(values)  # noqa: TID251
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)  # noqa: TID251
            else:
                os.environ[name] = value  # noqa: TID251


def has_agent_store(env: Mapping[str, str] | None = None) -> bool:
    """True if torchrun's agent, and not rank 0, holds the store at the meeting point."""
    env = os.environ if env is None else env  # noqa: TID251 - the one place
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


# ------------------------------------------------------------------ starting ranks


def check_hostfile(path: str | Path) -> dict[str, int]:
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


def launch_command(
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
    >>> launch_command(["train.py", "--lr=1"], num_gpus=2)[-4:]
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
        check_hostfile(hostfile)
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


def launch(command: Sequence[str], *, patience_s: float = 5.0) -> int:
    """Run what ``launch_command`` gave and wait for it; its exit code, never 0 on a failure.

    Ctrl-C and SIGTERM are passed to every rank, which have half a minute to save; no
    process is left behind.

    Parameters
    ----------
    command
        Command line.
    patience_s : >= 0
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

    def pass_on(number: int, frame: FrameType | None) -> None:
        stopped.append(number)
        _signal_group(process.pid, number)

    before = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        code = process.wait()
        _end_group(process.pid, patience_s=30.0 if stopped else patience_s)
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


def _end_group(group: int, *, patience_s: float) -> None:
    """Wait for the group to end by itself, then end it."""
    until = time.monotonic() + patience_s
    while _signal_group(group, 0):
        if time.monotonic() > until:
            _signal_group(group, signal.SIGKILL)
        time.sleep(0.1)
