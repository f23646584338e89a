"""Learning-rate range test: train briefly with a growing rate and record the loss."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
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
from harness.data.loaders import Data
from harness.errors import EarlyStop
from harness.metrics.loss import mean_over_ranks
from harness.rng import find_generators, get_rng_state, set_rng_state
from harness.setup_checks import check_count, check_number, check_picture

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
        check_picture("plot(path)", path)
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
    """Raises the rate after each step; ends the fit when the loss diverges.

    It needs no event of a step, because a model's own ``step`` may fire none.
    """

    def __init__(self, start_lr: float, end_lr: float, num_steps: int) -> None:
        self.lrs: list[float] = []
        self.losses: list[float] = []
        self.start_lr, self.num_steps = start_lr, num_steps
        self.factor = (end_lr / start_lr) ** (1 / max(1, num_steps - 1))
        self.mean, self.num_steps_before = 0.0, 0
        self.waiting: list[float] = []

    def on_train_batch_begin(self) -> None:
        rate = self.start_lr * self.factor ** len(self.lrs)
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
            assert self.ctx.accelerator is not None
            self.waiting.append(mean_over_ranks(loss, self.ctx.accelerator))
        num_steps = sum(self.ctx.steps.values())
        if num_steps != self.num_steps_before:
            self.num_steps_before = num_steps
            self._add_step()

    def on_epoch_end(self) -> None:
        if not self.lrs:
            msg = "lr_finder: expected an optimizer step in epoch 1, got none."
            raise ValueError(f"{msg} Call ctx.optimize(loss) in the model's step.")

    def _add_step(self) -> None:
        """Record the mean loss of the batches since the last step, over all ranks."""
        if not self.waiting:
            msg = f"lr_finder: expected {type(self.ctx.model).__name__}.step to record"
            raise ValueError(f"{msg} a loss, got none. Call ctx.optimize(loss) in it.")
        loss = fmean(self.waiting)
        self.waiting.clear()
        self.lrs.append(self.start_lr * self.factor ** len(self.lrs))
        self.mean = 0.9 * self.mean + 0.1 * loss
        self.losses.append(self.mean / (1 - 0.9 ** len(self.lrs)))
        has_diverged = not self.losses[-1] <= 4 * min(self.losses)
        if has_diverged or len(self.lrs) >= self.num_steps:
            raise EarlyStop


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

    Afterwards the random generators are as they were before, also those of the data.

    Parameters
    ----------
    learner
        Learner. Several optimizers get the same rate, and their losses are summed.
    data
        As in ``Learner.fit``; repeated if it has fewer batches than steps.
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
    TypeError, ValueError
        If ``0 < start_lr < end_lr`` or ``num_steps >= 1`` does not hold, or no optimizer
        steps in an epoch.
    KeyboardInterrupt
        After Ctrl-C.

    References
    ----------
    luz 0.5.0, ``lr_finder``; Smith 2017, "Cyclical Learning Rates", section 3.3.
    """
    if not hasattr(learner, "opt_hparams") or isinstance(learner, type):
        msg = f"lr_finder(learner): expected a learner, got {learner!r:.100}."
        raise TypeError(f"{msg} Pass what harness.setup returned.")
    _check_range(start_lr, end_lr, num_steps)
    sweep = _Sweep(start_lr, end_lr, num_steps)
    with _leave_as_it_was(data, dataloader_options or {}):
        fitted = learner.fit(
            data,
            epochs=num_steps,
            callbacks=[sweep],
            verbose=False,
            dataloader_options=dataloader_options,
            seed=seed,
            tracker=False,
        )
    if fitted.is_interrupted:
        raise KeyboardInterrupt
    return LRFinderResult(lrs=sweep.lrs, losses=sweep.losses)


def _check_range(start_lr: object, end_lr: object, num_steps: object) -> None:
    advice = "Pass for example 1e-7 and 1."
    for name, rate in (("start_lr", start_lr), ("end_lr", end_lr)):
        check_number(f"lr_finder({name})", rate, advice)
    if not 0 < start_lr < end_lr:  # type: ignore[operator]
        msg = (
            f"lr_finder: expected 0 < start_lr < end_lr, got {start_lr!r}, {end_lr!r}."
        )
        raise ValueError(f"{msg} {advice}")
    check_count("lr_finder(num_steps)", num_steps, 1, "Leave it out for 100.")


@contextmanager
def _leave_as_it_was(data: object, options: Mapping[str, object]) -> Iterator[None]:
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
            data._iterator = None
        set_rng_state(state, generators)
