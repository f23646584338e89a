"""The loops fit, evaluate and predict, and their contexts.

Everything else reacts to the events that the loops fire.
"""

from __future__ import annotations

from harness.loop.contexts import EvaluateContext, FitContext, PredictContext
from harness.loop.fitting import fit
from harness.loop.prediction import predict
from harness.loop.validation import evaluate, validate

__all__ = [
    "EvaluateContext",
    "FitContext",
    "PredictContext",
    "evaluate",
    "fit",
    "predict",
    "validate",
]
