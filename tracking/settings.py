"""Settings of delivery from environment variables. They are read only here."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tracking.redaction import (
    collect_argument_secrets,
    collect_secrets,
    redact,
    redact_address,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Settings of delivery.

    Attributes
    ----------
    tracking_uri, experiment_name, experiment_id
        Values of MLflow's own variables; None if a variable is not set.
    cache
        Folder of prepared databases.
    secrets
        Values to mask in every text that is written.
    """

    tracking_uri: str | None
    experiment_name: str | None
    experiment_id: str | None
    cache: Path
    secrets: tuple[str, ...]

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the settings.

        Parameters
        ----------
        environment
            Environment variables; None: those of this process.
        """
        if environment is None:
            environment = os.environ  # noqa: TID251  read only here
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


def read_secrets(environment: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """Secrets of this process: of its environment variables and its command line.

    Parameters
    ----------
    environment
        Environment variables; None: those of this process.
    """
    if environment is None:
        environment = os.environ  # noqa: TID251  read only here
    return collect_secrets(environment) + collect_argument_secrets(sys.orig_argv)
