"""What this machine can do for training, and what to do about what it lacks."""

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

from tracking.redaction import redact

State = Literal["ok", "lack", "broken"]

LITTLE_BYTES = 5 * 2**30
"""Free disk below which checkpoints of a model of some size do not fit."""

ANSWER_S = 3.0
"""Seconds that a tracking server has to answer."""

OPS_S = 120.0
"""Seconds for DeepSpeed to try its ops."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    part
        What it is: ``devices``, ``DeepSpeed``, ``disk``, ...
    state
        ``ok``; ``lack``: works without, at a cost; ``broken``: something will fail.
    detail
        What was found and, for a lack, what it costs.
    advice
        What to do about it; empty where all is well.
    """

    part: str
    state: State
    detail: str
    advice: str = ""


def examine(
    runs_dir: str | Path = "runs", tracking_uri: str | None = None
) -> list[Finding]:
    """Everything worth knowing before a training is started here.

    Parameters
    ----------
    runs_dir
        Where runs would be written.
    tracking_uri
        MLflow's tracking URI; None: its own default, ``sqlite:///mlflow.db``.

    Returns
    -------
    list of Finding
        In a fixed order.
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
        *_shared_memory(),
    ]


def _python() -> Finding:
    """Versions of what everything stands on."""
    detail = f"Python {platform.python_version()}, torch {torch.__version__}"
    return Finding(part="Python", state="ok", detail=detail)


def _devices() -> Finding:
    """What computes."""
    if torch.cuda.is_available():
        found = [
            f"{at.name} ({at.total_memory / 2**30:.0f} GB)"
            for at in map(
                torch.cuda.get_device_properties, range(torch.cuda.device_count())
            )
        ]
        return Finding(part="devices", state="ok", detail=", ".join(found))
    if torch.backends.mps.is_available():
        return Finding(part="devices", state="ok", detail="Apple GPU, by MPS")
    detail = (
        f"CPU only, {torch.get_num_threads()} threads: no fp16, no FusedAdam, no NCCL"
    )
    if torch.version.cuda or torch.version.hip:
        advice = "torch was built for a GPU: install its driver, or look at nvidia-smi."
    else:
        advice = "With a GPU in the machine, install torch for it: https://pytorch.org."
    return Finding(part="devices", state="lack", detail=detail, advice=advice)


def _precision() -> Finding:
    """Dtypes to train in."""
    if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
        detail = "fp16 and float32; bf16 would be emulated"
        advice = 'Write "fp16": {"enabled": true} in DeepSpeed\'s config.'
        return Finding(part="precision", state="lack", detail=detail, advice=advice)
    detail = (
        "bf16, fp16 and float32" if torch.cuda.is_available() else "bf16 and float32"
    )
    return Finding(part="precision", state="ok", detail=detail)


def _communication() -> Finding:
    """How ranks talk."""
    there = {
        "gloo": torch.distributed.is_available()
        and torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_available()
        and torch.distributed.is_nccl_available(),
    }
    have = [name for name, is_there in there.items() if is_there]
    if not there["gloo"] or (torch.cuda.is_available() and not there["nccl"]):
        detail = f"{', '.join(have) or 'neither gloo nor nccl'}: one rank only"
        advice = (
            "Install a build of torch with both; several ranks need gloo, GPUs nccl."
        )
        return Finding(part="ranks", state="broken", detail=detail, advice=advice)
    return Finding(part="ranks", state="ok", detail=", ".join(have))


def _deepspeed() -> Iterator[Finding]:
    """DeepSpeed and its ops, tried in a process of its own, which may say what it likes."""
    if importlib.util.find_spec("deepspeed") is None:
        detail = "not installed: one rank only"
        advice = "pip install deepspeed (Linux)."
        yield Finding(part="DeepSpeed", state="lack", detail=detail, advice=advice)
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
            timeout=OPS_S,
            check=True,
        )
        ops: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    except subprocess.CalledProcessError as error:
        last = (error.stderr.strip().splitlines() or ["no word"])[-1]
        advice = "Reinstall deepspeed and torch in versions that fit."
        detail = f"{version}, cannot be imported: {last}"
        yield Finding(part="DeepSpeed", state="broken", detail=detail, advice=advice)
        return
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        detail = f"{version}; its ops could not be tried: {type(error).__name__}"
        advice = "Run 'ds_report' to see more."
        yield Finding(part="DeepSpeed", state="lack", detail=detail, advice=advice)
        return
    yield Finding(part="DeepSpeed", state="ok", detail=version)
    yield _ops(ops)


def _ops(ops: dict[str, str]) -> Finding:
    """Which of DeepSpeed's ops can be used."""
    by_state: dict[str, list[str]] = {}
    for name, state in ops.items():
        by_state.setdefault(state, []).append(name)
    parts = [
        f"{state}: {', '.join(sorted(by_state[state]))}"
        for state in ("built", "can be built", "cannot be built")
        if state in by_state
    ]
    usable = by_state.get("built", []) + by_state.get("can be built", [])
    if {"cpu_adam", "fused_adam"} & set(usable):
        return Finding(part="DeepSpeed's ops", state="ok", detail="; ".join(parts))
    detail = "; ".join(parts) + ". No optimizer of DeepSpeed's own; torch's work."
    advice = "Install a C++ compiler and ninja, and on a GPU the CUDA toolkit (nvcc)."
    return Finding(part="DeepSpeed's ops", state="lack", detail=detail, advice=advice)


