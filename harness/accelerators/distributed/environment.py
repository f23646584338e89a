"""Read from the launcher's environment variables which rank this process is."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

_ENVIRONMENT = os.environ  # noqa: TID251 - the one place

LAUNCHER_PID = "HARNESS_LAUNCHER_PID"
"""Variable with the process id of ``launch``; the ranks end when that process ends."""

LAUNCH_OPTIONS = "HARNESS_LAUNCH_OPTIONS"
"""Variable with the options of ``launch``, as JSON."""

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
        ``none``, ``torchrun`` (DeepSpeed's launcher sets the same names), ``mpi``, ``flux`` or
        ``slurm``.
    launcher_pid
        Process id of ``launch`` on this machine; None if something else started the ranks.
    options
        Options that ``launch`` started the ranks with; None if something else did, or on
        another machine.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    address: str | None = None
    port: int | None = None
    by: str = "none"
    launcher_pid: int | None = None
    options: Mapping[str, object] | None = None

    def __post_init__(self) -> None:
        """Refuse ranks that do not exist."""
        if not 0 <= self.rank < self.world_size:
            last = self.world_size - 1
            msg = f"launch: expected a rank in 0..{last}, got {self.rank}."
            raise ValueError(f"{msg} Check what the launcher ({self.by}) exports.")
        if self.world_size > 1 and self.address is None:
            msg = f"launch: expected MASTER_ADDR for {self.world_size} ranks, got none."
            advice = "Export MASTER_ADDR with the name of the first machine."
            raise ValueError(f"{msg} {advice}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Variables:
    """Variables in which a launcher says who a process is; the first that is set counts."""

    by: str
    rank: str
    world_size: str
    local_rank: tuple[str, ...]
    local_world_size: tuple[str, ...]

    def read(self, env: Mapping[str, str]) -> _Place | None:
        """Read rank and sizes; None where the rank or the number of ranks is missing."""
        if self.rank not in env or self.world_size not in env:
            return None
        local_rank = _first(env, self.local_rank)
        local_world = _first(env, self.local_world_size)
        return _Place(
            names=self,
            by=self.by,
            rank=_number(env, self.rank),
            world_size=_number(env, self.world_size),
            local_rank=None if local_rank is None else _number(env, local_rank),
            local_world_size=None if local_world is None else _number(env, local_world),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Place:
    """The rank that a launcher's variables give; None is what they leave out."""

    names: _Variables
    by: str
    rank: int
    world_size: int
    local_rank: int | None
    local_world_size: int | None


