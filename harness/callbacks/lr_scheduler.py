"""Steps a torch learning-rate scheduler at an event."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch.optim.lr_scheduler import LRScheduler as TorchScheduler
from torch.optim.lr_scheduler import ReduceLROnPlateau

from harness.callbacks.monitor import Monitor
from harness.context import Context
from harness.events import check_event
from harness.pytree import StateDict

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
        At an event of a training batch it gets the loss of the batch. The mode is found as
        in ``Monitor``.
    **options
        Arguments of the scheduler.

    Raises
    ------
    ValueError
        Before the first epoch, if there is no such optimizer, or a ``ReduceLROnPlateau``
        would step before its metric is logged.

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
        options = self._options
        if self._is_plateau:
            options = {"mode": self.mode, **options}
        self.scheduler = self._build(getattr(opt, "optimizer", opt), **options)

    def _step(self) -> None:
        """Step once; at an event of each optimizer only if this one is the current one."""
        is_of_one = self.call_on in STEP_EVENTS
        if is_of_one and self.ctx.opt_name != self.opt_name:
            return
        step: Callable[..., object] = self.scheduler.step
        if not _wants_value(step):
            step()
        elif self.call_on.startswith("on_train_batch"):
            step(float(self.ctx.loss[self.opt_name]))
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
        """Return the scheduler's state."""
        return {"scheduler": self.scheduler.state_dict()}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the scheduler's state."""
        self.scheduler.load_state_dict(state["scheduler"])


def _wants_value(step: Callable[..., object]) -> bool:
    """Whether a scheduler's ``step`` has an argument without a default."""
    return any(
        parameter.default is parameter.empty
        and parameter.kind
        in {parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD}
        for parameter in inspect.signature(step).parameters.values()
    )
