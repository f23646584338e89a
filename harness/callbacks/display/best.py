"""The best epoch so far, which a display marks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from harness.callbacks.monitor import Monitor
from harness.pytree import named_leaves
from harness.records import iter_filled

if TYPE_CHECKING:
    from harness.context import Context


class BestSoFar:
    """Follows the metric that a callback of the fit monitors, else the validation loss.

    Parameters
    ----------
    ctx
        Context of a fit that is about to begin, or has resumed.

    Attributes
    ----------
    monitor
        Name of the metric, such as ``valid/loss``; None without validation and monitor.
    index : int or None
        Epoch, or step, of the best value so far; None: none yet.
    """

    def __init__(self, ctx: Context) -> None:
        default = f"{next(iter(ctx.valid_sets), None)}/loss" if ctx.valid_sets else None
        watching = [c for c in ctx.callbacks if isinstance(c, Monitor)]
        chosen = [c for c in watching if c.monitor != "valid/loss"] or watching
        self._callback = chosen[0] if chosen else None
        self.monitor = default
        if self._callback is not None and (default or self._callback in chosen[:1]):
            self.monitor = self._callback.monitor
        self.index: int | None = None
        self._score = math.inf
        self._add_earlier(ctx)

    def _add_earlier(self, ctx: Context) -> None:
        """Look at what a resumed fit has logged before."""
        if self.monitor is None:
            return
        split = self.monitor.partition("/")[0]
        for index, metrics in iter_filled(
            ctx.records.get("metrics", {}).get(split, [])
        ):
            if isinstance(metrics, dict):
                self._compare(index, dict(named_leaves(metrics, f"{split}/")))

    def update(self, ctx: Context) -> bool:
        """Return whether the metrics that are logged at ``ctx.index`` are the best so far."""
        if self.monitor is None or ctx.index is None:
            return False
        split = self.monitor.partition("/")[0]
        values = dict(named_leaves(ctx.get_metrics(split, ctx.index), f"{split}/"))
        if ctx.index == self.index:  # it was among the earlier ones
            return self.monitor in values
        return self._compare(ctx.index, values)

    def _compare(self, index: int, values: dict[str, object]) -> bool:
        value = values.get(self.monitor or "")
        if not isinstance(value, int | float) or math.isnan(value):
            return False
        score = value if self._callback is None else self._callback.score(value)
        if score >= self._score:
            return False
        self.index, self._score = index, score
        return True
