"""Steps a torch learning-rate scheduler at an event."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from harness.callbacks.monitor import Monitor
from harness.context import NO_LIMIT, Context
from harness.data.loaders import num_batches
from harness.errors import CheckpointError
from harness.events import check_event
from harness.metrics.loss import mean_over_ranks
from harness.pytree import StateDict
from harness.setup_checks import (
    check_arguments,
    check_given,
    get_method,
    noting_options,
)

STEP_EVENTS = frozenset(
    f"on_{split}_batch_{point}"
    for split in ("train", "valid")
    for point in (
        "after_pred",
        "after_loss",
        "before_backward",
        "before_step",
        "after_step",
    )
)
"""Events that fire once for each optimizer."""


class LRScheduler(Monitor):
    """Builds a scheduler on an optimizer and steps it at an event.

    Parameters
    ----------
    scheduler
        Scheduler class or function, called with ``(optimizer, **options)``.
    call_on
        Event at which it steps: ``on_epoch_end``, or ``on_train_batch_after_step`` for
        schedulers that count optimizer steps (a skipped optimizer step does not count).
    opt_name
        Name of the optimizer; None: the only one.
    monitor
        Metric for ``ReduceLROnPlateau`` and any other scheduler whose ``step`` takes a value.
        At an event of a training batch it gets the loss of the batch, over all ranks. The
        mode is found as in ``Monitor``.
    **options
        Arguments of the scheduler. ``"auto"`` stands for the number of times that the
        scheduler steps in the whole fit, as for ``total_steps`` or ``T_max``.

    Raises
    ------
    ValueError
        Before the first epoch, if there is no such optimizer, a ``ReduceLROnPlateau``
        would step before its metric is logged, or the number of steps for ``"auto"`` is
        not known.

    Notes
    -----
    The learning rate of each epoch is logged as ``lr`` records.

    References
    ----------
    luz 0.5.0, ``luz_callback_lr_scheduler``.
    """

    weight = 20
    scheduler: TorchScheduler  #: built when the fit begins

    def __init__(
        self,
        scheduler: Callable[..., TorchScheduler],
        *,
        call_on: str = "on_epoch_end",
        opt_name: str | None = None,
        monitor: str = "valid/loss",
        **options: object,
    ) -> None:
        super().__init__(monitor)
        if not callable(scheduler):
            msg = f"LRScheduler(scheduler): expected a class, got {scheduler!r}."
            advice = "Pass for example torch.optim.lr_scheduler.CosineAnnealingLR."
            raise TypeError(f"{msg} {advice}")
        check_event("LRScheduler(call_on)", call_on)
        check_arguments("LRScheduler(**options)", scheduler, options)
        advice = "Pass them as LRScheduler(..., {})."
        check_given("LRScheduler(**options)", scheduler, options, advice, 1)
        self._build, self._options = scheduler, options
        self.call_on, self.opt_name = call_on, opt_name
        if call_on != "on_epoch_end":
            setattr(self, call_on, self._step)

    @property
    def _is_plateau(self) -> bool:
        kind = self._build
        return isinstance(kind, type) and issubclass(kind, ReduceLROnPlateau)

    def check(self, ctx: Context) -> None:
        """Refuse an unknown optimizer, and a plateau whose metric is not logged in time."""
        names = list(ctx.optimizers)
        is_known = self.opt_name in names or (self.opt_name is None and len(names) == 1)
        if not is_known:
            got = repr(self.opt_name)
            msg = (
                f"LRScheduler(opt_name): expected the name of an optimizer, got {got}."
            )
            raise ValueError(f"{msg} Choose from {names}.")
        self._fill_options(ctx)
        if not self._is_plateau:
            return
        self._given_mode = self._options.get("mode", "auto")  # type: ignore[assignment]
        super().check(ctx)
        if self.call_on.startswith("on_train_batch"):
            msg = f"LRScheduler(call_on): expected an event after training, got {self.call_on!r}."
            raise ValueError(f"{msg} Use 'on_epoch_end' with ReduceLROnPlateau.")

    def on_fit_begin(self) -> None:
        """Build the scheduler."""
        self.opt_name = self.opt_name or next(iter(self.ctx.optimizers))
        opt = self.ctx.optimizers[self.opt_name]
        options = self._fill_options(self.ctx)
        if self._is_plateau and options.get("mode", "auto") == "auto":
            options = options | {"mode": self.mode}
        with noting_options(self._build, options):
            self.scheduler = self._build(getattr(opt, "optimizer", opt), **options)
        if not callable(getattr(self.scheduler, "step", None)):
            msg = "LRScheduler(scheduler): expected it to return a scheduler"
            got = f"{self.scheduler!r:.100}"
            raise TypeError(f"{msg}, got {got}. Return what has a step method.")
        self._check_length()

    def _check_length(self) -> None:
        """Refuse a schedule that ends before the fit: torch would end the fit there."""
        ctx, total = self.ctx, getattr(self.scheduler, "total_steps", None)
        per_epoch = self._count_steps(ctx)
        has_own_pace = (
            get_method(ctx.model, "step") is not None and self.call_on in STEP_EVENTS
        )
        if not isinstance(total, int) or per_epoch is None or has_own_pace:
            return
        needed = per_epoch * ctx.max_epochs
        if total < needed:
            msg = (
                f"LRScheduler({type(self.scheduler).__name__}): expected a schedule of"
            )
            got = f"at least {needed} steps for this fit, got {total}"
            advice = "Pass total_steps='auto' or a larger number."
            raise ValueError(f"{msg} {got}. {advice}")

    def _fill_options(self, ctx: Context) -> dict[str, object]:
        """Options with the number of steps in place of ``"auto"``."""
        names = [name for name, value in self._options.items() if value == "auto"]
        if self._is_plateau:
            names = [name for name in names if name != "mode"]
        if not names:
            return self._options
        per_epoch = self._count_steps(ctx)
        if per_epoch is None or ctx.max_epochs == NO_LIMIT:
            msg = f"LRScheduler({names[0]}='auto'): expected a known number of steps"
            got = f"got call_on={self.call_on!r} and data of unknown length"
            raise ValueError(f"{msg}, {got}. Pass the number.")
        return self._options | dict.fromkeys(names, per_epoch * ctx.max_epochs)

    def _count_steps(self, ctx: Context) -> int | None:
        """How often the scheduler steps in an epoch; None if that is not known."""
        if "_batch_" not in self.call_on:
            return 1
        is_train = self.call_on.startswith("on_train_batch")
        batches = num_batches(ctx.train_data if is_train else ctx.valid_data)
        is_step = self.call_on.endswith("_step")
        if batches is None or not is_step:
            return batches
        assert ctx.accelerator is not None
        return math.ceil(batches / ctx.accelerator.accumulate)

    def _step(self) -> None:
        """Step once; at an event of each optimizer only if this one is the current one."""
        is_of_one = self.call_on in STEP_EVENTS
        if is_of_one and self.ctx.opt_name != self.opt_name:
            return
        step: Callable[..., object] = self.scheduler.step
        if not _wants_value(step):
            step()
        elif self.call_on.startswith("on_train_batch"):
            assert self.ctx.accelerator is not None
            step(mean_over_ranks(self.ctx.loss[self.opt_name], self.ctx.accelerator))
        else:
            step(self.get_value())

    def on_epoch_end(self) -> None:
        """Log the rate of this epoch; step if `call_on` is this event."""
        groups = self.scheduler.optimizer.param_groups
        rates = {str(n): float(group["lr"]) for n, group in enumerate(groups)}
        rate = rates["0"] if len(rates) == 1 else rates
        self.ctx.log("lr", "train", {self.opt_name: rate}, index=self.ctx.epoch)
        if self.call_on == "on_epoch_end":
            self._step()

    def state_dict(self) -> StateDict:
        """Return the scheduler's state and class, and the rates that it started from."""
        return {
            "scheduler": self.scheduler.state_dict(),
            "class": type(self.scheduler).__name__,
            "initial_rates": self._get_initial_rates(),
        }

    def _get_initial_rates(self) -> list[float]:
        groups = self.scheduler.optimizer.param_groups
        return [float(group.get("initial_lr", group["lr"])) for group in groups]

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the scheduler's state; it starts from another rate if the user changed it.

        Raises
        ------
        CheckpointError
            If it is the state of a scheduler of another class.
        """
        kind = type(self.scheduler).__name__
        if state.get("class", kind) != kind:
            msg = f"LRScheduler: expected the state of {kind}, got that of {state['class']}."
            raise CheckpointError(f"{msg} Resume with the scheduler that was saved.")
        self.scheduler.load_state_dict(state["scheduler"])
        then, now = state.get("initial_rates"), self._get_initial_rates()
        rates = getattr(self.scheduler, "base_lrs", [])
        if then is not None and then != now and len(then) == len(now) == len(rates):
            self.scheduler.base_lrs = [
                rate * new / old if old else new
                for rate, old, new in zip(rates, then, now, strict=True)
            ]


def _wants_value(step: Callable[..., object]) -> bool:
    """Whether a scheduler's ``step`` has an argument without a default."""
    return any(
        parameter.default is parameter.empty
        and parameter.kind
        in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
        for parameter in inspect.signature(step).parameters.values()
    )
