"""Ends the fit when a metric stops improving."""

from __future__ import annotations

from harness.callbacks.monitor import Mode, Monitor
from harness.checks.values import check_count, check_number
from harness.errors import EarlyStop
from harness.pytree import StateDict


class EarlyStopping(Monitor):
    """Ends the fit after `patience` epochs, or validations by steps, without improvement.

    Parameters
    ----------
    monitor, mode, min_delta
        Metric to watch; see ``Monitor``.
    patience : >= 0
        Epochs without improvement after which the fit ends; 0 is the same as 1. Epochs
        without a value of the metric do not count.
    baseline
        Value that the first epoch must improve on; None: any first value is the best.

    Notes
    -----
    The fit never ends before ``min_epochs``. ``on_early_stopping`` fires, then
    ``on_fit_end``.

    References
    ----------
    luz 0.5.0, ``luz_callback_early_stopping``.
    """

    weight = 50

    def __init__(
        self,
        monitor: str = "valid/loss",
        *,
        patience: int = 1,
        min_delta: float = 0.0,
        mode: Mode = "auto",
        baseline: float | None = None,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        advice = "Pass the number of epochs to wait without improvement."
        check_count("EarlyStopping(patience)", patience, 0, advice)
        self.patience = patience
        self.waited = 0
        if baseline is not None:
            check_number("EarlyStopping(baseline)", baseline, "Leave it out for none.")
        self._baseline = baseline
        self.reset()

    def on_fit_begin(self) -> None:
        self.reset()
        self.waited = 0

    @property
    def _has_waited(self) -> bool:
        return self.waited >= max(self.patience, 1)

    def _stop(self, num_epochs: int) -> None:
        """End the fit after so many whole epochs, if it has waited long enough."""
        if self._has_waited and num_epochs >= self.ctx.min_epochs:
            raise EarlyStop(self.monitor)

    def on_epoch_begin(self) -> None:
        """End a resumed fit that had already stopped early."""
        self._stop((self.ctx.epoch or 1) - 1)

    def on_train_begin(self) -> None:
        """End a resumed fit that had already stopped early within an epoch."""
        self._stop((self.ctx.epoch or 1) - 1)

    def react(self) -> None:
        """Count values without improvement; end the fit after `patience` of them."""
        if self.is_measured():
            self.waited = 0 if self.update_best() else self.waited + 1
            is_within = self.ctx.pace.unit == "step"
            self._stop((self.ctx.epoch or 1) - is_within)

    def state_dict(self) -> StateDict:
        """Return the best value and the number of epochs waited."""
        return super().state_dict() | {"waited": self.waited}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the best value and the number of epochs waited."""
        super().load_state_dict(state)
        self.waited = state["waited"]
