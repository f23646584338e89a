"""The value that a callback watches: ``<set>/<metric>`` or ``<set>/<metric>/<optimizer>``."""

from __future__ import annotations

from math import inf
from typing import Any, Literal

from harness.callback import Callback
from harness.context import Context
from harness.pytree import named_leaves

Mode = Literal["min", "max"]


def logged_names(ctx: Context) -> dict[str, float]:
    """What was logged at the present epoch, by monitor name."""
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
        ``valid/loss``, say: ``<set>/<metric>``, or ``<set>/<metric>/<optimizer>``.
    mode
        ``"min"`` where less is better, ``"max"`` where more is.
    min_delta : >= 0
        Change that counts as better, in units of the metric.

    Raises
    ------
    ValueError
        At the end of the first epoch, if the metric was not logged; names are listed.
    """

    def __init__(
        self, monitor: str = "valid/loss", mode: Mode = "min", min_delta: float = 0.0
    ) -> None:
        name = type(self).__name__
        if mode not in {"min", "max"}:
            msg = f"{name}(mode): expected 'min' or 'max', got {mode!r}."
            raise ValueError(f"{msg} Use 'min' for losses, 'max' for accuracies.")
        if min_delta < 0:
            msg = f"{name}(min_delta): expected a number from 0, got {min_delta!r}."
            raise ValueError(f"{msg} Give the size of the change alone.")
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self.begin_at = inf if mode == "min" else -inf
        self.best = self.begin_at

    def forget(self) -> None:
        """Begin anew, as a callback does that serves a second fit."""
        self.best = self.begin_at

    def value(self) -> float:
        """The watched value of this epoch."""
        logged = logged_names(self.ctx)
        if self.monitor not in logged:
            place = f"{type(self).__name__}(monitor={self.monitor!r})"
            msg = f"{place}: expected a logged metric, got {self.monitor!r}."
            raise ValueError(f"{msg} Logged so far: {', '.join(logged) or 'nothing'}.")
        return logged[self.monitor]

    def improved(self) -> bool:
        """True if this epoch's value is the best so far; it is kept then."""
        value = self.value()
        gain = self.best - value if self.mode == "min" else value - self.best
        if gain > self.min_delta:
            self.best = value
            return True
        return False

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back the best value."""
        self.best = state["best"]
