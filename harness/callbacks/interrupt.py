"""Ends the fit at the end of a batch on Ctrl-C or SIGTERM; everything logged is kept."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable
from types import FrameType

from harness.callback import Callback
from harness.errors import Interrupted

Handler = Callable[[int, FrameType | None], object] | int | None

CHECK_EVERY = 10
"""Batches between two checks of several ranks whether one of them got a signal."""


class Interrupt(Callback):
    """Ends the fit after the batch on Ctrl-C, SIGTERM or SIGUSR1; a second signal ends it now.

    Several ranks check for signals together, every ``CHECK_EVERY`` batches, so that they end
    at the same batch. Outside the main thread, no signal handler is installed.

    Attributes
    ----------
    signum : int or None
        First signal received.

    References
    ----------
    luz 0.5.0, ``luz_callback_interrupt``. Differs from luz: the batch is finished first.
    """

    weight = math.inf
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._before: dict[signal.Signals, Handler] = {}

    def on_fit_begin(self) -> None:
        """Install the signal handlers."""
        self.signum = None
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        """Remember the first signal; raise at the second."""
        if self.signum is not None:
            self._restore()
            raise KeyboardInterrupt
        self.signum = signum

    def _stop_if_signalled(self) -> None:
        """Raise at the same batch on every rank."""
        accelerator, has_signal = self.ctx.accelerator, self.signum is not None
        assert accelerator is not None and self.ctx.iter is not None
        if accelerator.world_size > 1:
            is_due = self.ctx.iter % CHECK_EVERY == 0
            has_signal = is_due and accelerator.any(has_signal)
        if has_signal:
            self.ctx.stop_signal = self.signum or signal.SIGINT
            raise Interrupted(self.signum or signal.SIGINT)

    def _restore(self) -> None:
        """Restore the earlier signal handlers."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def on_train_batch_end(self) -> None:
        """End the fit here after a signal."""
        self._stop_if_signalled()

    def on_valid_batch_end(self) -> None:
        """End the fit here after a signal."""
        self._stop_if_signalled()

    def on_fit_end(self) -> None:
        """Restore the earlier signal handlers."""
        self._restore()

    def on_exception(self) -> None:
        """Restore the earlier signal handlers."""
        self._restore()
