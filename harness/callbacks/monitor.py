"""Base of callbacks that watch a metric, ``<set>/<metric>`` or ``<set>/<metric>/<optimizer>``."""

from __future__ import annotations

from math import inf
from typing import Literal

from harness.callback import Callback
from harness.context import Context
from harness.pytree import StateDict, named_leaves
from harness.setup_checks import check_monitor

Mode = Literal["min", "max"]


def get_logged_metrics(ctx: Context) -> dict[str, float]:
    """Return the metrics logged at the current epoch, by monitor name."""
    return {
        f"{split}/{name}": float(value)
        for split in ctx.records["metrics"]
        for name, value in named_leaves(ctx.get_metrics(split, ctx.epoch))
        if isinstance(value, int | float)
    }


class Monitor(Callback):
    """Base of callbacks that watch one logged metric at the end of each epoch.

    Parameters
    ----------
    monitor
        ``<set>/<metric>`` or ``<set>/<metric>/<optimizer>``, for example ``valid/loss``.
    mode
        ``"min"`` if lower is better, ``"max"`` if higher is better.
    min_delta : >= 0
        Smallest change that is an improvement, in units of the metric.

    Raises
    ------
    ValueError
        Before the first epoch, if the name has no set, or validation data is missing. At
        the end of the first epoch, if the metric was not logged; the message lists what was.
    """

    def __init__(
        self, monitor: str = "valid/loss", mode: Mode = "min", min_delta: float = 0.0
    ) -> None:
        name = type(self).__name__
        if mode not in {"min", "max"}:
            msg = f"{name}(mode): expected 'min' or 'max', got {mode!r}."
            raise ValueError(f"{msg} Use 'min' for losses, 'max' for accuracies.")
        if min_delta < 0:
            msg = f"{name}(min_delta): expected a number >= 0, got {min_delta!r}."
            raise ValueError(f"{msg} Pass the size of the change without a sign.")
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self.initial_best = inf if mode == "min" else -inf
        self.best = self.initial_best

    @property
    def _place(self) -> str:
        return f"{type(self).__name__}(monitor={self.monitor!r})"

    def check(self, ctx: Context) -> None:
        """Refuse a monitor that cannot be logged in this fit."""
        check_monitor(self._place, self.monitor, ctx.valid_data is not None)

    def reset(self) -> None:
        """Forget the best value, so that the callback can serve another fit."""
        self.best = self.initial_best

    def get_value(self) -> float:
        """Return the monitored value of this epoch."""
        logged = get_logged_metrics(self.ctx)
        if self.monitor not in logged:
            msg = f"{self._place}: expected a logged metric, got {self.monitor!r}."
            raise ValueError(f"{msg} Logged so far: {', '.join(logged) or 'nothing'}.")
        return logged[self.monitor]

    def update_best(self) -> bool:
        """Return True and keep this epoch's value if it is the best so far."""
        value = self.get_value()
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best = value
            return True
        return False

    def state_dict(self) -> StateDict:
        """Return the best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the best value."""
        self.best = state["best"]
