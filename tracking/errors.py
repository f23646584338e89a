"""Errors and warnings of tracking that somebody may want to catch."""

from __future__ import annotations

import sys
import warnings


class TrackingError(Exception):
    """What goes wrong in tracking alone; the base of the classes here."""


class RunBusyError(TrackingError):
    """Another process, or this one, is writing the run already."""


class RunNotFoundError(TrackingError, LookupError):
    """No run, or more than one, answers to the name that was given."""


class RunClosedError(TrackingError):
    """The run has finished, or belongs to the process this one was forked from."""


class InvalidFileError(TrackingError, ValueError):
    """A file of a run is damaged, or its fields do not have the expected types."""


class DeliveryError(TrackingError):
    """Delivery to MLflow did not get there in the time it was given."""


class TrackingWarning(UserWarning):
    """Something that needs looking at while training goes on."""


def warn(message: str) -> None:
    """Warn, and never raise, whatever the filters say: training goes on."""
    try:
        warnings.warn(message, TrackingWarning, stacklevel=3)
    except TrackingWarning:
        sys.stderr.write(f"{message}\n")
