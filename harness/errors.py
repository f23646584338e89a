"""Exceptions that somebody catches, and the signals that end an epoch or a fit quietly.

Exception
+-- Signal
|   +-- EarlyStop        ends the fit; the fit counts as finished
|   +-- SkipEpoch        ends the epoch; the fit continues with the next one
+-- CheckpointError      a checkpoint or saved model is damaged, unsafe or does not fit
+-- ExperimentError      an experiment cannot be found or built
+-- ExportError          a model cannot be exported, or its export does something else
KeyboardInterrupt
+-- Interrupted          Ctrl-C or SIGTERM, raised at the end of a batch on all ranks
"""

from __future__ import annotations

from collections.abc import Iterable

from harness.events import nearest


class Signal(Exception):
    """Raised to leave a loop on purpose; a handler in ``ctx.handlers`` decides what follows."""


class EarlyStop(Signal):
    """Ends the fit without an error; raise it from any callback, on every rank."""


class SkipEpoch(Signal):
    """Ends the current epoch without an error; raise it from any callback, on every rank."""


class CheckpointError(Exception):
    """A checkpoint or saved model is damaged, unsafe or does not fit."""


class ExperimentError(Exception):
    """An experiment cannot be found, or its parameters are wrong."""


class Interrupted(KeyboardInterrupt):
    """A signal asked the fit to end, and it ended at the end of a batch.

    Parameters
    ----------
    signum
        Number of the signal, 2 for Ctrl-C.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


class ExportError(Exception):
    """A model cannot be exported, or the exported one gives different outputs."""


def unknown_parameter(
    place: str, function: str, name: str, known: Iterable[str]
) -> ExperimentError:
    """Make the error about a setting that is no parameter of a function."""
    names = list(known)
    msg = f"{place}: expected a parameter of {function}(), got {name!r}."
    choices = ", ".join(names) or "none"
    return ExperimentError(f"{msg}{nearest(name, names)} Its parameters: {choices}.")
