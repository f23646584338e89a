"""Ends the fit at the end of a batch on Ctrl-C or SIGTERM; everything logged is kept."""

from __future__ import annotations

import math
import signal
import threading
from time import monotonic, time
from types import FrameType

from harness.accelerators.base import Agreement
from harness.accelerators.distributed.environment import read_slurm_end
from harness.callback import Callback
from harness.checks.values import check_more_than
from harness.errors import Interrupted
from harness.signals import GROUP_SIGNALS, EndOfProcess, SignalHandlers, has_handler

REPEAT_S = 2.0
"""Seconds in which a second Ctrl-C comes from the launcher of several ranks."""

ALWAYS = frozenset({signal.SIGINT, signal.SIGTERM})
"""Signals that a fit takes even where the program handles them."""

LAUNCHER_S = 30.0
"""Seconds in which launchers repeat SIGTERM before they kill."""


class Interrupt(Callback):
    """Ends the fit after the current batch on a signal such as Ctrl-C; a second one ends it now.

    Several ranks end after the same batch: the current one or the next. No message is sent
    in each batch for this. Outside the main thread, no signal handler is installed.

    After SIGTERM or SIGHUP, the process starts no other fit: ``fit`` raises ``SystemExit``.

    Parameters
    ----------
    stop_within : > 0
        Seconds from the signal until the batch system kills the process. A checkpoint that
        would take longer, judging by the last ones, is not started. None: the time until
        the end of the Slurm job, if Slurm says it.

    Attributes
    ----------
    signum : int or None
        First signal received, by any rank.

    Notes
    -----
    A terminal sends Ctrl-C to the ranks and to their launcher, which then signals the ranks
    again: torchrun with the same signal, DeepSpeed's launcher with SIGTERM. Batch systems
    repeat SIGTERM too. So only a second Ctrl-C shows that somebody wants the fit to end
    now, and with several ranks only one that comes more than ``REPEAT_S`` later. A fit of
    several ranks that a signal ended leaves its handlers installed, because launchers may
    repeat the signal for ``LAUNCHER_S``. A signal after that has its earlier effect again.

    SIGUSR1 and SIGHUP are left to a program that handles or ignores them, such as by
    ``faulthandler.register`` or under ``nohup``. A fit inside another one's event passes
    its signal on to that one, which then ends, too.

    References
    ----------
    luz 0.5.0, ``luz_callback_interrupt``. Differs from luz: the batch is finished first.
    """

    weight = math.inf
    signals = GROUP_SIGNALS
    clock = staticmethod(monotonic)

    def __init__(self, *, stop_within: float | None = None) -> None:
        if stop_within is not None:
            advice = "Give the seconds between the signal and the kill."
            check_more_than("Interrupt(stop_within)", stop_within, 0, advice)
        self.stop_within = stop_within
        self.signum: int | None = None
        self._signalled_at = 0.0
        self._num_ranks = 1
        self._agreement = Agreement()
        self._is_over = False
        self._handlers = SignalHandlers()
        self._outer: Interrupt | None = None
        self._received = set[int]()

    def on_fit_begin(self) -> None:
        """Install the signal handlers."""
        self._handlers.restore()
        self.signum, self._is_over = None, False
        self._received.clear()
        self._num_ranks = self.ctx.accelerator.world_size
        self._agreement = self.ctx.accelerator.agreement("signal")
        self._outer = None
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                other = _find_fit(number)
                if other is not None and not other._is_over:
                    self._outer = other
                if number in ALWAYS or is_free(number):
                    self._handlers.take(number, self._on_signal)

    def _on_signal(self, signum: int, _: FrameType | None) -> None:
        """Remember the first signal; raise at a second Ctrl-C."""
        self._received.add(signum)
        if self._is_over:
            EndOfProcess.ask(signum)
        if self.signum is None and not self._is_over:
            self.signum = self.ctx.buffers["signal"] = signum
            self._signalled_at = self.clock()
            self.ctx.buffers["stop_by"] = monotonic() + self._time_left()
            self._agreement.ask(signum)
        elif not self._is_repeated(signum):
            self._handlers.restore()
            if not self._is_over:
                raise KeyboardInterrupt
            signal.raise_signal(signum)

    def _time_left(self) -> float:
        """Return the seconds until the process is killed; infinity if that is not known."""
        left_s = math.inf if self.stop_within is None else self.stop_within
        end = read_slurm_end()
        if end is not None and end > time():  # else the job got more time
            left_s = min(left_s, end - time())
        return left_s

    def _is_repeated(self, signum: int) -> bool:
        """Whether a launcher or a batch system repeats the first signal."""
        passed_s = self.clock() - self._signalled_at
        if signum == signal.SIGINT:
            return self._num_ranks > 1 and passed_s < REPEAT_S
        return not self._is_over or passed_s < LAUNCHER_S

    def on_train_batch_end(self) -> None:
        """End the fit here after a signal, at the same batch on every rank."""
        signum = self._agreement.check()
        if signum is None:
            return
        if self.signum is None:  # another rank got it
            self.signum, self._signalled_at = signum, self.clock()
            self._received.add(signum)
        if self._can_stop():
            raise Interrupted(signum)

    on_valid_batch_end = on_train_batch_end

    def _can_stop(self) -> bool:
        """False while validation has other weights, for example averaged ones.

        A checkpoint would hold these, so the fit ends after a batch of the next epoch.
        """
        ctx = self.ctx
        if ctx.training or ctx.valid_start is None:
            return True
        is_changed = not ctx.valid_start.has_same_tensors(ctx.model)
        return not ctx.accelerator.any(is_changed)

    def _end(self) -> None:
        """Let the process end if a signal asks for it, or the fit that this one is in."""
        for signum in tuple(self._received):  # another one may come meanwhile
            if self._outer is None:
                EndOfProcess.ask(signum)
            elif self._outer.signum is None or signum != signal.SIGINT:
                self._outer._on_signal(signum, None)

    def on_fit_end(self) -> None:
        """Restore the earlier signal handlers, unless a launcher may still repeat the signal."""
        self._is_over = True
        if self._num_ranks == 1 or self.signum is None:
            self._handlers.restore()
        self._end()

    def on_exception(self) -> None:
        self._is_over = True
        self._handlers.restore()
        self._end()


def is_free(number: int) -> bool:
    """Whether neither the program nor a library handles or ignores a signal."""
    return _find_fit(number) is not None or not has_handler(number)


def _find_fit(number: int) -> Interrupt | None:
    """Find the fit whose handler a signal has."""
    found = getattr(signal.getsignal(number), "__self__", None)
    return found if isinstance(found, Interrupt) else None
