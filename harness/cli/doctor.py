"""Check this machine before training: devices, DeepSpeed, MLflow, disk."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from tracking.durable import FolderReport, try_folder
from tracking.redaction import redact

MIN_FREE_BYTES = 5 * 2**30
"""With less free disk than this, checkpoints of a larger model do not fit."""

SERVER_TIMEOUT_S = 3.0
"""Seconds to wait for a tracking server."""

OPS_TIMEOUT_S = 120.0
"""Seconds to wait for DeepSpeed to check its ops."""


@dataclass(frozen=True, slots=True)
class Check:
    """The result of one check."""

    name: str  #: what was checked: ``devices``, ``DeepSpeed``, ``disk``, ...
    #: ``ok``; ``limited``: training works, but slower or with fewer options;
    #: ``broken``: something will fail
    state: Literal["ok", "limited", "broken"]
    detail: str  #: what was found and, if limited, what does not work
    advice: str = ""  #: how to improve it; empty if the state is ``ok``


def examine(
    runs_dir: str | Path = "runs", tracking_uri: str | None = None
) -> list[Check]:
    """Run every check.

    Parameters
    ----------
    runs_dir
        Folder that runs will be written to.
    tracking_uri
        MLflow's tracking URI; None means MLflow's default, ``sqlite:///mlflow.db``.
    """
    return [
        _python(),
        _devices(),
        _precision(),
        _communication(),
        *_deepspeed(),
        _compiler(),
        _mpi(),
        _mlflow(),
        _store(tracking_uri),
        _disk(Path(runs_dir)),
        _runs_folder(try_folder(_find_existing(Path(runs_dir)))),
        *_shared_memory(),
    ]


def _python() -> Check:
    detail = f"Python {platform.python_version()}, torch {torch.__version__}"
    return Check("Python", "ok", detail)


def _devices() -> Check:
    if torch.cuda.is_available():
        found = [
            f"{at.name} ({at.total_memory / 2**30:.0f} GB)"
            for at in map(
                torch.cuda.get_device_properties, range(torch.cuda.device_count())
            )
        ]
        return Check("devices", "ok", ", ".join(found))
    if torch.backends.mps.is_available():
        return Check("devices", "ok", "Apple GPU (MPS)")
    detail = (
        f"CPU only, {torch.get_num_threads()} threads: no fp16, no FusedAdam, no NCCL"
    )
    if torch.version.cuda or torch.version.hip:
        advice = (
            "torch is built for a GPU. Install the GPU's driver and check nvidia-smi."
        )
    else:
        advice = "If this machine has a GPU, install torch for it: https://pytorch.org."
    return Check("devices", "limited", detail, advice)


def _precision() -> Check:
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        detail = "fp16 and float32; bf16 is emulated and slow"
        advice = "Use precision='fp16', or harness fit --precision fp16."
        return Check("precision", "limited", detail, advice)
    detail = "bf16 and float32"
    if torch.cuda.is_available():
        hint = "at ZeRO 0 use --precision, because 'bf16' in the config is slower"
        detail = f"bf16, fp16 and float32; {hint}"
    return Check("precision", "ok", detail)


def _communication() -> Check:
    available = {
        "gloo": torch.distributed.is_available()
        and torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_available()
        and torch.distributed.is_nccl_available(),
    }
    names = [name for name, is_available in available.items() if is_available]
    if not available["gloo"] or (torch.cuda.is_available() and not available["nccl"]):
        detail = f"{', '.join(names) or 'neither gloo nor nccl'}: one rank only"
        advice = "Install a build of torch with gloo, and with nccl if there are GPUs."
        return Check("ranks", "broken", detail, advice)
    return Check("ranks", "ok", ", ".join(names))


def _deepspeed() -> Iterator[Check]:
    """Check DeepSpeed in a separate process, because it prints while it checks its ops."""
    if importlib.util.find_spec("deepspeed") is None:
        detail = "not installed: training runs on one rank only"
        advice = "pip install deepspeed (Linux)."
        yield Check("DeepSpeed", "limited", detail, advice)
        return
    version = importlib.metadata.version("deepspeed")
    text = (
        "import json; from harness.accelerators.deepspeed import library; "
        "print(); print(json.dumps(library.list_ops()))"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-c", text],
            capture_output=True,
            text=True,
            timeout=OPS_TIMEOUT_S,
            check=True,
        )
        ops: dict[str, list[str]] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no message"])[-1]
        advice = "Reinstall deepspeed and torch in versions that work together."
        detail = f"{version}, cannot be imported: {last}"
        yield Check("DeepSpeed", "broken", detail, advice)
        return
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        detail = f"{version}; its ops could not be checked: {type(error).__name__}"
        advice = "Run 'ds_report' for details."
        yield Check("DeepSpeed", "limited", detail, advice)
        return
    yield Check("DeepSpeed", "ok", version)
    yield _ops(ops)


def _ops(ops: dict[str, list[str]]) -> Check:
    parts = [f"{state}: {', '.join(names)}" for state, names in ops.items() if names]
    if {"cpu_adam", "fused_adam"} & {*ops["built"], *ops["can be built"]}:
        return Check("DeepSpeed's ops", "ok", "; ".join(parts))
    detail = "; ".join(parts) + ". DeepSpeed's own optimizers do not work; torch's do."
    advice = "Install a C++ compiler and ninja, and on a GPU the CUDA toolkit (nvcc)."
    return Check("DeepSpeed's ops", "limited", detail, advice)


def _compiler() -> Check:
    """Check the tools that build DeepSpeed's ops and torch.compile's kernels."""
    needed = {
        "C++ compiler": shutil.which("c++")
        or shutil.which("g++")
        or shutil.which("clang++"),
        "ninja": shutil.which("ninja") or importlib.util.find_spec("ninja"),
    }
    if torch.version.cuda:
        needed["nvcc"] = shutil.which("nvcc")
    missing = [name for name, found in needed.items() if not found]
    if not missing:
        return Check("compiler", "ok", ", ".join(needed))
    detail = f"no {', no '.join(missing)}: no offload to the CPU, no FusedAdam, no torch.compile"
    advice = (
        "Install build-essential (or a conda compiler), ninja and the CUDA toolkit."
    )
    return Check("compiler", "limited", detail, advice)


def _mpi() -> Check:
    starter = shutil.which("mpirun") or shutil.which("mpiexec")
    if starter is not None:
        return Check("MPI", "ok", starter)
    detail = "no mpirun: MPI cannot start ranks"
    advice = "Install MPI only if you want mpirun; torchrun, deepspeed and srun do not need it."
    return Check("MPI", "limited", detail, advice)


def _mlflow() -> Check:
    if importlib.util.find_spec("mlflow") is None:
        detail = "not installed: runs are recorded, but MLflow cannot show them"
        advice = "Run pip install mlflow, then 'harness sync' to send recorded runs."
        return Check("MLflow", "limited", detail, advice)
    return Check("MLflow", "ok", importlib.metadata.version("mlflow"))


def _store(uri: str | None) -> Check:
    """Check that MLflow's store can be reached, without writing to it."""
    uri = uri or "sqlite:///mlflow.db"
    shown = redact(uri)
    if uri.startswith(("http://", "https://")):
        return _server(uri, shown)
    path = Path(uri.removeprefix("sqlite:///").removeprefix("file://"))
    folder = path.parent
    if uri.startswith("sqlite:") and not folder.is_dir():
        detail = f"{shown}: the folder {folder} does not exist"
        advice = f"Create {folder}, or change MLFLOW_TRACKING_URI."
        return Check("MLflow store", "broken", detail, advice)
    detail = shown if path.exists() else f"{shown} (the first run creates it)"
    return Check("MLflow store", "ok", detail)


