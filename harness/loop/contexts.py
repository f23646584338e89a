"""Contexts of the loops: what a fit, an evaluation and a prediction begin with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from harness.accelerators.base import Accelerator, StepOpt, needs_closure
from harness.accelerators.optimizer_step import default_step_opt
from harness.checkpoint.held.search import name_parameters
from harness.checkpoint.state import search_context
from harness.checks.calls import count_needed
from harness.checks.model import get_method
from harness.checks.optimizers import check_optimizers, check_trained
from harness.checks.values import parse_epochs
from harness.context import Context
from harness.data.loaders import Loader
from harness.data.pace import Pace, limit_loader
from harness.steps import StepContext, default_step, own_step


class FitContext(StepContext):
    """Context of ``fit``: model, named optimizers and loaders, all prepared.

    Parameters
    ----------
    model
        The accelerator places it on the device.
    optimizers
        One optimizer, several by name, or a function that returns them; None: from the
        accelerator's config.
    loss_fn
        ``loss_fn(pred, target)``; None if the model has its own ``step``.
    hparams, opt_hparams
        Arguments that built the model and the optimizers.
    data, valid_data
        Loaders; `valid_data` is one, several by name, or None.
    epochs
        Whole number, or pair ``(min_epochs, max_epochs)``.
    pace
        When the fit validates and ends.
    limits
        Batches of each pass by name of the set; see ``check_limits``.
    accelerator, **options
        As in ``StepContext``.

    References
    ----------
    luz 0.5.0, ``fit_context``. Differs from luz: the learner builds model, optimizers and
    loaders.
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizers: object,
        loss_fn: Callable[..., Tensor] | None,
        hparams: Mapping[str, object],
        opt_hparams: Mapping[str, object],
        data: Loader,
        valid_data: Loader | Mapping[str, Loader] | None,
        epochs: int | tuple[int, int],
        pace: Pace | None = None,
        limits: Mapping[str, float] | None = None,
        accelerator: Accelerator,
        step_opt: StepOpt = default_step_opt,
        **options: Any,
    ) -> None:
        StepContext.__init__(self, accelerator=accelerator, training=True, **options)
        self._min_epochs, self._max_epochs = parse_epochs(epochs)
        self.pace = pace or Pace()
        self.hparams, self.opt_hparams = dict(hparams), dict(opt_hparams)
        self.model, self.loss_fn = model, loss_fn  # set_optimizers may use self.ctx
        with accelerator.guard or nullcontext():
            if callable(optimizers):
                optimizers = optimizers()
        prepare: Callable[..., Any] = accelerator.prepare
        if optimizers is None:
            prepare = partial(prepare, opt_hparams=self.opt_hparams)
        if optimizers is not None:
            self.optimizers = check_optimizers(optimizers)
        with accelerator.guard or nullcontext():
            prepare_callbacks(self)
        named = self.optimizers
        if optimizers is not None:
            check_trained(
                named,
                model,
                lambda: name_parameters(model, search_context(self)).values(),
                self.callbacks,
            )
        sets = as_sets(valid_data)
        model, named, loaders = prepare(model, named, [data, *sets.values()])
        self.listeners.guard = accelerator.guard
        accelerator.before_step = partial(self._fire_step, "before")
        accelerator.after_step = partial(self._fire_step, "after")
        self.model, self.optimizers = model, named
        self.with_closure = frozenset(n for n in named if needs_closure(named[n]))
        self.steps = accelerator.steps
        self.step_opt = step_opt
        limits = limits or {}
        self.train_data, *of_sets = (
            limit_loader(loader, limits.get(name), name)
            for name, loader in zip(["train", *sets], loaders, strict=True)
        )
        self.data = self.train_data
        set_valid_sets(self, dict(zip(sets, of_sets, strict=True)))
        # Another one would not be stepped.
        self._optimizers = MappingProxyType(named)  # type: ignore[assignment]

    def _fire_step(self, when: str, name: str) -> None:
        """Fire a step event, whoever makes the accelerator step."""
        self._switch_to(name)
        self.call_callbacks(f"on_train_batch_{when}_step")


class PredictContext(StepContext):
    """Context of ``predict``: a model in evaluation mode and the data to predict.

    Parameters
    ----------
    model
        The accelerator places it on the device.
    newdata
        Loader of the data, or several by name.
    accelerator, **options
        As in ``StepContext``.

    References
    ----------
    luz 0.5.0, ``predict_context``.
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        model: nn.Module,
        newdata: Loader | Mapping[str, Loader],
        accelerator: Accelerator,
        **options: Any,
    ) -> None:
        StepContext.__init__(self, accelerator=accelerator, training=False, **options)
        sets = as_sets(newdata)
        model, _, loaders = accelerator.prepare(model, None, [None, *sets.values()])
        self.model = model
        set_valid_sets(self, dict(zip(sets, loaders[1:], strict=True)))
        self.data = self.valid_data


class EvaluateContext(PredictContext):
    """Context of ``evaluate``: a ``PredictContext`` with epoch 1, loss and optimizer names.

    Parameters
    ----------
    optimizers
        The model's optimizers, for their names, or a function that returns them.
    loss_fn
        ``loss_fn(pred, target)``.
    opt_hparams
        Arguments that built the optimizers.

    References
    ----------
    luz 0.5.0, ``evaluate_context``.
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        optimizers: Any,
        loss_fn: Callable[..., Tensor] | None,
        opt_hparams: Mapping[str, Any],
        **kwargs: Any,
    ) -> None:
        PredictContext.__init__(self, **kwargs)
        self.epoch, self.loss_fn = 1, loss_fn
        self.opt_hparams = dict(opt_hparams)
        self.optimizers = check_optimizers(
            optimizers() if callable(optimizers) else optimizers
        )


def as_sets(loaders: Loader | Mapping[str, Loader] | None) -> dict[str, Loader]:
    """Return loaders by name; a single one is ``valid``."""
    if isinstance(loaders, Mapping):
        return dict(loaders)
    return {} if loaders is None else {"valid": loaders}


def set_valid_sets(ctx: Context, sets: Mapping[str, Loader]) -> None:
    """Set the loaders of validation data, which the accelerator has prepared."""
    ctx.valid_sets = dict(sets)
    ctx.valid_name, ctx.valid_data = next(iter(sets.items()), ("valid", None))


def get_step(ctx: StepContext) -> Callable[[], object]:
    """Return the model's own ``step``, or else the default one."""
    own = get_method(ctx.model, "step")
    if own:
        return partial(own_step, ctx, own)
    return partial(default_step, ctx, num_needed=count_needed(ctx.loss_fn))


def prepare_callbacks(ctx: Context) -> None:
    """Let each callback change the model and the optimizers before they are prepared."""
    for callback in ctx.callbacks:
        try:
            callback.prepare(ctx)
        except Exception as exc:
            exc.add_note(
                f"in {type(callback).__name__}.prepare, before the first epoch"
            )
            raise
