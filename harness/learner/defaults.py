"""Callbacks that every fit, evaluation and prediction has."""

from __future__ import annotations

from collections.abc import Iterable

from harness.callback import Callback
from harness.callbacks import Interrupt, Metrics, Profile, Progress, TrainValid
from harness.checks.callbacks import check_callbacks
from harness.metrics.sets import MetricSet


def default_callbacks(metrics: MetricSet) -> list[Callback]:
    """Return the callbacks of every fit."""
    return [Profile(), TrainValid(), Metrics(metrics), Progress(), Interrupt()]


def make_progress(verbose: bool | None) -> Progress:
    """Make what shows an evaluation or prediction: a line only if asked for, or if it is long."""
    return Progress() if verbose else Progress(min_s=1.0)


def add_defaults(
    defaults: Iterable[Callback], given: Iterable[Callback]
) -> list[Callback]:
    """Return default callbacks and given ones; a given one replaces the default it derives from."""
    given = check_callbacks(given)
    kept = [
        default
        for default in defaults
        if not any(isinstance(callback, type(default)) for callback in given)
    ]
    return [*kept, *given]
