"""Learning-rate range test: train briefly with a growing rate and record the loss."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from harness.callback import Callback
from harness.checks.calls import explain_calls
from harness.checks.values import (
    check_at_least,
    check_count,
    check_more_than,
    check_number,
    check_picture,
)
from harness.data.loaders import Data
from harness.errors import EarlyStop
from harness.export.html import as_html, as_picture
from harness.fitted import Fitted
from harness.metrics.loss import mean_over_ranks
from harness.rng import find_generators, get_rng_state, set_rng_state
from harness.signals import ENDING_SIGNALS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from harness.accelerators.base import Accelerator
    from harness.learner import Learner


@dataclass(frozen=True, kw_only=True)
class LRFinderResult:
    """Result of ``lr_finder``: the learning rates and the loss at each.

    Attributes
    ----------
    lrs : list of float
        Rate of each optimizer step, growing.
    losses : list of float
        Loss of the batches of each step.
    smoothing : in [0, 1)
        Share of the earlier mean that `smoothed` keeps.
    """

    lrs: list[float]
    losses: list[float]
    smoothing: float = 0.9

    @property
    def smoothed(self) -> list[float]:
        """Exponential mean up to each loss, corrected for its start at 0."""
        means, mean = [], 0.0
        for n, loss in enumerate(self.losses, start=1):
            mean = self.smoothing * mean + (1 - self.smoothing) * loss
            means.append(mean / (1 - self.smoothing**n))
        return means

    @property
    def suggestion(self) -> float:
        """Rate at which the smoothed loss falls fastest, on a logarithmic scale.

        The first tenth of a long test is left out, where the mean is of few losses. So is what
        comes after the lowest loss. Where it never falls, it is the rate of the lowest one.
        """
        means = self.smoothed
        lowest = means.index(min(means, key=lambda mean: (math.isnan(mean), mean)))
        first = len(means) // 10
        slopes = {
            n: (means[n + 1] - means[n]) / math.log(self.lrs[n + 1] / self.lrs[n])
            for n in range(first, lowest)
        }
        return self.lrs[min(slopes, key=slopes.__getitem__) if slopes else lowest]

    def __repr__(self) -> str:
        found = f"{len(self.lrs)} steps"
        if self.lrs:
            found += f" from {self.lrs[0]:.2g} to {self.lrs[-1]:.2g}"
            found += f", suggestion {self.suggestion:.2g}"
        return f"<LRFinderResult of {found}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the suggested rate, and the curve."""
        if not self.lrs:
            return as_html(self)
        return as_html(self) + as_picture(self.plot())

    def to_frame(self) -> pd.DataFrame:
        """Return a DataFrame with the columns lr, loss, smoothed."""
        import pandas as pd  # noqa: PLC0415  slow to import, rarely used

        columns = {"lr": self.lrs, "loss": self.losses, "smoothed": self.smoothed}
        return pd.DataFrame(columns)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Plot loss and smoothed loss against learning rate; save it if `path` is given."""
        check_picture("plot(path)", path)
        from matplotlib.figure import Figure  # noqa: PLC0415  takes half a second

        figure = Figure(figsize=(5.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        axes.plot(self.lrs, self.losses, color="#94a3b8", lw=1, label="loss")
        axes.plot(self.lrs, self.smoothed, color="#2563eb", label="smoothed")
        at = self.suggestion
        axes.axvline(at, color="#ea580c", lw=1, ls="--", label=f"suggested: {at:.2g}")
        axes.set(xscale="log", xlabel="learning rate", ylabel="loss")
        low, high = min(self.smoothed), max(self.smoothed)
        if math.isfinite(high - low) and high > low:  # single losses may be far outside
            axes.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def has_diverged(means: Sequence[float], factor: float) -> bool:
    """Whether the last smoothed loss is far above the lowest one, or no number.

    Far above is more than `factor` times as high; for losses that are not positive, it is
    counted in units of what they have fallen by, or of the lowest one.
    """
    lowest = min(means)
    unit = lowest if lowest > 0 else max(-lowest, means[0] - lowest)
    return not means[-1] <= lowest + (factor - 1) * unit


class _Sweep(Callback):
    """Raises the rate after each step; ends the fit when the loss diverges.

    It needs no event of a step, because a model's own ``step`` may fire none.
    """

    def __init__(
        self, rates: Sequence[float], smoothing: float, stop_above: float | None
    ) -> None:
        advice = "Use 0 for none, 0.9 for the usual."
        check_at_least("lr_finder(smoothing)", smoothing, 0, advice)
        if smoothing >= 1:
            msg = f"lr_finder(smoothing): expected less than 1, got {smoothing!r}."
            raise ValueError(f"{msg} {advice}")
        if stop_above is not None:
            advice = "Leave it out for 4, or pass None to take all steps."
            check_more_than("lr_finder(stop_above)", stop_above, 1, advice)
        self.rates, self.smoothing, self.stop_above = rates, smoothing, stop_above
        self.losses: list[float] = []
        self.smoothed: list[float] = []
        self.mean, self.num_steps_before = 0.0, 0
        self.waiting: list[float] = []

    def on_train_batch_begin(self) -> None:
        rate = self.rates[len(self.losses)]
        for opt in self.ctx.optimizers.values():
            for group in opt.param_groups:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate

    def on_train_batch_end(self) -> None:
        losses = self.ctx.loss
        values = losses.values() if isinstance(losses, dict) else [losses]
        numbers = [torch.as_tensor(loss) for loss in values if loss is not None]
        if numbers:
            loss = sum(numbers[1:], numbers[0]).detach().reshape(())
            self.waiting.append(mean_over_ranks(loss, self.ctx.accelerator))
        num_steps = sum(self.ctx.steps.values())
        if num_steps != self.num_steps_before:
            self.num_steps_before = num_steps
            self._add_step()

    def on_epoch_end(self) -> None:
        if not self.losses:
            msg = "lr_finder: expected an optimizer step in epoch 1, got none."
            raise ValueError(f"{msg} Call ctx.optimize(loss) in the model's step.")

    def _add_step(self) -> None:
        """Record the mean loss of the batches since the last step, over all ranks."""
        if not self.waiting:
            msg = f"lr_finder: expected {type(self.ctx.model).__name__}.step to record"
            raise ValueError(f"{msg} a loss, got none. Call ctx.optimize(loss) in it.")
        self.losses.append(fmean(self.waiting))
        self.waiting.clear()
        share, limit = self.smoothing, self.stop_above
        self.mean = share * self.mean + (1 - share) * self.losses[-1]
        self.smoothed.append(self.mean / (1 - share ** len(self.losses)))
        is_far = limit is not None and has_diverged(self.smoothed, limit)
        if is_far or len(self.losses) >= len(self.rates):
            raise EarlyStop


@explain_calls
def lr_finder(
    learner: Learner | Fitted,
    data: Data,
    *,
    num_steps: int = 100,
    start_lr: float = 1e-7,
    end_lr: float = 1.0,
    log_spaced: bool = True,
    smoothing: float = 0.9,
    stop_above: float | None = 4.0,
    callbacks: Iterable[Callback] = (),
    accelerator: Accelerator | None = None,
    verbose: bool | None = False,
    dataloader_options: Mapping[str, object] | None = None,
    seed: int | None = None,
) -> LRFinderResult:
    """Train a new model briefly with a growing learning rate.

    The random generators, also those of the data, are restored afterwards.

    Parameters
    ----------
    learner
        Learner, or a result to start from. Several optimizers get the same rate, and their
        losses are summed.
    data
        As in ``Learner.fit``; repeated if it has fewer batches than steps.
    num_steps : >= 1
        Optimizer steps to take; fewer if the loss diverges.
    start_lr, end_lr : > 0
        First and last rate.
    log_spaced
        Multiply the rate by the same factor after each step; False adds the same amount.
    smoothing : in [0, 1)
        Share of the earlier mean that the smoothed loss keeps.
    stop_above : > 1
        End when the smoothed loss is NaN, or more than this many times the lowest one;
        None: take all steps.
    callbacks, accelerator, verbose, dataloader_options, seed
        As in ``Learner.fit``.

    Raises
    ------
    TypeError, ValueError
        If ``0 < start_lr < end_lr`` or ``num_steps >= 1`` does not hold, another option is
        wrong, or no optimizer steps in an epoch.
    KeyboardInterrupt
        After Ctrl-C.
    SystemExit
        After SIGTERM or SIGHUP.

    References
    ----------
    luz 0.5.0, ``lr_finder``; Smith 2017, "Cyclical Learning Rates", section 3.3. Differs from
    luz: it ends when the loss diverges, and the rates grow to 1 unless asked otherwise.
    """
    start = learner if isinstance(learner, Fitted) else None
    learner = start.learner if start is not None else learner
    if not hasattr(learner, "opt_hparams") or isinstance(learner, type):
        msg = f"lr_finder(learner): expected a learner, got {learner!r:.100}."
        raise TypeError(f"{msg} Pass what harness.setup returned.")
    rates = _list_rates(start_lr, end_lr, num_steps, log_spaced=log_spaced)
    sweep = _Sweep(rates, smoothing, stop_above)
    with _restore_afterwards(data, dataloader_options or {}):
        fitted = learner.fit(
            data,
            epochs=num_steps,
            callbacks=[*callbacks, sweep],
            accelerator=accelerator,
            verbose=verbose,
            dataloader_options=dataloader_options,
            seed=seed,
            start=start,
            tracker=False,
        )
    if fitted.signum in ENDING_SIGNALS:
        raise SystemExit(128 + fitted.signum)
    if fitted.is_interrupted:
        raise KeyboardInterrupt
    taken = list(rates[: len(sweep.losses)])
    return LRFinderResult(lrs=taken, losses=sweep.losses, smoothing=smoothing)


def _list_rates(
    start_lr: float, end_lr: float, num_steps: int, *, log_spaced: bool
) -> list[float]:
    """Rate of each step."""
    advice = "Pass for example 1e-7 and 1."
    for name, rate in (("start_lr", start_lr), ("end_lr", end_lr)):
        check_number(f"lr_finder({name})", rate, advice)
    if not 0 < start_lr < end_lr:
        msg = "lr_finder: expected 0 < start_lr < end_lr"
        raise ValueError(f"{msg}, got {start_lr!r}, {end_lr!r}. {advice}")
    check_count("lr_finder(num_steps)", num_steps, 1, "Leave it out for 100.")
    gaps = max(1, num_steps - 1)
    factor, amount = (end_lr / start_lr) ** (1 / gaps), (end_lr - start_lr) / gaps
    if log_spaced:
        return [start_lr * factor**n for n in range(num_steps)]
    return [start_lr + amount * n for n in range(num_steps)]


@contextmanager
def _restore_afterwards(data: object, options: Mapping[str, object]) -> Iterator[None]:
    """Restore the random generators, and end worker processes that a loader would keep."""
    generators = find_generators(data, SimpleNamespace(**options))
    state = get_rng_state(generators)
    workers = getattr(data, "_iterator", None)  # torch 2.13, persistent workers
    try:
        with warnings.catch_warnings():
            # The rate grows until the loss diverges, so a NaN is no fault.
            warnings.filterwarnings("ignore", "train/loss: expected a number, got nan")
            yield
    finally:
        if isinstance(data, DataLoader) and workers is None:
            # torch 2.13 waits five seconds for workers that the garbage collector ends.
            getattr(data._iterator, "_shutdown_workers", lambda: None)()
            data._iterator = None
        set_rng_state(state, generators)