# The launcher that starts the process itself comes first, Slurm last: another launcher may
# run inside its step. SLURM_NTASKS is also set where no task was started (sbatch, salloc),
# so the count of the step is read, which only srun sets.
# https://slurm.schedmd.com/srun.html#SECTION_OUTPUT-ENVIRONMENT-VARIABLES
# https://docs.open-mpi.org/en/v5.0.x/tuning-apps/environment-var.html
# https://mvapich.cse.ohio-state.edu/static/media/mvapich/mvapich2-userguide.html
# https://flux-framework.readthedocs.io/projects/flux-core/en/latest/man7/flux-environment.html
_LAUNCHERS = (
    _Variables(
        by="torchrun",
        rank="RANK",
        world_size="WORLD_SIZE",
        local_rank=("LOCAL_RANK",),
        local_world_size=("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    ),
    *(
        _Variables(
            by="mpi",
            rank=f"{prefix}_COMM_WORLD_RANK",
            world_size=f"{prefix}_COMM_WORLD_SIZE",
            local_rank=(f"{prefix}_COMM_WORLD_LOCAL_RANK",),
            local_world_size=(f"{prefix}_COMM_WORLD_LOCAL_SIZE",),
        )
        for prefix in ("OMPI", "MV2", "MVP")
    ),
    # Hydra (MPICH, Intel MPI), and Cray's PALS.
    _Variables(
        by="mpi",
        rank="PMI_RANK",
        world_size="PMI_SIZE",
        local_rank=("MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID"),
        local_world_size=("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    _Variables(
        by="flux",
        rank="FLUX_TASK_RANK",
        world_size="FLUX_JOB_SIZE",
        local_rank=("FLUX_TASK_LOCAL_ID",),
        local_world_size=(),
    ),
    _Variables(
        by="slurm",
        rank="SLURM_PROCID",
        world_size="SLURM_STEP_NUM_TASKS",
        local_rank=("SLURM_LOCALID",),
        local_world_size=("SLURM_STEP_TASKS_PER_NODE",),
    ),
)

_RANKS_ALONE = ("PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE", "JSM_NAMESPACE_RANK")
"""Variables that number the processes of a launcher, without one that counts them."""


def read_launch(env: Mapping[str, str] = _ENVIRONMENT) -> Launch:
    """Read the launcher's description of this process; without a launcher, one rank.

    Parameters
    ----------
    env
        Environment to read, by default that of this process.

    Raises
    ------
    ValueError
        If the launcher's variables are incomplete, not numbers, or contradict each other.
    """
    places = [place for names in _LAUNCHERS if (place := names.read(env)) is not None]
    if not places:
        _refuse_half(env)
        return Launch()
    place = _complete(env, places)
    if place.world_size == 1:
        return Launch(by=place.by)
    if place.local_rank is None:
        names = places[0].names
        msg = f"launch: expected {' or '.join(names.local_rank)} with {names.rank}"
        advice = "Start the ranks with torchrun, deepspeed, srun or mpirun, or set it."
        raise ValueError(f"{msg} and {names.world_size}, got none. {advice}")
    address, port = _rendezvous(env, place)
    return Launch(
        rank=place.rank,
        local_rank=place.local_rank,
        world_size=place.world_size,
        local_world_size=place.local_world_size or place.world_size,
        address=address,
        port=port,
        by=place.by,
        launcher_pid=_number(env, LAUNCHER_PID) if LAUNCHER_PID in env else None,
        options=json.loads(env[LAUNCH_OPTIONS]) if LAUNCH_OPTIONS in env else None,
    )


def _complete(env: Mapping[str, str], places: Sequence[_Place]) -> _Place:
    """The first place, with what another launcher says of the same rank.

    Slurm's PMI plugins set PMI's variables beside Slurm's own, but no local rank.
    """
    first = places[0]
    for other in places[1:]:
        if (other.rank, other.world_size) == (first.rank, first.world_size):
            if first.local_rank is None:
                first = replace(first, local_rank=other.local_rank, by=other.by)
            if first.local_world_size is None:
                first = replace(first, local_world_size=other.local_world_size)
    is_pod = first.by == "torchrun" and "KUBERNETES_SERVICE_HOST" in env
    if first.local_rank is None and is_pod:
        # Kubeflow starts one process in each pod, and sets no local rank.
        return replace(first, local_rank=0, local_world_size=1)
    return first


def _refuse_half(env: Mapping[str, str]) -> None:
    """Refuse half of a launcher's variables: each rank would train alone."""
    for names in _LAUNCHERS:
        # Slurm sets a rank in batch scripts too, and WORLD_SIZE=1 is one rank.
        is_alone = names.by == "slurm" and env.get(names.rank, "0") == "0"
        if names.rank in env and not is_alone:
            there, missing = names.rank, names.world_size
        elif names.world_size in env and _number(env, names.world_size) > 1:
            there, missing = names.world_size, names.rank
        else:
            continue
        msg = f"launch: expected {missing} with {there}={env[there]!r}, got none."
        advice = "Start the ranks with torchrun, deepspeed, srun or mpirun"
        raise ValueError(f"{msg} {advice}, or unset {there} to train on one rank.")
    for name in _RANKS_ALONE:
        if name in env:
            msg = f"launch: expected the number of ranks with {name}={env[name]!r}"
            advice = "Set RANK, LOCAL_RANK, WORLD_SIZE and MASTER_ADDR for each rank"
            or_one = f"or unset {name} to train on one rank."
            raise ValueError(f"{msg}, got none. {advice}, {or_one}")


def _first(env: Mapping[str, str], names: Iterable[str]) -> str | None:
    """The first of the variables that is set."""
    return next((name for name in names if name in env), None)


def _number(env: Mapping[str, str], name: str) -> int:
    """The variable as a count; Slurm writes "4(x2),3" for nodes with 4, 4 and 3 tasks."""
    counts: list[int] = []
    for part in env[name].strip().split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            msg = f"launch: expected a number in {name}, got {env[name]!r}."
            raise ValueError(f"{msg} Unset it, or start the ranks with a launcher.")
        counts += [int(found.group(1))] * min(int(found.group(2) or 1), 100_000)
    node = env.get("SLURM_NODEID", "0")
    return (
        counts[int(node)] if node.isdigit() and int(node) < len(counts) else counts[0]
    )


def _rendezvous(env: Mapping[str, str], place: _Place) -> tuple[str | None, int]:
    """Address and port of rank 0; MASTER_ADDR is optional on one machine and under Slurm."""
    address = env.get("MASTER_ADDR")
    if address is None and place.by == "slurm":
        names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
        nodes = _first(env, names)
        address = None if nodes is None else first_host(env[nodes])
    if address is None and place.local_world_size == place.world_size:
        address = "127.0.0.1"
    if "MASTER_PORT" in env:
        port = _number(env, "MASTER_PORT")
        if not 1 <= port <= 65535:
            msg = f"launch: expected MASTER_PORT in 1..65535, got {port}."
            raise ValueError(f"{msg} Choose a free port of the first machine.")
        return address, port
    # Two jobs on one node need different ports: add Slurm's job number.
    job = env.get("SLURM_JOB_ID", "0")
    return address, DEFAULT_PORT + (int(job) % 10_000 if job.isdigit() else 0)


def first_host(nodes: str) -> str:
    """First name in a Slurm node list.

    Examples
    --------
    >>> first_host("rack[1-2]n[04,06-08],login")
    'rack1n04'
    """
    host = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    assert host is not None  # matches the empty text
    return re.sub(r"\[(\w*)[^\]]*\]", r"\1", host.group())


@contextmanager
def set_environment(**values: str) -> Iterator[None]:
    """Set variables for libraries that have no other option; restore them afterwards."""
    before = {name: _ENVIRONMENT.get(name) for name in values}
    _ENVIRONMENT.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                _ENVIRONMENT.pop(name, None)
            else:
                _ENVIRONMENT[name] = value


def let_device_errors_be_raised(world_size: int) -> None:
    """Let a device's error be raised where Python meets it, unless the user chose otherwise.

    torch 2.13 also watches the device from a thread of each NCCL group. At an error that thread
    aborts the process, often before the error is shown or recorded. With this setting only the
    thread ends. Another thread of torch still ends the process if a collective never finishes;
    one rank alone waits for nobody and does without. Every group that is created later reads
    the setting, DeepSpeed's too.
    """
    _ENVIRONMENT.setdefault("TORCH_NCCL_RETHROW_CUDA_ERRORS", "0")
    if world_size == 1:
        _ENVIRONMENT.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")


CUBLAS_WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Variable that cuBLAS reads once; without it, products may differ between two runs."""


def read_cublas_workspace() -> str | None:
    """Read the setting of cuBLAS's memory; None if there is none."""
    return _ENVIRONMENT.get(CUBLAS_WORKSPACE)


def fix_cublas_workspace() -> None:
    """Give cuBLAS a memory with which its results repeat, unless the user chose one.

    References
    ----------
    https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    """
    _ENVIRONMENT.setdefault(CUBLAS_WORKSPACE, ":4096:8")


def read_visible_devices(env: Mapping[str, str] = _ENVIRONMENT) -> str:
    """Read which devices of this machine the user chose; empty if all."""
    return env.get("CUDA_VISIBLE_DEVICES", "")


@dataclass(frozen=True, kw_only=True, slots=True)
class Agent:
    """What torchrun's agent says of the store in which the ranks meet.

    Attributes
    ----------
    has_store
        True if the agent runs the store instead of rank 0.
    attempt : >= 0
        How often the agent has restarted the ranks; its store keeps what they wrote before.
    """

    has_store: bool = False
    attempt: int = 0


def read_agent(env: Mapping[str, str] = _ENVIRONMENT) -> Agent:
    """Read what torchrun's agent says of its store; the default without an agent.

    References
    ----------
    torch 2.13.0, ``distributed/rendezvous.py``, ``_create_c10d_store``.
    """
    name = "TORCHELASTIC_RESTART_COUNT"
    return Agent(
        has_store=env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=_number(env, name) if name in env else 0,
    )


LOST_AFTER = "HARNESS_LOST_AFTER_S"
"""Variable with the seconds without a sign of life after which a rank is lost; 0: never."""

LOST_AFTER_S = 60.0
"""Its default."""

SHORTEST_LOST_AFTER_S = 10.0
"""The least that it may be: signs of life come every 5 s."""


def read_lost_after(env: Mapping[str, str] = _ENVIRONMENT) -> float:
    """Read after how many seconds without a sign of life a rank is lost; 0: never."""
    text = env.get(LOST_AFTER, str(LOST_AFTER_S))
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if seconds != 0 and not seconds >= SHORTEST_LOST_AFTER_S:
        least = f"{SHORTEST_LOST_AFTER_S:g}"
        msg = f"launch: expected {LOST_AFTER} of at least {least} seconds, or 0"
        raise ValueError(f"{msg}, got {text!r}. Set it to 0 to wait without end.")
    return seconds


def read_slurm_job(env: Mapping[str, str] = _ENVIRONMENT) -> str | None:
    """Read the id of the Slurm job, with its task if it is one of an array; None outside Slurm."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    if array and task:
        return f"{array}_{task}"
    return env.get("SLURM_JOB_ID") or None


def read_slurm_end(env: Mapping[str, str] = _ENVIRONMENT) -> float | None:
    """Read when the Slurm job ends, in seconds since 1970; None outside Slurm before 23.02.

    References
    ----------
    https://slurm.schedmd.com/sbatch.html, ``SLURM_JOB_END_TIME``.
    """
    text = env.get("SLURM_JOB_END_TIME", "")
    return float(text) if text.isdecimal() else None
