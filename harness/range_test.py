"""Learning-rate range test: train briefly with a growing rate and record the loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from harness.callback import Callback
from harness.data.loaders import Data
from harness.errors import EarlyStop

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.learner import Learner


@dataclass(frozen=True, kw_only=True)
class LRFinderResult:
    """Result of ``lr_finder``: the learning rates and the loss at each.

    Attributes
    ----------
    lrs : list of float
        Rate of each optimizer step, growing.
    losses : list of float
        Loss of the batch of each step, smoothed by an exponential mean.
    """

    lrs: list[float]
    losses: list[float]

    @property
    def suggestion(self) -> float:
        """Rate at which the loss falls fastest."""
        if len(self.losses) < 3:
            return self.lrs[0]
        falls = [b - a for a, b in zip(self.losses, self.losses[1:], strict=False)]
        return self.lrs[falls.index(min(falls))]

    def to_frame(self) -> pd.DataFrame:
        """Return a DataFrame with the columns lr, loss."""
        import pandas as pd  # noqa: PLC0415  slow to import, rarely used

        return pd.DataFrame({"lr": self.lrs, "loss": self.losses})

    def plot(self, path: str | Path | None = None) -> Figure:
        """Plot loss against learning rate, and save the picture if `path` is given."""
        from matplotlib.figure import Figure  # noqa: PLC0415  takes half a second

        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(self.lrs, self.losses, color="#2563eb")
        at = self.suggestion
        axes.axvline(at, color="#ea580c", lw=1, ls="--", label=f"steepest: {at:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss (smoothed)")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


class _Sweep(Callback):
    """Raises the rate after each step; ends the fit when the loss diverges."""

    def __init__(self, start_lr: float, end_lr: float, num_steps: int) -> None:
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.start_lr, self.num_steps = start_lr, num_steps
        self.factor = (end_lr / start_lr) ** (1 / max(1, num_steps - 1))
        self.mean = 0.0

    def _set_lr(self, rate: float) -> None:
        for group in self.ctx.opt.param_groups:
            group["lr"] = rate

    def on_fit_begin(self) -> None:
        self._set_lr(self.start_lr)

    def on_train_batch_after_step(self) -> None:
        loss = float(self.ctx.loss[self.ctx.opt_name])
        done = len(self.lrs) + 1
        self.mean = 0.9 * self.mean + 0.1 * loss
        self.losses.append(self.mean / (1 - 0.9**done))
        self.lrs.append(self.start_lr * self.factor ** (done - 1))
        if done >= self.num_steps or not self.losses[-1] <= 4 * min(self.losses):
            raise EarlyStop
        self._set_lr(self.start_lr * self.factor**done)


def lr_finder(
    learner: Learner,
    data: Data,
    *,
    start_lr: float = 1e-7,
    end_lr: float = 1.0,
    num_steps: int = 100,
    dataloader_options: Mapping[str, object] | None = None,
    seed: int | None = None,
) -> LRFinderResult:
    """Train a new model briefly with a growing learning rate.

    Parameters
    ----------
    learner
        Learner with a single optimizer.
    data
        As in ``Learner.fit``.
    start_lr, end_lr : > 0
        First and last rate.
    num_steps : >= 1
        Optimizer steps to take; fewer if the loss diverges.
    dataloader_options, seed
        As in ``Learner.fit``.

    Returns
    -------
    LRFinderResult

    Raises
    ------
    ValueError
        If ``0 < start_lr < end_lr`` does not hold.

    References
    ----------
    luz 0.5.0, ``lr_finder``; Smith 2017, "Cyclical Learning Rates", section 3.3.
    """
    if not 0 < start_lr < end_lr:
        msg = (
            f"lr_finder: expected 0 < start_lr < end_lr, got {start_lr!r}, {end_lr!r}."
        )
        raise ValueError(f"{msg} Pass for example 1e-7 and 1.")
    sweep = _Sweep(start_lr, end_lr, num_steps)
    learner.fit(
        data,
        epochs=num_steps,
        callbacks=[sweep],
        verbose=False,
        dataloader_options=dataloader_options,
        seed=seed,
        tracker=False,
    )
    return LRFinderResult(lrs=sweep.lrs, losses=sweep.losses)
