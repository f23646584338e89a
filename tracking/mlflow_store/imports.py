"""Import MLflow in less time: without pandas and polars, which its client does not need."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from typing import Final

_FRAMES: Final = ("pandas", "polars")
"""Libraries that MLflow imports if they are there, for data sets that are not logged here."""

_IMPORTING: Final = threading.Lock()


class _NoFrames:
    """Finder of modules that finds none of `_FRAMES`."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name in _FRAMES:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def block_frames() -> None:
    """Let imports fail for pandas and polars until `import_mlflow` has ended.

    pandas takes a third of a second, polars a tenth. mlflow-skinny has neither, and Arrow
    imports pandas with its first array only if it is there.
    """
    if _NoFrames not in sys.meta_path:
        sys.meta_path.insert(0, _NoFrames)


def import_mlflow(module: str) -> None:
    """Import a module of MLflow faster than a plain import does.

    The import takes more than a second. Without garbage collection, pandas and polars it
    takes half the time.
    """
    with _IMPORTING:
        if module in sys.modules:
            return
        collecting = gc.isenabled()
        gc.disable()
        block_frames()
        try:
            importlib.import_module(module)
        finally:
            sys.meta_path.remove(_NoFrames)
            if collecting:
                # Else the first two collections look through all that was imported, which
                # takes a quarter of a second.
                gc.freeze()
                gc.enable()
