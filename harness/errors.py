"""Exceptions that somebody catches, and the signals that end an epoch or a fit quietly.

Exception
+-- Signal
|   +-- EarlyStop        ends the fit; the fit counts as finished
|   +-- SkipEpoch        ends the epoch; the fit goes on with the next one
+-- CheckpointError      a checkpoint or saved model that is torn, hostile or does not fit
+-- ExperimentError      an experiment that cannot be found or built
KeyboardInterrupt
+-- Interrupted          Ctrl-C or SIGTERM, raised at the end of a batch on all ranks
"""

from __future__ import annotations


class Signal(Exception):
    """Raised to leave a loop on purpose; ``ctx.handlers`` says what follows."""


class EarlyStop(Signal):
    """Ends the fit quietly; raise it from any callback, on every rank alike."""


class SkipEpoch(Signal):
    """Ends the present epoch quietly; raise it from any callback, on every rank alike."""


class CheckpointError(Exception):
    """A checkpoint or saved model that cannot be trusted or does not fit."""


class ExperimentError(Exception):
    """An experiment that cannot be found, or whose parameters do not fit it."""


class Interrupted(KeyboardInterrupt):
    """The fit was asked to end by a signal, and did so at the end of a batch.

    Parameters
    ----------
    signum
        Number of the signal, 2 for Ctrl-C.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum
