"""The loops fit, evaluate and predict, and their contexts.

Everything else reacts to the events that the loops fire.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from harness.accelerators.base import (
    Accelerator,
    StepOpt,
    default_step_opt,
    needs_closure,
)
from harness.callback import Callback
from harness.checkpoint.search import name_parameters
from harness.checkpoint.state import get_generators, mark_validation, search_context
from harness.checks.calls import count_needed
from harness.checks.model import get_method
from harness.checks.optimizers import check_optimizers, check_trained
from harness.checks.values import parse_epochs
from harness.context import Context, Handlers
from harness.data.batch import copy_by_value
from harness.data.loaders import Loader
from harness.data.pace import NO_LIMIT, Pace, limit_loader, validates_now
from harness.data.train_pass import TrainPass
from harness.data.workers import iter_batches
from harness.errors import EarlyStop, Interrupted, SkipEpoch
from harness.events import FIT_EVENTS
from harness.metrics.split import count_batch_values
from harness.pytree import map_tensors
from harness.records import NullRun
from harness.rng import get_rng_state, set_rng_state
from harness.steps import (
    ReadBatch,
    StepContext,
    add_model_note,
    call_model,
    default_step,
    get_reader,
    own_step,
    switch_optimizers,
)

if TYPE_CHECKING:
    import tracking


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
    verbose, accelerator, callbacks, run
        As in ``Context``.
    read_batch
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
        verbose: bool | None = None,
        callbacks: Iterable[Callback] = (),
        run: tracking.Run | NullRun | None = None,
        step_opt: StepOpt = default_step_opt,
        read_batch: ReadBatch | None = None,
    ) -> None:
        StepContext.__init__(
            self,
            read_batch=read_batch,
            verbose=verbose,
            accelerator=accelerator,
            callbacks=callbacks,
            training=True,
            run=run,
        )
        self._min_epochs, self._max_epochs = parse_epochs(epochs)
        self.pace = pace or Pace()
        self.hparams, self.opt_hparams = dict(hparams), dict(opt_hparams)
        self.model, self.loss_fn = model, loss_fn  # set_optimizers may use self.ctx
        if callable(optimizers):
            optimizers = optimizers()
        prepare: Callable[..., Any] = accelerator.prepare
        if optimizers is None:
            prepare = partial(prepare, opt_hparams=self.opt_hparams)
        if optimizers is not None:
            self.optimizers = check_optimizers(optimizers)
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

    def _fire_step(self, when: str, name: str) -> None:
        """Fire a step event, whoever makes the accelerator step."""
        self.opt_name, self.opt = name, self.optimizers[name]
        self.call_callbacks(f"on_train_batch_{when}_step")


class PredictContext(StepContext):
    """Context of ``predict``: a model in evaluation mode and the data to predict.

    Parameters
    ----------
    model
        The accelerator places it on the device.
    newdata
        Loader of the data, or several by name.
    verbose, accelerator, callbacks, run
        As in ``Context``.
    read_batch
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
        verbose: bool | None = None,
        callbacks: Iterable[Callback] = (),
        run: tracking.Run | NullRun | None = None,
        read_batch: ReadBatch | None = None,
    ) -> None:
        StepContext.__init__(
            self,
            read_batch=read_batch,
            verbose=verbose,
            accelerator=accelerator,
            callbacks=callbacks,
            training=False,
            run=run,
        )
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


def fit(ctx: StepContext) -> None:
    """Train and validate, until the last epoch or step, or a handled exception.

    References
    ----------
    luz 0.5.0, ``fit.luz_module_generator``.
    """
    add_handlers(ctx)
    run_callback_checks(ctx)
    with (
        torch.enable_grad(),
        report_exceptions(ctx),
    ):  # also inside of another fit's event
        with suppress_handled(ctx, lambda: ctx.handlers), noting_interrupt(ctx):
            ctx.call_callbacks("on_fit_begin")
            for ctx.epoch in iter_epochs(ctx):
                with suppress_handled(ctx, lambda: ctx.epoch_handlers):
                    begin_epoch(ctx)
                    train_epoch(ctx)
                    if validates_now(ctx):
                        validate_last(ctx)
                    ctx.call_callbacks("on_epoch_end")
                    continue
                drop_gradients(ctx)
        drop_gradients(ctx)
        ctx.call_callbacks("on_fit_end")


