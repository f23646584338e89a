"""Experiment tracking that never loses a logged value, with or without a framework.

Examples
--------
>>> import tracking
>>> with tracking.start(experiment="digits", delivery=False) as run:
...     run.log_metric("accuracy", 0.97, set="valid", index=1)
>>> tracking.open(run.id).records().num_rows
1
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tracking.api import start
    from tracking.errors import (
        DeliveryError,
        InvalidFileError,
        RunBusyError,
        RunClosedError,
        RunNotFoundError,
        TrackingError,
        TrackingWarning,
    )
    from tracking.exporter import export
    from tracking.read import PastRun, list_runs, open
    from tracking.run import Run

__all__ = [
    "DeliveryError",
    "InvalidFileError",
    "PastRun",
    "Run",
    "RunBusyError",
    "RunClosedError",
    "RunNotFoundError",
    "TrackingError",
    "TrackingWarning",
    "export",
    "list_runs",
    "open",
    "start",
]

_HOMES: Final = {
    "export": "tracking.exporter",
    "PastRun": "tracking.read",
    "list_runs": "tracking.read",
    "open": "tracking.read",
    "Run": "tracking.run",
    "start": "tracking.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562): Arrow alone takes 0.1 s."""
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 (slow to import)

        return version("luz-harness")
    if name not in __all__:
        raise AttributeError(f"module 'tracking' has no attribute {name!r}")
    home = importlib.import_module(_HOMES.get(name, "tracking.errors"))
    value = getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
