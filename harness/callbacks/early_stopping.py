"""Ends the fit when a metric no longer gets better."""

from __future__ import annotations

from typing import Any

from harness.callbacks.monitor import Mode, Monitor
from harness.errors import EarlyStop


class EarlyStopping(Monitor):
    """Ends the fit after `patience` epochs without improvement.

    Parameters
    ----------
    monitor, mode, min_delta
        What is watched; see ``Monitor``.
    patience : >= 1
        Epochs without improvement that are borne.
    baseline
        Value that must be bettered from the start; None: any first value counts.

    Notes
    -----
    Never before ``min_epochs``. ``on_early_stopping`` fires, then ``on_fit_end``.

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
        mode: Mode = "min",
        baseline: float | None = None,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        if patience < 1:
            msg = f"EarlyStopping(patience): expected at least 1, got {patience!r}."
            raise ValueError(f"{msg} Give the epochs to wait for a better value.")
        self.patience = patience
        self.waited = 0
        if baseline is not None:
            self.best = self.begin_at = baseline

    def on_fit_begin(self) -> None:
        """Begin anew."""
        self.forget()
        self.waited = 0

    def on_epoch_begin(self) -> None:
        """End a fit that is gone on with from where it had ended already."""
        if self.waited >= self.patience and self.ctx.epoch > self.ctx.min_epochs:  # type: ignore[operator]
            raise EarlyStop(self.monitor)

    def on_epoch_end(self) -> None:
        """Count epochs without improvement; end the fit when there are enough."""
        self.waited = 0 if self.improved() else self.waited + 1
        if self.waited >= self.patience and self.ctx.epoch >= self.ctx.min_epochs:  # type: ignore[operator]
            raise EarlyStop(self.monitor)

    def state_dict(self) -> dict[str, Any]:
        """Best value and epochs waited."""
        return super().state_dict() | {"waited": self.waited}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back best value and epochs waited."""
        super().load_state_dict(state)
        self.waited = state["waited"]