def iter_epochs(ctx: Context) -> Iterator[int]:
    """Yield the epochs of a fit; after a resume, from the one that it continues with."""
    assert ctx.accelerator is not None
    epoch, num_idle = start_epoch(ctx), 0
    while epoch <= ctx.max_epochs and not ctx.pace.is_over(ctx.step):
        before = ctx.accelerator.num_backwards, ctx.step
        yield epoch
        is_idle = before == (ctx.accelerator.num_backwards, ctx.step)
        num_idle = num_idle + 1 if is_idle else 0
        if num_idle == MAX_IDLE and ctx.max_epochs == NO_LIMIT:
            msg = f"fit(max_steps): expected optimizer steps, got none in {MAX_IDLE}"
            advice = "The data may be used up: pass what gives batches again each time."
            raise ValueError(f"{msg} epochs. {advice}")
        epoch += 1


MAX_IDLE = 3
"""Epochs without a step after which a fit ends that waits for steps alone."""


def begin_epoch(ctx: StepContext) -> None:
    """Fire ``on_epoch_begin`` with nothing of the epoch before, as after a resume."""
    ctx.iter = ctx.batch = ctx.pred = ctx.loss = ctx.loss_grad = None
    ctx.training = True
    if ctx.resume is not None:
        ctx.resume.restore_before_epoch(ctx)
    ctx.epoch_start = get_rng_state(get_generators(ctx), ctx.device)
    ctx.call_callbacks("on_epoch_begin")


def train_epoch(ctx: StepContext) -> None:
    """Train on all batches of an epoch, with the validations that are due within it."""
    assert ctx.accelerator is not None
    read, fire, step = get_reader(ctx), ctx.call_callbacks, get_step(ctx)
    ctx.training, ctx.data, ctx.trained = True, ctx.train_data, 0
    pace = ctx.pace
    by_steps, is_limited = pace.unit == "step", pace.max_steps is not None
    train_pass = TrainPass(ctx.train_data, ctx.accelerator, ctx.epoch or 1)
    ctx.train_pass = train_pass
    fire("on_train_begin")
    is_whole, before = ctx.resume is None, dict(ctx.steps)
    phase = None if ctx.resume is None else ctx.resume.position.phase
    batches = start_batches(ctx)
    is_closed = phase == "valid" and not train_pass.is_paused
    if train_pass.is_due and not (phase == "train" and train_pass.is_paused):
        # It was due, or was interrupted, when the checkpoint was taken.
        validate_within(ctx)
    ctx.iter = ctx.trained or None
    with counting_values(ctx):
        for ctx.iter, batch in enumerate(fetch(ctx, batches), start=ctx.trained + 1):
            if train_pass.is_paused:
                train_pass.is_paused = False
                fire("on_train_begin")
            ctx.batch, ctx.loss, ctx.batch_values = read(batch), {}, []
            ctx.pred, at = None, ctx.step if by_steps else 0
            fire("on_train_batch_begin")
            step()
            ctx.trained = ctx.iter
            if by_steps:
                train_pass.is_due = pace.is_crossed(at, ctx.step)
            fire("on_train_batch_end")
            count_batch_values(ctx)
            if train_pass.is_due:
                validate_within(ctx)
            if is_limited and pace.is_over(ctx.step):
                break
    ctx.accelerator.drop_window()
    if is_whole:
        warn_of_silence(ctx, "train", before)
    if not train_pass.is_paused and not is_closed:
        fire("on_train_end")


def validate_within(ctx: StepContext) -> None:
    """Validate between two training batches; what training continues with is untouched."""
    assert ctx.train_pass is not None
    if not ctx.train_pass.is_paused:
        ctx.batch_values = None
        ctx.call_callbacks("on_train_end")
        ctx.train_pass.is_paused = True
    validate(ctx)
    ctx.training, ctx.data, ctx.iter = True, ctx.train_data, ctx.trained


def validate_last(ctx: StepContext) -> None:
    """Validate after the training of an epoch; by steps, a resume knows that it has begun."""
    if ctx.pace.unit == "step" and ctx.train_pass is not None:
        ctx.train_pass.is_due = ctx.train_pass.is_paused = True
    validate(ctx)


def validate(ctx: StepContext) -> None:
    """Validate on each set of data.

    If the user chose how often, the random state is put back, so that training does not
    depend on it.
    """
    if not ctx.valid_sets:
        return
    generators = get_generators(ctx) if ctx.pace.is_given else []
    if ctx.pace.is_given:
        ctx.train_random = get_rng_state(generators, ctx.device)
    try:
        mark_validation(ctx)
        for ctx.valid_name, ctx.valid_data in ctx.valid_sets.items():
            valid_epoch(ctx)
    finally:
        if ctx.train_random is not None:
            set_rng_state(ctx.train_random, generators, ctx.device)
            ctx.train_random = None


