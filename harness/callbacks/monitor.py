"""Base of callbacks that watch a metric, ``<set>/<metric>`` or ``<set>/<metric>/<optimizer>``."""

from __future__ import annotations

import warnings
from math import inf
from typing import Literal

from harness.callback import MetricsListener
from harness.callbacks.metrics import Metrics
from harness.checks.callbacks import check_logged_elsewhere, check_monitor
from harness.checks.values import check_at_least
from harness.context import Context
from harness.pytree import StateDict, named_leaves

Mode = Literal["auto", "min", "max", "zero"]


def get_logged_metrics(ctx: Context) -> dict[str, float]:
    """Return the metrics logged at the current epoch or step, by monitor name."""
    return {
        f"{split}/{name}": float(value)
        for split in ctx.records["metrics"]
        for name, value in named_leaves(ctx.get_metrics(split, ctx.index))
        if isinstance(value, int | float)
    }


def find_directions(ctx: Context) -> dict[str, bool | None]:
    """Return whether higher is better for each ``<set>/<metric>`` of the fit; None: unknown."""
    found: dict[str, bool | None] = {}
    for split in ("train", *(ctx.valid_sets or ["valid"])):
        found[f"{split}/loss"] = False
        for callback in ctx.callbacks:
            if isinstance(callback, Metrics):
                for name, metric in callback.get_metrics(split).items():
                    is_up = getattr(metric, "higher_is_better", None)
                    found[f"{split}/{name}"] = is_up
    return found


class Monitor(MetricsListener):
    """Base of callbacks that watch one logged metric, at the end of each epoch.

    In a fit that validates by steps, they watch it after each validation. Epochs without
    validation, or without a value of a metric that is not computed in each, are passed
    over.

    Parameters
    ----------
    monitor
        ``<set>/<metric>`` or ``<set>/<metric>/<optimizer>``, for example ``valid/loss``. The
        sets are ``train``, and ``valid`` or the names of several sets of validation data.
    mode
        ``"min"`` if lower is better, ``"max"`` if higher is better, ``"zero"`` if closer to
        zero is better. ``"auto"``: ``"min"`` for
        losses, and what ``higher_is_better`` of a torchmetrics object says. Where a metric
        does not say it, the mode must be given.
    min_delta : >= 0
        Smallest change that is an improvement, in units of the metric.

    Raises
    ------
    ValueError
        Before the first epoch, if the name has no set, validation data is missing, or it is
        not known whether higher is better. At the end of the first epoch, if the metric was
        not logged; the message lists what was.

    Notes
    -----
    A NaN is never an improvement. On several ranks the value of rank 0 decides, or that of
    the first rank that has one, and differences are warned of. For a metric that only a
    callback or the model logs, ``"auto"`` means ``"min"``, with a warning.
    """

    def __init__(
        self, monitor: str = "valid/loss", mode: Mode = "auto", min_delta: float = 0.0
    ) -> None:
        name = type(self).__name__
        if mode not in {"auto", "min", "max", "zero"}:
            msg = (
                f"{name}(mode): expected 'auto', 'min', 'max' or 'zero', got {mode!r}."
            )
            raise ValueError(f"{msg} Use 'min' for losses, 'max' for accuracies.")
        advice = "Pass the size of the change without a sign."
        check_at_least(f"{name}(min_delta)", min_delta, 0, advice)
        self.monitor, self.min_delta, self._given_mode = monitor, min_delta, mode
        self._baseline: float | None = None
        self.mode: Mode = "min" if mode == "auto" else mode
        self._has_warned = False
        self.reset()

    @property
    def _place(self) -> str:
        return f"{type(self).__name__}(monitor={self.monitor!r})"

    def check(self, ctx: Context) -> None:
        """Refuse a monitor that cannot be logged in this fit; find out what is better."""
        names, place = find_directions(ctx), self._place
        known = check_monitor(place, self.monitor, names, bool(ctx.valid_sets))
        if known is None:
            check_logged_elsewhere(place, self.monitor, names, ctx.model, ctx.callbacks)
        if self._given_mode != "auto":
            return
        if known is None:
            msg = f"{place}: expected a mode for a metric that the fit does not know."
            warnings.warn(
                f"{msg} 'min' is used. Pass mode='min' or 'max'.", stacklevel=2
            )
        elif names[known] is None:
            msg = f"{place}: expected a mode, got none, and {known!r} has no direction."
            raise ValueError(f"{msg} Pass mode='min' or mode='max'.")
        self.mode = "max" if known is not None and names[known] else "min"
        self.reset()

    def reset(self) -> None:
        """Forget the best value, so that the callback can serve another fit."""
        start = -inf if self.mode == "max" else inf
        self.best = start if self._baseline is None else self._baseline

    def is_measured(self) -> bool:
        """Whether this is an epoch, or validation, with a value of the monitored metric."""
        ctx = self.ctx
        split, _, name = self.monitor.partition("/")
        found = ctx.get_metrics(split, ctx.index)
        if not found and split in ctx.valid_sets and ctx.pace.every > 1:
            return False
        has_pauses = any(
            f"{name}/".startswith(f"{own}/")
            for callback in ctx.callbacks
            if isinstance(callback, Metrics)
            for own in callback.metric_set.every
        )
        logged = {f"{split}/{own}" for own, _ in named_leaves(found)}
        return not has_pauses or self.monitor in logged

    def get_value(self) -> float:
        """Return the monitored value of this epoch, the same on every rank.

        If ranks logged different values, that of the first rank that has one is used.
        """
        logged = get_logged_metrics(self.ctx)
        of_ranks = self.ctx.accelerator.gather_objects(logged.get(self.monitor))
        values = [value for value in of_ranks if value is not None]
        if not values:
            msg = f"{self._place}: expected a logged metric, got {self.monitor!r}."
            raise ValueError(f"{msg} Logged so far: {', '.join(logged) or 'nothing'}.")
        if len(set(map(repr, of_ranks))) > 1:
            self._warn_of_ranks(of_ranks)
        return values[0]

    def _warn_of_ranks(self, of_ranks: list[float | None]) -> None:
        """Warn once that the ranks logged different values."""
        if self.ctx.accelerator.is_main and not self._has_warned:
            msg = (
                f"{self._place}: expected the same value on every rank, got {of_ranks}."
            )
            advice = (
                "Log the same on each, such as ctx.accelerator.reduce(value, 'mean')."
            )
            text = f"{msg} The first one is used. {advice}"
            warnings.warn(text, stacklevel=2)
        self._has_warned = True

    def score(self, value: float) -> float:
        """Return a number that is lower for a better value."""
        if self.mode == "zero":
            return abs(value)
        return -value if self.mode == "max" else value

    def update_best(self) -> bool:
        """Return True and keep this epoch's value if it is the best so far."""
        value = self.get_value()
        if self.score(self.best) - self.score(value) > self.min_delta:
            self.best = value
            return True
        return False

    def state_dict(self) -> StateDict:
        """Return the best value so far."""
        return {"best": self.best}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the best value."""
        self.best = state["best"]
