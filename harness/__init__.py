"""Train PyTorch models with luz's context and callbacks, on one device or with DeepSpeed.

Names are imported on first use, so that ``import harness`` is quick.
"""

from __future__ import annotations

import gc
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness import accelerators, callbacks
    from harness.accelerators.select import accelerator
    from harness.callback import Callback
    from harness.context import Context
    from harness.errors import (
        CheckpointError,
        EarlyStop,
        ExperimentError,
        ExportError,
        Interrupted,
        SkipEpoch,
    )
    from harness.experiment import Experiment
    from harness.fitted import Evaluation, Fitted
    from harness.learner import Learner, load, setup
    from harness.loop import EvaluateContext, FitContext, PredictContext
    from harness.metrics.part import on
    from harness.metrics.sets import MetricSet
    from harness.range_test import lr_finder

_HOMES = {
    "Callback": "callback",
    "CheckpointError": "errors",
    "Context": "context",
    "EarlyStop": "errors",
    "EvaluateContext": "loop",
    "Evaluation": "fitted",
    "Experiment": "experiment",
    "ExperimentError": "errors",
    "ExportError": "errors",
    "FitContext": "loop",
    "Fitted": "fitted",
    "Interrupted": "errors",
    "Learner": "learner",
    "MetricSet": "metrics.sets",
    "PredictContext": "loop",
    "SkipEpoch": "errors",
    "accelerator": "accelerators.select",
    "accelerators": "accelerators",
    "callbacks": "callbacks",
    "load": "learner",
    "lr_finder": "range_test",
    "on": "metrics.part",
    "setup": "learner",
}

__all__ = [
    "Callback",
    "CheckpointError",
    "Context",
    "EarlyStop",
    "EvaluateContext",
    "Evaluation",
    "Experiment",
    "ExperimentError",
    "ExportError",
    "FitContext",
    "Fitted",
    "Interrupted",
    "Learner",
    "MetricSet",
    "PredictContext",
    "SkipEpoch",
    "accelerator",
    "accelerators",
    "callbacks",
    "load",
    "lr_finder",
    "on",
    "setup",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version  # noqa: PLC0415 (slow to import)

        return version("luz-harness")
    home = _HOMES.get(name)
    if home is None:
        msg = f"module 'harness' has no attribute {name!r}"
        if not name.startswith("_"):
            near = _import_module("harness.events").nearest(name, __all__)
            msg += f".{near}" if near else ""
        raise AttributeError(msg)
    module = _import_module(f"harness.{home}")
    value = module if home == name else getattr(module, name)
    globals()[name] = value
    return value


def _import_module(name: str) -> Any:
    """Import a module without the garbage collector, which goes through all of torch again."""
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        if is_enabled:
            gc.enable()
