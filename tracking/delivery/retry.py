"""Trying again until MLflow answers, and writing down how things stand meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar

from tracking.delivery.state import DeliveryState
from tracking.errors import TrackingError
from tracking.mlflow_store.client import UnreachableError
from tracking.store import get_rank_dir, is_being_written

FIRST_DELAY_S: Final = 0.25
LONGEST_DELAY_S: Final = 15.0
SAVE_EVERY_S: Final = 1.0

T = TypeVar("T")


class GaveUpError(TrackingError):
    """MLflow did not answer for as long as it was to be waited for."""


class RetryPolicy:
    """How long one run's delivery waits for MLflow, and what it tells of itself.

    Parameters
    ----------
    run_path
        Folder of the run.
    state
        What to write down; changed by the caller as well.
    limit_s : seconds
        How long a server that does not answer is waited for, once the trainer is gone;
        as long as it lives there is no end.
    rows_to_go
        Tells how many rows MLflow lacks.
    redact
        Takes secrets out of a text.
    log
        Writes a line to the log.
    """

    def __init__(
        self,
        run_path: Path,
        state: DeliveryState,
        *,
        limit_s: float,
        rows_behind: Callable[[], int],
        redact: Callable[[str], str],
        log: Callable[[str], None],
    ) -> None:
        self.state = state
        self.log = log
        self._run_path = run_path
        self._rank_dir = get_rank_dir(run_path, 0)
        self._limit_s = limit_s
        self._rows_behind = rows_behind
        self._redact = redact
        self._deadline: float | None = None
        self._saved_at = 0.0

    def try_(self, action: Callable[[], T]) -> T:
        """Do something with MLflow, again and again until it answers.

        Raises
        ------
        GaveUpError
            If it does not, and the trainer has been gone for long enough.
        """
        delay_s = FIRST_DELAY_S
        while True:
            try:
                result = action()
            except UnreachableError as error:
                if self._is_too_late():
                    raise self.give_up(error) from error
                self._note_trouble(error)
                time.sleep(delay_s)
                delay_s = min(2 * delay_s, LONGEST_DELAY_S)
            else:
                self._deadline = None
                if self.state.error:
                    self.log("MLflow answers again")
                    self.enter("delivering")
                return result

    def give_up(self, error: Exception) -> GaveUpError:
        """Error that ends the delivery, written down."""
        text = self._redact(str(error))[:500]
        self.log(f"giving up: {text}")
        self.enter("gave up", text)
        return GaveUpError(text)

    def enter(self, phase: str, error: str | None = None) -> None:
        """Write down what is going on."""
        self.state.phase, self.state.error = phase, error
        self.save(at_once=True)

    def save(self, *, at_once: bool = False) -> None:
        """Write the state, not too often."""
        now = time.monotonic()
        if not at_once and now - self._saved_at < SAVE_EVERY_S:
            return
        self._saved_at = now
        self.state.behind = self._rows_behind()
        self.state.updated = datetime.now(UTC).isoformat()
        self.state.write(self._run_path)

    def _is_too_late(self) -> bool:
        """Whether a server that does not answer need not be waited for any more."""
        if is_being_written(self._rank_dir):
            self._deadline = None
            return False
        if self._deadline is None:
            self._deadline = time.monotonic() + self._limit_s
        return time.monotonic() >= self._deadline

    def _note_trouble(self, error: Exception) -> None:
        """Tell why nothing goes on, once for each reason."""
        text = self._redact(str(error))[:500]
        if text != self.state.error:
            self.log(f"waiting for MLflow: {text}")
        self.enter("waiting", text)