def valid_epoch(ctx: StepContext) -> None:
    """Make one pass over a set of validation data."""
    assert ctx.accelerator is not None and ctx.valid_data is not None
    read, fire, step = get_reader(ctx), ctx.call_callbacks, get_step(ctx)
    ctx.training, ctx.data = False, ctx.valid_data
    fire("on_valid_begin")
    with torch.no_grad(), counting_values(ctx):
        for ctx.iter, batch in enumerate(fetch(ctx, iter_batches(ctx.valid_data)), 1):
            ctx.batch, ctx.loss, ctx.batch_values = read(batch), {}, []
            ctx.pred = None
            fire("on_valid_batch_begin")
            step()
            fire("on_valid_batch_end")
            count_batch_values(ctx)
    warn_of_silence(ctx, "valid")
    fire("on_valid_end")


def fetch(ctx: Context, batches: Iterator[Any]) -> Iterator[Any]:
    """Yield batches; if they fail after a signal, end the fit as the signal asks.

    A signal to the whole process group may have ended what the loader reads from. On several
    ranks the error stays, because the other ranks do not know of it.
    """
    try:
        yield from batches
    except Exception as error:
        signum = ctx.buffers.get("signal")
        assert ctx.accelerator is not None
        if signum is None or ctx.accelerator.world_size > 1:
            raise
        raise Interrupted(signum) from error


@contextmanager
def counting_values(ctx: Context) -> Iterator[None]:
    """Count what the last batch logged, also where it ends early; then no batch is open."""
    try:
        yield
    finally:
        count_batch_values(ctx)
        ctx.batch_values = None


def warn_of_silence(
    ctx: StepContext, split: str, steps: Mapping[str, int] | None = None
) -> None:
    """Warn once in a fit of an own step that steps nothing, or keeps callbacks from events.

    Parameters
    ----------
    split
        ``train`` or ``valid``.
    steps
        Steps of each optimizer before the epoch; None: it trains nothing.
    """
    if split in ctx.has_warned or get_method(ctx.model, "step") is None:
        return
    name = f"{type(ctx.model).__name__}.step"
    silent = ctx.listeners.list_silent(STEP_EVENTS[split])
    if steps is not None and steps == ctx.steps:
        msg = f"{name}: expected an optimizer step in epoch {ctx.epoch}, got none."
        advice = "Call ctx.optimize(loss), or return the loss."
    elif silent:
        msg = (
            f"{name}: expected the events of a step, got none for {', '.join(silent)}."
        )
        advice = "Call ctx.optimize(loss) in it, or ctx.call_callbacks(event)."
    else:
        return
    ctx.has_warned.add(split)
    warnings.warn(f"{msg} {advice}", stacklevel=2)


STEP_EVENTS = {
    split: [
        event
        for event in FIT_EVENTS
        if event.startswith(f"on_{split}_batch_")
        and not event.endswith(("_begin", "_end"))
    ]
    for split in ("train", "valid")
}
"""Events that a step fires, by split."""


def evaluate(ctx: StepContext) -> None:
    """Log the losses and metrics of ``ctx.valid_sets`` as epoch 1 of those sets."""
    add_handlers(ctx)
    with report_exceptions(ctx), suppress_all_handled(ctx):
        validate(ctx)


def predict(
    ctx: StepContext, arguments: Mapping[str, object] = MappingProxyType({})
) -> list[Any]:
    """Return the model's output for each batch of ``ctx.data``, detached, of all ranks.

    Its own ``predict`` gets `arguments` too.
    """
    assert ctx.accelerator is not None and ctx.data is not None
    own, read = get_method(ctx.model, "predict"), get_reader(ctx)
    preds: list[Any] = []
    waiting: list[list[Any]] = []
    add_handlers(ctx)
    with report_exceptions(ctx), suppress_all_handled(ctx), torch.no_grad():
        ctx.call_callbacks("on_predict_begin")
        for ctx.iter, batch in enumerate(iter_batches(ctx.data), start=1):
            ctx.batch = read(batch)
            ctx.call_callbacks("on_predict_batch_begin")
            try:
                if own:
                    ctx.pred = own(ctx.input, **arguments)
                else:
                    ctx.pred = call_model(ctx.model, ctx.input)
            except Exception as error:
                add_model_note(ctx, error)
                raise
            ctx.call_callbacks("on_predict_batch_end")
            pred = map_tensors(copy_by_value(ctx.pred), Tensor.cpu)
            waiting.append([pred] if ctx.accelerator.counted != 0 else [])
            if len(waiting) == GATHER_BATCHES:
                preds += gather_outputs(waiting, ctx.accelerator)
        ctx.call_callbacks("on_predict_end")
    return preds + gather_outputs(waiting, ctx.accelerator)