def _compiler() -> Finding:
    """What builds DeepSpeed's ops and torch.compile's kernels."""
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
        return Finding(part="compiler", state="ok", detail=", ".join(needed))
    detail = f"no {', no '.join(missing)}: no offload to the CPU, no FusedAdam, no torch.compile"
    advice = (
        "Install build-essential (or a conda compiler), ninja and the CUDA toolkit."
    )
    return Finding(part="compiler", state="lack", detail=detail, advice=advice)


def _mpi() -> Finding:
    """Whether ranks can be started by MPI."""
    starter = shutil.which("mpirun") or shutil.which("mpiexec")
    if starter is not None:
        return Finding(part="MPI", state="ok", detail=starter)
    detail = "no mpirun: ranks cannot be started by MPI"
    advice = (
        "Nothing, unless you want mpirun: torchrun, deepspeed and srun need no MPI."
    )
    return Finding(part="MPI", state="lack", detail=detail, advice=advice)


def _mlflow() -> Finding:
    """Whether runs can be shown."""
    if importlib.util.find_spec("mlflow") is None:
        detail = "not installed: runs are recorded, but not shown"
        advice = "pip install mlflow, then 'harness sync' sends what was recorded."
        return Finding(part="MLflow", state="lack", detail=detail, advice=advice)
    return Finding(
        part="MLflow", state="ok", detail=importlib.metadata.version("mlflow")
    )


def _store(uri: str | None) -> Finding:
    """Whether MLflow's store is within reach; nothing is written there."""
    uri = uri or "sqlite:///mlflow.db"
    shown = redact(uri)
    if uri.startswith(("http://", "https://")):
        return _server(uri, shown)
    path = Path(uri.removeprefix("sqlite:///").removeprefix("file://"))
    folder = path.parent
    if uri.startswith("sqlite:") and not folder.is_dir():
        detail = f"{shown}: no such folder as {folder}"
        advice = f"Make {folder}, or change MLFLOW_TRACKING_URI."
        return Finding(
            part="MLflow store", state="broken", detail=detail, advice=advice
        )
    detail = shown if path.exists() else f"{shown} (made by the first run)"
    return Finding(part="MLflow store", state="ok", detail=detail)


def _server(uri: str, shown: str) -> Finding:
    """Whether a tracking server answers."""
    try:
        with urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=ANSWER_S):
            return Finding(part="MLflow store", state="ok", detail=shown)
    except urllib.error.HTTPError as error:
        # It answers; what it wants, for example a password, concerns MLflow.
        detail = f"{shown} (answers {error.code})"
        return Finding(part="MLflow store", state="ok", detail=detail)
    except (OSError, ValueError) as error:
        detail = f"{shown} does not answer ({error}): runs are recorded and sent later"
        advice = "Start the server, then 'harness sync' sends what was recorded."
        return Finding(part="MLflow store", state="lack", detail=detail, advice=advice)


def _disk(runs_dir: Path, little_bytes: int = LITTLE_BYTES) -> Finding:
    """Room for runs and their checkpoints."""
    folder = runs_dir.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    detail = f"{free / 2**30:.1f} GB free for {runs_dir}"
    if free < little_bytes:
        advice = (
            "Make room, or set HARNESS_RUNS to a larger disk; checkpoints are large."
        )
        return Finding(part="disk", state="lack", detail=detail, advice=advice)
    return Finding(part="disk", state="ok", detail=detail)


def _shared_memory() -> Iterator[Finding]:
    """Room through which data workers hand over batches, and NCCL ranks talk."""
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return
    total = shutil.disk_usage(folder).total
    detail = f"{total / 2**30:.1f} GB"
    if total < 2**29:
        detail += ": data loaders with workers and NCCL may fail"
        advice = "In a container, start it with --shm-size=1g or more."
        yield Finding(part="shared memory", state="lack", detail=detail, advice=advice)
    else:
        yield Finding(part="shared memory", state="ok", detail=detail)
