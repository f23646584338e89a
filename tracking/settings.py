"""Settings of delivery, and the rank, from environment variables. They are read only here."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tracking.redaction import (
    collect_argument_secrets,
    collect_secrets,
    is_secret_name,
    redact,
    redact_address,
)

_ENVIRONMENT: Final[Mapping[str, str]] = os.environ  # noqa: TID251  read only here


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of delivery."""

    #: values of MLflow's own variables; None if a variable is not set
    tracking_uri: str | None
    experiment_name: str | None
    experiment_id: str | None
    cache: Path
    secrets: tuple[str, ...]  #: values to mask in every text that is written

    @classmethod
    def read(cls, environment: Mapping[str, str] = _ENVIRONMENT) -> Settings:
        """Read the settings."""
        cache = Path(environment.get("XDG_CACHE_HOME") or "~/.cache")
        try:
            cache = cache.expanduser()
        except RuntimeError:  # a container's user may have no home
            cache = Path(tempfile.gettempdir()) / f"cache-{os.getuid()}"
        return cls(
            tracking_uri=environment.get("MLFLOW_TRACKING_URI") or None,
            experiment_name=environment.get("MLFLOW_EXPERIMENT_NAME") or None,
            experiment_id=environment.get("MLFLOW_EXPERIMENT_ID") or None,
            cache=cache / "luz-harness",
            secrets=read_secrets(environment),
        )

    def redact(self, text: str) -> str:
        """Mask the secrets in a text, and remove credentials from its URLs."""
        return redact(text, self.secrets)

    def redact_address(self, uri: str) -> str:
        """Redact the address of a store; one that is a path stays as it is."""
        return redact_address(uri, self.secrets)


@dataclass(frozen=True, kw_only=True)
class LaunchedRank:
    """One of several ranks that a launcher started."""

    rank: int
    key: str  #: the same on all ranks of a launch, and another one in other launches


_RANKS = (
    ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALNRANKS"),
    ("FLUX_TASK_RANK", "FLUX_JOB_SIZE", ""),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", ""),
)
"""Variables of launchers with rank, number of ranks, and their number on this machine."""

_SHARED = (
    *("MASTER_ADDR", "MASTER_PORT", "PMIX_NAMESPACE", "FLUX_JOB_ID"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    *("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
)
"""Variables that are the same on all ranks of a launch."""


def read_rank(environment: Mapping[str, str] = _ENVIRONMENT) -> LaunchedRank | None:
    """Read which rank this process is; None if it is not one of several."""
    for rank, size, local_size in _RANKS:
        numbers = environment.get(rank, ""), environment.get(size, "")
        if not all(number.isdecimal() for number in numbers):
            continue
        if int(numbers[1]) < 2:
            return None
        shared = [f"{name}={environment.get(name)}" for name in _SHARED]
        # DeepSpeed's launcher has a name of its own.
        local = environment.get(local_size, environment.get("LOCAL_SIZE"))
        if local == numbers[1]:
            shared.append(str(os.getppid()))  # on one machine the launcher itself
        key = hashlib.sha256("\n".join([*shared, numbers[1]]).encode()).hexdigest()
        return LaunchedRank(rank=int(numbers[0]), key=key[:16])
    return None


def read_job(environment: Mapping[str, str] = _ENVIRONMENT) -> tuple[str, int] | None:
    """Read the job of the batch system, and how often it was restarted; None without one.

    Slurm ends what is left of a job before it starts it again.
    """
    job = environment.get("SLURM_JOB_ID", "")
    restart = environment.get("SLURM_RESTART_COUNT", "0")
    if not job or not restart.isdecimal():
        return None
    return f"{environment.get('SLURM_CLUSTER_NAME', '')}/{job}", int(restart)


def read_environment() -> dict[str, str]:
    """All environment variables as they are now."""
    return dict(_ENVIRONMENT)


_OF_STORES: Final = re.compile(
    r"mlflow|^(aws|azure|arm|google|gcp|gcs|cloudsdk|databricks|boto|s3|mysql|odbc)_"
    r"|^(pg[a-z]+|odbcini|odbcsysini|netrc)$"
    r"|proxy$|ca_bundle$|^(ssl|krb5|gssapi|requests)_|^(home|path|xdg_cache_home|tmpdir)$",
    re.IGNORECASE,
)
"""Variables by which MLflow, and the libraries that it calls, find and enter a store."""


def select_of_stores(environment: Mapping[str, str]) -> dict[str, str]:
    """Select the variables that decide where a delivery goes, and with which credentials.

    Examples
    --------
    >>> select_of_stores({"MLFLOW_TRACKING_URI": "a", "HUB_TOKEN": "b", "FOLD": "3"})
    {'MLFLOW_TRACKING_URI': 'a', 'HUB_TOKEN': 'b'}
    """
    return {
        name: value
        for name, value in environment.items()
        if _OF_STORES.search(name) or is_secret_name(name)
    }


def read_secrets(environment: Mapping[str, str] = _ENVIRONMENT) -> tuple[str, ...]:
    """Secrets of this process: of its environment variables and its command line."""
    return _collect_secrets(tuple(environment.items()), tuple(sys.orig_argv))


@functools.lru_cache(maxsize=8)
def _collect_secrets(
    environment: tuple[tuple[str, str], ...], arguments: tuple[str, ...]
) -> tuple[str, ...]:
    return collect_secrets(dict(environment)) + collect_argument_secrets(arguments)
