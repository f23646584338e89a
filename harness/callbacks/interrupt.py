"""Ctrl-C and SIGTERM end the fit at the end of a batch, with everything kept."""

from __future__ import annotations

import math
import signal
import threading
from types import FrameType
from typing import Any

from harness.callback import Callback
from harness.errors import Interrupted

AGREE_EVERY = 10
"""Batches between two agreements of several ranks on whether to end."""


class Interrupt(Callback):
    """Turns a first Ctrl-C, SIGTERM or SIGUSR1 into an ordered end; a second leaves at once.

    On several ranks the end is agreed every ``AGREE_EVERY`` batches, so that no rank is left
    waiting. Outside the main thread nothing is installed.

    Attributes
    ----------
    signum : int or None
        The signal that asked for the end.

    References
    ----------
    luz 0.5.0, ``luz_callback_interrupt``. Differs from luz: the batch is finished first.
    """

    weight = math.inf
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def on_fit_begin(self) -> None:
        """Listen to the signals."""
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._before[number] = signal.signal(number, self._asked)

    def _asked(self, signum: int, _: FrameType | None) -> None:
        """Remember the first signal; leave at the second."""
        if self.signum is not None:
            self._restore()
            raise KeyboardInterrupt
        self.signum = signum

    def _end_if_asked(self) -> None:
        """Raise at the same batch on every rank."""
        accelerator, asked = self.ctx.accelerator, self.signum is not None
        assert accelerator is not None
        if accelerator.world_size > 1:
            asked = self.ctx.iter % AGREE_EVERY == 0 and accelerator.any(asked)  # type: ignore[operator]
        if asked:
            self.ctx.stop_signal = self.signum or signal.SIGINT
            raise Interrupted(self.signum or signal.SIGINT)

    def _restore(self) -> None:
        """Give the signals back."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def on_train_batch_end(self) -> None:
        """End here if asked."""
        self._end_if_asked()

    def on_valid_batch_end(self) -> None:
        """End here if asked."""
        self._end_if_asked()

    def on_fit_end(self) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(self) -> None:
        """Give the signals back."""
        self._restore()
