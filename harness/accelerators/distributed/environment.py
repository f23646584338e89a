"""Read from the launcher's environment variables which rank this process is."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

LAUNCHER_PID = "HARNESS_LAUNCHER_PID"
"""Variable with the process id of ``launch``; the ranks end when that process ends."""

DEFAULT_PORT = 29500
"""Port of rank 0 if the launcher sets none: the default of torch and DeepSpeed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """The launcher's description of this process.

    Attributes
    ----------
    rank, local_rank, world_size, local_world_size : int
        As in torch; 0, 0, 1 and 1 without a launcher.
    address, port
        Address and port of rank 0; None without a launcher.
    by
        ``none``, ``torchrun`` (DeepSpeed's launcher sets the same names), ``slurm`` or ``mpi``.
    launcher_pid
        Process id of ``launch`` on this machine; None if something else started the ranks.
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


# Names of rank, local rank, world size and local world size by launcher, most reliable
# first. SLURM_NTASKS is also set where no task was started (sbatch, salloc), so the count
# of the step is read, which only srun sets.
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
    """Read the launcher's description of this process; without a launcher, one rank.

    Parameters
    ----------
    env
        Environment to read; None reads this process's.

    Raises
    ------
    ValueError
        If the launcher's variables are incomplete, not numbers, or contradict each other.
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
        address, port = _rendezvous(env, by, world, local_world)
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


def _rendezvous(
    env: Mapping[str, str], by: str, world: int, local_world: int
) -> tuple[str | None, int]:
    """Address and port of rank 0; MASTER_ADDR is optional on one machine and under Slurm."""
    address = env.get("MASTER_ADDR")
    if address is None and by == "slurm":
        address = _first_host(env.get("SLURM_STEP_NODELIST", ""))
    if address is None and local_world == world:
        address = "127.0.0.1"
    if "MASTER_PORT" in env:
        return address, _number(env, "MASTER_PORT")
    # Two jobs on one node need different ports: add Slurm's job number.
    job = env.get("SLURM_JOB_ID", "0")
    return address, DEFAULT_PORT + (int(job) % 10_000 if job.isdigit() else 0)


def _first_host(nodes: str) -> str | None:
    """First name in a Slurm node list: "gpu[03-06,9],login" -> "gpu03"."""
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return None if found is None else found.group(1) + (found.group(2) or "")


@contextmanager
def set_environment(**values: str) -> Iterator[None]:
    """Set variables for libraries that have no other option; restore them afterwards."""
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
    """True if torchrun's agent runs the store for the rendezvous instead of rank 0."""
    env = os.environ if env is None else env  # noqa: TID251 - the one place
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
