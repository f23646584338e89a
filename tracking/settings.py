"""What the environment says about delivery, read at one place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tracking.redaction import redacted, secrets_in


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The environment's part in delivery.

    Attributes
    ----------
    tracking_uri, experiment_name, experiment_id
        MLflow's own variables; None where they are not set.
    cache
        Folder of prepared databases.
    secrets
        Values that must not be told.
    """

    tracking_uri: str | None
    experiment_name: str | None
    experiment_id: str | None
    cache: Path
    secrets: tuple[str, ...]

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Settings from environment variables; None: those of this process."""
        if environment is None:
            environment = os.environ  # noqa: TID251 (the one place)
        cache = environment.get("XDG_CACHE_HOME") or "~/.cache"
        return cls(
            tracking_uri=environment.get("MLFLOW_TRACKING_URI") or None,
            experiment_name=environment.get("MLFLOW_EXPERIMENT_NAME") or None,
            experiment_id=environment.get("MLFLOW_EXPERIMENT_ID") or None,
            cache=Path(cache).expanduser() / "luz-harness",
            secrets=secrets_in(environment),
        )

    def redact(self, text: str) -> str:
        """Text without what must not be told."""
        return redacted(text, self.secrets)
