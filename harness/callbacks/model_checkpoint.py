"""Save checkpoints during a fit."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from harness.accelerators.base import Agreement
from harness.callbacks.monitor import Mode, Monitor
from harness.checkpoint.format import Phase, list_checkpoints, remove_killed_saves
from harness.checkpoint.writer import CheckpointWriter
from harness.checks.values import as_path, check_count, check_folder, check_more_than
from harness.context import Context
from harness.pytree import StateDict

LAST_S = 3.0
"""Seconds before a process is killed that are left to what comes after the last save."""


class ModelCheckpoint(Monitor):
    """Saves checkpoints at the end of epochs, every few steps or minutes, and on interrupt.

    A checkpoint holds all that the rest of the fit depends on; see
    ``harness.checkpoint.state``. In a fit that validates by steps, validations count in place
    of epochs.

    Parameters
    ----------
    path
        Folder of the checkpoints; None: ``checkpoints/`` of the run that records the fit. It
        may name ``{run}`` (the run's id), ``{model}`` (its class) and hparams, as in
        ``"out/{model}-{hidden}"``.
    every_n_epochs : >= 0
        Save after every n-th epoch; 0: not at the end of epochs.
    every_n_steps, every_n_minutes : > 0
        Also save every n optimizer steps, or n minutes; None: do not.
    keep_last : >= 0
        Number of newest checkpoints to keep. With 0, only the best ones are kept, and the
        one of an interrupted fit.
    keep_best : >= 0
        Number of checkpoints of the best epochs to keep in addition.
    monitor, mode
        Which epochs are best; see ``Monitor``.

    Notes
    -----
    A save waits for the one before, so memory does not grow and none is skipped. If training
    waits for a fifth of its time (and half a minute in all), a warning says so, once.
    On several ranks, the clock of rank 0 decides. A failed write becomes a warning, and the
    next save tries again. In the folder of a run, checkpoints of its earlier fits are kept.

    References
    ----------
    luz 0.5.0, ``luz_callback_model_checkpoint``. Differs from luz: saves the complete state,
    not only weights.
    """

    weight = math.inf  # last, so that the state includes what other callbacks counted
    max_wait_s, max_wait_frac = 30.0, 0.2
    """Seconds, and share of its time, that a fit waits for earlier saves without a warning."""

    _earlier: Sequence[str] = ()  # checkpoints of the run's earlier fits

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        every_n_epochs: int = 1,
        every_n_steps: int | None = None,
        every_n_minutes: float | None = None,
        keep_last: int = 1,
        keep_best: int = 0,
        monitor: str = "valid/loss",
        mode: Mode = "auto",
    ) -> None:
        super().__init__(monitor, mode)
        place, advice = type(self).__name__, "Leave it out for the default."
        check_count(f"{place}(every_n_epochs)", every_n_epochs, 0, advice)
        check_count(f"{place}(keep_last)", keep_last, 0, advice)
        check_count(f"{place}(keep_best)", keep_best, 0, advice)
        if every_n_steps is not None:
            check_count(f"{place}(every_n_steps)", every_n_steps, 1, advice)
        if every_n_minutes is not None:
            check_more_than(f"{place}(every_n_minutes)", every_n_minutes, 0, advice)
        is_best_alone = not (every_n_steps or every_n_minutes) and keep_best
        if keep_last == 0 and not is_best_alone:
            msg = (
                f"{place}(keep_last): expected at least 1, or keep_best=1 and saves at"
            )
            raise ValueError(f"{msg} epoch ends only, got 0. {advice}")
        self.path = None
        if path is not None:
            self.path = as_path(f"{place}(path)", path).expanduser()
        self.every_n_epochs, self.every_n_steps = every_n_epochs, every_n_steps
        self.every_n_minutes = every_n_minutes
        self.keep_last, self.keep_best = keep_last, keep_best
        self.writer: CheckpointWriter | None = None
        self._ranked: list[list[Any]] = []
        self._last_step = 0
        self._last_time = 0.0
        self._has_saved = False
        self._timed = Agreement()

    def check(self, ctx: Context) -> None:
        """Refuse a fit without a folder for checkpoints, or without the monitored loss."""
        if self.path is None and ctx.run.path is None:
            msg = f"{type(self).__name__}(path): expected a folder, got None."
            raise ValueError(f"{msg} Pass one: only a fit with a run has its own.")
        folder = self._fill_path(ctx)
        if folder is not None:
            check_folder(f"{type(self).__name__}(path)", folder)
        if self.keep_best:
            super().check(ctx)

    def _fill_path(self, ctx: Context) -> Path | None:
        """Fill the fields of the path."""
        if self.path is None or "{" not in str(self.path):
            return self.path
        fields = {
            **ctx.opt_hparams,
            **ctx.hparams,
            "run": ctx.run.id,
            "model": type(ctx.model).__name__,
        }
        try:
            return Path(str(self.path).format_map(fields))
        except (KeyError, IndexError, ValueError, AttributeError) as error:
            msg = f"{type(self).__name__}(path): expected fields of {sorted(fields)}"
            advice = "The names of the checkpoints contain epoch, batch and step."
            raise ValueError(f"{msg}, got {str(self.path)!r}. {advice}") from error

    def on_fit_begin(self) -> None:
        """Reset the counters; find the folder."""
        self.reset()
        self._ranked, self._last_step, self._earlier = [], 0, ()
        folder = self._fill_path(self.ctx)
        if folder is None:
            assert self.ctx.run.path is not None  # refused in check
            folder = Path(self.ctx.run.path) / "checkpoints"
            self._earlier = [path.name for path in list_checkpoints(folder)]
        self.writer = CheckpointWriter(folder, self.ctx)
        if self.every_n_minutes is not None:
            place = self.ctx.callbacks.index(self)
            self._timed = self.ctx.accelerator.agreement(f"save {place}")
        if self.ctx.accelerator.is_main:
            remove_killed_saves(folder)
        self._began = self._last_time = monotonic()
        self._has_saved = self._has_allocated = self._has_warned = False
        self._waited_s = 0.0

    def on_train_batch_end(self) -> None:
        """Save if a checkpoint is due."""
        step = self.ctx.step
        if self.ctx.iter == 1 and self.ctx.train_pass is not None:
            self.ctx.train_pass.check_kept_batches()
        if step and not self._has_allocated:
            assert self.writer is not None
            self.writer.allocate()  # optimizers have state after the first step
            self._has_allocated = True
        is_due = (
            self.every_n_steps is not None
            and step != self._last_step
            and step % self.every_n_steps == 0
        )
        if self.every_n_minutes is not None:
            is_due = self._is_time(60 * self.every_n_minutes) or is_due
        if is_due:
            self._save("train")

    def _is_time(self, every_s: float) -> bool:
        """Whether so long has passed on rank 0; the ranks agree on the batch."""
        if self.ctx.accelerator.is_main and monotonic() - self._last_time >= every_s:
            self._timed.ask()
        if self._timed.check() is None:
            return False
        self._timed.renew()
        return True

    def react(self) -> None:
        """Save if a checkpoint is due."""
        ctx = self.ctx
        by_steps = ctx.pace.unit == "step"
        count = ctx.step // ctx.pace.every if by_steps else ctx.epoch or 0
        is_due = self.every_n_epochs and count % self.every_n_epochs == 0
        is_ranked = bool(self.keep_best) and self.is_measured()
        # One that is not ranked would be removed at once if only the best are kept.
        if is_due and (self.keep_last or is_ranked):
            self._save("train" if by_steps else "epoch", is_ranked=is_ranked)

    def _rank(self, name: str) -> None:
        """Add a checkpoint to the best ones, if it belongs there; a NaN never does."""
        self._ranked.append([self.score(self.get_value()), self.ctx.epoch, name])
        numbers = [place for place in self._ranked if not math.isnan(place[0])]
        self._ranked = sorted(numbers)[: self.keep_best]

    def on_interrupt(self) -> None:
        """Save if a signal ended the fit after a batch, and there is time for it."""
        if self.ctx.stop_signal is not None and self._has_time():
            self._save("train" if self.ctx.training else "valid")

    def _time_left(self) -> float:
        """Seconds until the process is killed, as far as this rank knows."""
        return float(self.ctx.buffers.get("stop_by", math.inf)) - monotonic()

    def _has_time(self) -> bool:
        """Whether a save can be done before the process is killed; the same on all ranks."""
        accelerator = self.ctx.accelerator
        assert self.writer is not None
        own = [self.writer.estimate_time(), -self._time_left()]
        of_ranks = accelerator.reduce(torch.tensor(own, dtype=torch.float64), "max")
        needed_s, left_s = float(of_ranks[0]), -float(of_ranks[1])
        if needed_s == 0 or needed_s <= left_s:  # it is not known of the first one
            return True
        if accelerator.is_main:
            msg = "checkpoint not started: expected time for it before the process is killed"
            got = f"got {left_s:.0f} s left and {needed_s:.0f} s for it, as the last ones took"
            advice = "The newest checkpoint stays. Save more often, or send the signal earlier."
            warnings.warn(f"{msg}, {got}. {advice}", stacklevel=2)
        return False

    def on_fit_end(self) -> None:
        """Wait for the last save, but not for longer than the process has."""
        left_s = self._time_left()
        self._wait(max(0.0, left_s - LAST_S) if math.isfinite(left_s) else None)
        self._release()

    def on_exception(self) -> None:
        """Wait for the last save, except after a second Ctrl-C."""
        if not isinstance(sys.exception(), KeyboardInterrupt):
            self._wait()
        self._release()

    def _release(self) -> None:
        """Give the memory of the copies back; the callback may live on, as in a notebook."""
        if self.writer is not None:
            self.writer.release()

    def _save(self, phase: Phase, *, is_ranked: bool = False) -> None:
        due = monotonic()
        self._wait()
        self._note_wait(monotonic() - due)
        assert self.writer is not None
        self._last_step, self._last_time = self.ctx.step, monotonic()
        name = self.writer.begin(phase)
        if name is not None:
            if is_ranked:
                self._rank(name)
            self.writer.save(phase)
            self._has_saved = True

    def _note_wait(self, waited_s: float) -> None:
        """Add the time that training waited for the save before; warn if it is a lot."""
        self._waited_s += waited_s
        passed_s = monotonic() - self._began
        bearable_s = max(self.max_wait_s, self.max_wait_frac * passed_s)
        is_short = self._waited_s < bearable_s
        if is_short or self._has_warned or not self.ctx.accelerator.is_main:
            return
        self._has_warned = True
        msg = (
            f"{type(self).__name__}: expected a save to end before the next one is due"
        )
        got = f"got {self._waited_s:.0f} of {passed_s:.0f} s of waiting for saves"
        advice = (
            "Save less often (every_n_steps, every_n_minutes), or to a faster disk."
        )
        warnings.warn(f"{msg}, {got}. {advice}", stacklevel=2)

    def _wait(self, timeout_s: float | None = None) -> None:
        """Wait for the current save; warn if it failed, or else remove old checkpoints."""
        if self.writer is None:
            return
        error = self.writer.wait(timeout_s)
        if self.writer.is_busy:
            msg = "checkpoint not finished: the process is about to be killed."
            warnings.warn(f"{msg} The previous one stays.", stacklevel=2)
        elif error is not None:
            reason = str(error).rstrip(".")
            msg = f"checkpoint not written: {reason}. Training continues."
            warnings.warn(f"{msg} The next save tries again.", stacklevel=2)
        elif self._has_saved:
            is_interrupted = self.ctx.stop_signal is not None
            keep_last = max(self.keep_last, is_interrupted)
            best = {name for *_, name in self._ranked}
            self.writer.prune(keep_last, best.union(self._earlier))

    def state_dict(self) -> StateDict:
        """Return which epochs are best, and the step of the last save."""
        state: StateDict = {"ranked": self._ranked, "last_step": self._last_step}
        if self._earlier:
            state["earlier"] = list(self._earlier)
        return super().state_dict() | state

    def load_state_dict(self, state: StateDict) -> None:
        """Restore which epochs are best, and the step of the last save."""
        super().load_state_dict(state)
        self._ranked, self._last_step = state["ranked"], state["last_step"]
        self._earlier = state.get("earlier", ())