GATHER_BATCHES = 64
"""Batches whose predictions are sent to the other ranks at once."""


def gather_outputs(waiting: list[list[Any]], accelerator: Accelerator) -> list[Any]:
    """Return the waiting outputs of all ranks, in order of batches, and forget them.

    Parameters
    ----------
    waiting
        For each batch, a list with its output; empty if the batch does not count.
    """
    of_ranks = accelerator.gather_objects(list(waiting))
    waiting.clear()
    return [
        pred
        for batches in zip(*of_ranks, strict=True)
        for found in batches
        for pred in found
    ]


def drop_gradients(ctx: Context) -> None:
    """Clear what an epoch leaves behind that was ended early."""
    assert ctx.accelerator is not None
    ctx.accelerator.drop_window()
    for opt in ctx.optimizers.values():
        opt.zero_grad()


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


def run_callback_checks(ctx: Context) -> None:
    """Let each callback refuse a fit that it cannot work in."""
    for callback in ctx.callbacks:
        try:
            callback.check(ctx)
        except Exception as exc:
            exc.add_note(f"in {type(callback).__name__}.check, before the first epoch")
            raise


def start_epoch(ctx: Context) -> int:
    """Return the first epoch to run, after restoring a checkpoint taken between epochs.

    A checkpoint taken inside an epoch is restored by ``start_batches``.
    """
    resume = ctx.resume
    if resume is None:
        return 1
    if resume.is_exact and resume.position.phase != "epoch":
        return int(resume.position.epoch)
    ctx.resume = None
    resume.restore(ctx)
    if not resume.is_exact:
        return 1
    resume.restore_random(ctx)
    return int(resume.position.epoch) + 1


def start_batches(ctx: Context) -> Iterator[Any]:
    """Return the training batches of the epoch; after a resume, only the remaining ones."""
    resume, ctx.resume = ctx.resume, None
    train_pass = ctx.train_pass
    assert train_pass is not None
    if resume is None:
        return train_pass.start()
    if resume.is_after_training(ctx):
        switch_optimizers(ctx, is_training=False)  # as they were when it was saved
    resume.restore(ctx)
    ctx.trained = resume.position.iter
    if resume.position.phase == "valid" and not resume.has_pass(ctx):
        resume.restore_random(ctx)
        return iter(())
    resume.restore_pass(ctx)
    batches = train_pass.start()
    resume.restore_random(ctx)
    # The saved fit may have ended by a number of steps.
    return iter(()) if ctx.pace.is_over(ctx.step) else batches


def add_handlers(ctx: Context) -> None:
    """Add the handlers of signals to those of the user."""
    ctx.handlers |= {EarlyStop: lambda _: ctx.call_callbacks("on_early_stopping")}
    ctx.handlers |= {Interrupted: lambda _: ctx.call_callbacks("on_interrupt")}
    ctx.epoch_handlers |= {SkipEpoch: lambda _: None}


@contextmanager
def noting_interrupt(ctx: Context) -> Iterator[None]:
    """Note in the context which signal ends the fit, before a handler runs."""
    try:
        yield
    except Interrupted as exc:
        ctx.stop_signal = exc.signum
        raise


@contextmanager
def suppress_all_handled(ctx: Context) -> Iterator[None]:
    """Suppress what has a handler in an evaluation or prediction, which is one epoch."""
    whole, epoch = (lambda: ctx.handlers), (lambda: ctx.epoch_handlers)
    with suppress_handled(ctx, whole), suppress_handled(ctx, epoch):
        yield


@contextmanager
def suppress_handled(
    ctx: Context, get_handlers: Callable[[], Handlers]
) -> Iterator[None]:
    """Suppress exceptions that have a registered handler, after calling the handler."""
    try:
        yield
    except BaseException as exc:
        handlers = get_handlers()
        kinds = (kind for kind in handlers if isinstance(exc, kind))
        kind = next(kinds, None)
        if kind is None:
            raise
        assert ctx.accelerator is not None
        place = f"epoch {ctx.epoch}, batch {ctx.iter}"
        ctx.accelerator.meet(f"{type(exc).__name__} in {place}")
        handlers[kind](exc)


@contextmanager
def report_exceptions(ctx: Context) -> Iterator[None]:
    """Fire ``on_exception`` for an exception, and add a note of where it happened."""
    try:
        yield
    except BaseException as exc:
        notes = getattr(exc, "__notes__", [])
        has_note = any(", epoch " in note for note in notes)
        if isinstance(exc, Exception) and not has_note:
            ctx.add_note(exc, "the loop")
        ctx.call_callbacks("on_exception")
        raise