def _server(uri: str, shown: str) -> Check:
    try:
        with urllib.request.urlopen(
            uri.rstrip("/") + "/health", timeout=SERVER_TIMEOUT_S
        ):
            return Check("MLflow store", "ok", shown)
    except urllib.error.HTTPError as error:
        # It runs. Whether it wants a password, for example, is MLflow's concern.
        detail = f"{shown} (answers {error.code})"
        return Check("MLflow store", "ok", detail)
    except (OSError, ValueError) as error:
        detail = f"{shown} does not answer ({error}): records are sent later"
        advice = "Start the server, then run 'harness sync' to send recorded runs."
        return Check("MLflow store", "limited", detail, advice)


def _disk(runs_dir: Path, min_free_bytes: int = MIN_FREE_BYTES) -> Check:
    free = shutil.disk_usage(_find_existing(runs_dir)).free
    detail = f"{free / 2**30:.1f} GB free for {runs_dir}"
    if free < min_free_bytes:
        advice = "Free some space, or set HARNESS_RUNS to a folder on a larger disk."
        return Check("disk", "limited", detail, advice)
    return Check("disk", "ok", detail)


def _runs_folder(report: FolderReport) -> Check:
    """Describe what of files, renames, locks and maps works where runs are written."""
    filesystem, problems = report.filesystem, report.problems
    name = filesystem.name or "a file system without a name"
    for word in ("write", "rename", "exclude"):
        if word in problems:
            detail = f"{name}, {_DOES[word]} fails: {problems[word]}"
            advice = "Set HARNESS_RUNS to a folder where runs can be written."
            return Check("runs folder", "broken", detail, advice)
    found = {
        "locks": "lock" in problems,
        "locks seen by other machines": not filesystem.shares_locks,
        "maps": "map" in problems or not filesystem.keeps_maps,
    }
    missing = [word for word, is_missing in found.items() if is_missing]
    if "locks" in missing:
        del found["locks seen by other machines"]
        missing = [word for word in missing if word in found]
    works = [word for word in found if word not in missing]
    detail = f"{name}: {', '.join(['renames', *works])}"
    if not missing:
        return Check("runs folder", "ok", detail)
    detail += f"; no {', no '.join(missing)}"
    advice = "; ".join(_LACKS[word] for word in missing)
    return Check("runs folder", "limited", detail, f"{advice}.")


_DOES = {
    "write": "to write",
    "rename": "to rename a file",
    "exclude": "to create a file only once",
}
_LEASES = (
    "leases show who writes a run; after a kill on another machine, it may need "
    "'harness runs release' before it can be resumed"
)
_LACKS = {
    "locks": f"Without locks {_LEASES}. On Lustre, mount with -o flock",
    "locks seen by other machines": f"If machines do not share locks, {_LEASES}",
    "maps": "Each logged row is a system call, which takes about a microsecond more",
}


def _find_existing(folder: Path) -> Path:
    folder = folder.absolute()
    while not folder.exists():
        folder = folder.parent
    return folder


def _shared_memory() -> Iterator[Check]:
    """Check the memory that workers of data loaders and NCCL ranks share."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    detail = f"{total / 2**30:.1f} GB"
    if total < 2**29:
        detail += ": NCCL and data loaders with workers may fail"
        advice = "Start the container with --shm-size=1g or more."
        yield Check("shared memory", "limited", detail, advice)
    else:
        yield Check("shared memory", "ok", detail)
