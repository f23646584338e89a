"""Retry calls to MLflow until it answers."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

from tracking.delivery.state import StateFile
from tracking.errors import TrackingError
from tracking.mlflow_store.client import UnreachableError

FIRST_DELAY_S: Final = 0.25
LONGEST_DELAY_S: Final = 15.0
LONGEST_SLEEP_S: Final = 1.0

MAX_FAILURES: Final = 4
"""Failures of one action before it is asked whether a single item causes them."""

_MAX_ERROR: Final = 500

_log = logging.getLogger(__name__)
T = TypeVar("T")


class GaveUpError(TrackingError):
    """MLflow did not answer within the time limit, or cannot take the run."""


@dataclass
class RetryPolicy:
    """Retries calls to MLflow, with growing delays.

    While the run is being written there is no time limit.

    Parameters
    ----------
    state_file
        Where the phase and the error are shown to readers.
    limit_s : seconds
        How long to retry once the run is not written any more.
    isolate
        Called when an action has failed several times. True: MLflow takes other things,
        so the action now leaves out what it fails for.
    is_replaced
        Whether another process wants to deliver the run instead.
    """

    state_file: StateFile
    limit_s: float
    is_being_written: Callable[[], bool]
    redact: Callable[[str], str] = str
    isolate: Callable[[], bool] = lambda: False
    is_replaced: Callable[[], bool] = lambda: False
    sleep: Callable[[float], None] = time.sleep
    clock: Callable[[], float] = time.monotonic
    _deadline: float | None = field(default=None, init=False)

    def run(self, action: Callable[[], T]) -> T:
        """Call an action until MLflow answers; return its result.

        Raises
        ------
        GaveUpError
            If MLflow does not answer within the time limit, or another process is to
            deliver the run.
        """
        delay_s = FIRST_DELAY_S
        num_failures, has_isolated = 0, False
        while True:
            began = self.clock()
            try:
                result = action()
            except UnreachableError as error:
                num_failures += 1
                is_over = self._is_over_limit(began)
                is_stuck = is_over or num_failures >= MAX_FAILURES
                if is_stuck and not has_isolated and self.isolate():
                    _log.warning("leaving out what MLflow fails for: %s", error)
                    has_isolated = True
                    continue
                if is_over:
                    raise self.give_up(error) from error
                self._report_waiting(error)
                self._wait(delay_s, error)
                delay_s = min(2 * delay_s, LONGEST_DELAY_S)
            else:
                self._deadline = None
                if self.state_file.state.error:
                    _log.info("MLflow answers again")
                    self.state_file.set_phase("delivering")
                return result

    def _wait(self, delay_s: float, error: Exception) -> None:
        """Sleep; end the delivery as soon as another process wants to take over."""
        while delay_s > 0:
            if self.is_replaced():
                raise self.give_up(error) from error
            self.sleep(min(delay_s, LONGEST_SLEEP_S))
            delay_s -= LONGEST_SLEEP_S

    def give_up(self, error: Exception) -> GaveUpError:
        """Record the error that ends the delivery; return the exception to raise."""
        text = self.redact(str(error))[:_MAX_ERROR]
        _log.error("giving up: %s", text)
        self.state_file.set_phase("gave up", text)
        return GaveUpError(text)

    def _is_over_limit(self, began: float) -> bool:
        """Whether MLflow has been silent for too long; the first call began at ``began``."""
        if self.is_being_written():
            self._deadline = None
            return False
        if self._deadline is None:
            self._deadline = began + self.limit_s
        return self.clock() >= self._deadline

    def _report_waiting(self, error: Exception) -> None:
        """Show why delivery waits; log each reason once."""
        text = self.redact(str(error))[:_MAX_ERROR]
        if text != self.state_file.state.error:
            _log.warning("waiting for MLflow: %s", text)
        self.state_file.set_phase("waiting", text)
