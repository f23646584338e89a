"""Steps a torch learning-rate scheduler at an event."""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from harness.callbacks.monitor import Monitor
from harness.checks.calls import check_arguments, check_given, check_numbers
from harness.checks.model import get_method
from harness.checks.optimizers import note_options_on_error
from harness.context import Context
from harness.data.loaders import num_batches
from harness.data.pace import NO_LIMIT, count_epochs
from harness.errors import CheckpointError
from harness.events import check_event
from harness.metrics.loss import mean_over_ranks
from harness.pytree import StateDict, find_unkept_kind, has_state

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
        schedulers that count optimizer steps (a skipped optimizer step does not count). In
        place of ``on_epoch_end``, a ``ReduceLROnPlateau`` steps after each validation of a
        fit that validates by steps.
    opt_name
        Name of the optimizer; None: the only one.
    monitor
        Metric for ``ReduceLROnPlateau`` and any other scheduler whose ``step`` takes a
        value. At an event of a training batch it gets the loss of the batch, over all
        ranks. The mode is found as in ``Monitor``. If the parameter of ``step`` is named
        ``epoch``, or like another count, it gets the number of epochs, or of optimizer
        steps at an event of a batch.
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
        check_arguments("LRScheduler(**options)", scheduler, options, 1)
        given = {name: value for name, value in options.items() if value != "auto"}
        check_numbers("LRScheduler", scheduler, given)
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
            msg = "LRScheduler(opt_name): expected the name of an optimizer"
            raise ValueError(f"{msg}, got {got}. Choose from {names}.")
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
        opt = self._opt = getattr(opt, "optimizer", opt)
        stand_in = self._make_stand_in(opt, options)
        with note_options_on_error(self._build, options):
            self.scheduler = self._build(opt, **options)
        if not callable(getattr(self.scheduler, "step", None)):
            msg = "LRScheduler(scheduler): expected it to return a scheduler"
            got = f"{self.scheduler!r:.100}"
            raise TypeError(f"{msg}, got {got}. Return what has a step method.")
        needed = self._count_needed()
        self._check_length(needed)
        if stand_in is not None:
            self._try_steps(stand_in, options, min(needed or 1, MAX_TRIED))

    def _make_stand_in(
        self, opt: object, options: dict[str, object]
    ) -> Optimizer | None:
        """Make an optimizer to try steps on; None if the scheduler is not to be tried.

        Functions are not called, because they may count, or draw random numbers.
        """
        is_known = getattr(self._build, "__module__", "") == "torch.optim.lr_scheduler"
        has_functions = any(map(callable, _list_leaves(options)))
        if not is_known or has_functions or self._is_plateau:
            return None
        return _StandIn(opt) if isinstance(opt, Optimizer) else None

    def _try_steps(
        self, stand_in: Optimizer, options: dict[str, object], num_steps: int
    ) -> None:
        """Refuse options with which the scheduler fails in one of its first steps."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                scheduler = self._build(stand_in, **options)
                for _ in range(num_steps):
                    scheduler.step()
        except Exception as error:
            called = type(self.scheduler).__name__
            given = ", ".join(
                f"{name}={value!r:.50}" for name, value in options.items()
            )
            msg = f"LRScheduler({called}): expected options that it can step with, got"
            raise ValueError(
                f"{msg} {given}: {type(error).__name__}: {error}. Change them."
            ) from error

    def _count_needed(self) -> int | None:
        """How often the scheduler steps in the fit; None if that is not known."""
        is_own = get_method(self.ctx.model, "step") is not None
        has_own_pace = is_own and self.call_on in STEP_EVENTS
        return None if has_own_pace else self._count_calls(self.ctx)

    def _check_length(self, needed: int | None) -> None:
        """Refuse a schedule that ends before the fit: torch would end the fit there."""
        total = getattr(self.scheduler, "total_steps", None)
        if needed is not None and isinstance(total, int) and total < needed:
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
        calls = self._count_calls(ctx)
        if calls is None:
            msg = f"LRScheduler({names[0]}='auto'): expected a known number of steps"
            got = f"got call_on={self.call_on!r} and data of unknown length"
            raise ValueError(f"{msg}, {got}. Pass the number.")
        return self._options | dict.fromkeys(names, calls)

    def _count_calls(self, ctx: Context) -> int | None:
        """How often the scheduler steps in the whole fit; None if that is not known."""
        pace, is_train = ctx.pace, self.call_on.startswith("on_train")
        if is_train and "_batch_" in self.call_on:
            return self._count_train_calls(ctx)
        epochs = count_epochs(ctx)
        if not self.call_on.startswith(("on_train", "on_valid")):
            return epochs
        if pace.unit == "step" or (pace.every > 1 and not is_train) or epochs is None:
            return None
        if "_batch_" not in self.call_on:
            return epochs
        batches = [num_batches(loader) for loader in ctx.valid_sets.values()]
        return None if None in batches else epochs * sum(filter(None, batches))

    def _count_train_calls(self, ctx: Context) -> int | None:
        most, is_step = ctx.pace.max_steps, self.call_on.endswith("_step")
        if is_step and ctx.max_epochs == NO_LIMIT:
            return most
        batches, window = num_batches(ctx.train_data), ctx.accelerator.accumulate
        if batches is None:
            return None
        in_epoch = math.ceil(batches / window)
        steps = in_epoch * ctx.max_epochs
        steps = steps if most is None else min(steps, most)
        epochs, rest = divmod(steps, in_epoch)
        return steps if is_step else epochs * batches + min(rest * window, batches)

    def _step(self) -> None:
        """Step once; at an event of each optimizer only if this one is the current one."""
        if self.call_on in {"on_valid_begin", "on_valid_end"} and not self._is_last_set:
            return
        is_of_one = self.call_on in STEP_EVENTS
        if is_of_one and self.ctx.opt_name != self.opt_name:
            return
        step: Callable[..., object] = self.scheduler.step
        wanted = _list_wanted(step)
        if not wanted:
            step()
        elif any(word in wanted[0] for word in COUNTS):
            step(self.ctx.step if "_batch_" in self.call_on else self.ctx.epoch)
        elif self.call_on.startswith("on_train_batch"):
            step(mean_over_ranks(self.ctx.loss[self.opt_name], self.ctx.accelerator))
        elif self.is_measured():
            step(self.get_value())

    def on_epoch_end(self) -> None:
        """Log the rate of this epoch; step if `call_on` is this event."""
        super().on_epoch_end()
        by_steps = self.ctx.pace.unit == "step"
        if by_steps:
            self._log_rate()
        if by_steps and self.call_on == "on_epoch_end" and not self._is_plateau:
            self._step()

    def react(self) -> None:
        """Log the rate; step if `call_on` is the end of an epoch."""
        self._log_rate()
        by_steps = self.ctx.pace.unit == "step"
        if self.call_on == "on_epoch_end" and (self._is_plateau or not by_steps):
            self._step()

    def _log_rate(self) -> None:
        groups = self._opt.param_groups
        rates = {str(n): float(group["lr"]) for n, group in enumerate(groups)}
        rate = rates["0"] if len(rates) == 1 else rates
        self.ctx.log("lr", "train", {self.opt_name: rate}, index=self.ctx.index)

    def state_dict(self) -> StateDict:
        """Return the scheduler's state and class, and the rates that it started from."""
        return {
            "scheduler": _get_state(self.scheduler),
            "class": type(self.scheduler).__name__,
            "initial_rates": self._get_initial_rates(),
        }

    def _get_initial_rates(self) -> list[float]:
        groups = self._opt.param_groups
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
        if has_state(self.scheduler):
            self.scheduler.load_state_dict(state["scheduler"])
        else:
            vars(self.scheduler).update(state["scheduler"])
        then, now = state.get("initial_rates"), self._get_initial_rates()
        rates = getattr(self.scheduler, "base_lrs", [])
        if then is not None and then != now and len(then) == len(now) == len(rates):
            self.scheduler.base_lrs = [
                rate * new / old if old else new
                for rate, old, new in zip(rates, then, now, strict=True)
            ]


