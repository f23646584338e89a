"""Import MLflow in less time: without pandas, which its client does not need."""

from __future__ import annotations

import gc
import importlib
import sys
import threading
from typing import Final

_IMPORTING: Final = threading.Lock()


class _NoPandas:
    """Finder of modules that finds no pandas."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name == "pandas":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def block_pandas() -> None:
    """Let imports fail for pandas until `import_mlflow` has ended.

    It takes a third of a second. mlflow-skinny has none, and Arrow imports it with its
    first array only if it is there.
    """
    if _NoPandas not in sys.meta_path:
        sys.meta_path.insert(0, _NoPandas)


def import_mlflow(module: str) -> None:
    """Import a module of MLflow faster than a plain import does.

    The import takes more than a second. Without garbage collection and without pandas it
    takes half the time.
    """
    with _IMPORTING:
        if module in sys.modules:
            return
        collecting = gc.isenabled()
        gc.disable()
        block_pandas()
        try:
            importlib.import_module(module)
        finally:
            sys.meta_path.remove(_NoPandas)
            if collecting:
                gc.enable()