COUNTS = ("epoch", "step", "iter", "update")
"""Words in the name of an argument that is a count, not a measured value."""

MAX_TRIED = 20
"""Steps of a schedule that are tried before the fit, at most; they take a millisecond."""


OWN = ("params", "param_names")
"""Items of a group that are no options."""


class _StandIn(Optimizer):
    """An optimizer with the options of another one, and one number to train in each group."""

    def __init__(self, opt: Optimizer) -> None:
        groups = [
            {
                name: copy.deepcopy(value)
                for name, value in group.items()
                if name not in OWN
            }
            | {"params": [torch.zeros(1)]}
            for group in opt.param_groups
        ]
        super().__init__(groups, dict(opt.defaults))

    def step(self, closure: object = None) -> None:  # type: ignore[override]
        """Do nothing."""


def _list_leaves(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _list_leaves(item)
    else:
        yield value


def _list_wanted(step: Callable[..., object]) -> list[str]:
    """Arguments without a default of a scheduler's ``step``."""
    return [
        parameter.name
        for parameter in inspect.signature(step).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind
        in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
    ]


def _get_state(scheduler: object) -> StateDict:
    """State of a scheduler; of one without ``state_dict`` its numbers, texts and lists."""
    if has_state(scheduler):
        state: StateDict = scheduler.state_dict()  # type: ignore[attr-defined]
        return state
    fields = vars(scheduler).items()
    return {name: value for name, value in fields if find_unkept_kind(value) is None}
