"""One batch: prediction, loss, backward, optimizer step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from harness.accelerators.base import StepOpt, has_modes
from harness.accelerators.optimizer_step import default_step_opt
from harness.callback import Listeners
from harness.checks.hints import add_hint, find_loss_hint, find_model_hint
from harness.checks.model import get_method
from harness.context import Context
from harness.data.batch import Batch, as_scalar, describe, missing_target_error
from harness.errors import EarlyStop, Signal
from harness.events import nearest
from harness.pytree import cache_by_identity
from harness.records import NullRun


def call_model(model: Callable[..., Any], input: object) -> Any:
    """Call the model; a tuple or list becomes arguments, a mapping keyword arguments.

    A named tuple, such as a ``PackedSequence``, is one argument. The ``labels`` of a mapping are
    its target; a model gets them only if its ``forward`` takes them, as Hugging Face's do.
    """
    if isinstance(input, Tensor):
        return model(input)
    if isinstance(input, tuple | list) and not hasattr(input, "_fields"):
        return model(*input)
    if isinstance(input, Mapping):
        if "labels" in input and not _takes_labels(model):
            input = {name: input[name] for name in input if name != "labels"}
        return model(**input)
    try:
        return model(input)
    except Exception as error:
        if input is None and "None" in str(error):
            msg = f"{type(model).__name__}.forward: expected an input, got None."
            advice = "Look at what the loader or its collate function returns."
            raise TypeError(f"{msg} {advice}") from error
        raise


def _takes_labels(model: Any) -> bool:
    # torch 2.13, OptimizedModule: the arguments are those of the user's module.
    forward = getattr(getattr(model, "_orig_mod", model), "forward", model)
    return _has_labels(getattr(forward, "__func__", forward))


@cache_by_identity
def _has_labels(function: Callable[..., object]) -> bool:
    try:
        params = inspect.signature(function).parameters
    except (TypeError, ValueError):  # of C: it says nothing
        return True
    return "labels" in params or any(
        param.kind is param.VAR_KEYWORD for param in params.values()
    )


ReadBatch = Callable[[Any], tuple[Any, Any]]
"""A function that returns input and target of what a loader yields."""


def get_reader(ctx: StepContext) -> Callable[[object], Batch]:
    """Return what makes a batch of what the loader yields: on the device, and read."""
    move, read = ctx.accelerator.to_device, ctx.read_batch
    if read is None:
        return move

    def read_moved(loaded: object) -> Batch:
        batch = read(move(loaded))
        if not isinstance(batch, tuple | list) or len(batch) < 2:
            msg = f"setup(batch): expected it to return (input, target), got {batch!r:.100}."
            raise TypeError(f"{msg} Return a pair; the target may be None.")
        return tuple(batch)

    return read_moved


_NAMES_ELSEWHERE = {
    "global_step": "ctx.step",
    "current_epoch": "ctx.epoch",
    "batch_idx": "ctx.iter",
    "logger": "ctx.run",
    "optimizer": "ctx.opt",
    "lr": "ctx.opt.param_groups[0]['lr']",
    "val_loss": "ctx.get_metrics('valid')['loss']",
    "should_stop": "an exception, raise harness.EarlyStop(),",
}
"""What fields of other libraries' trainers are called here."""


class StepContext(Context):
    """Context with the two calls that a step is written with.

    Parameters
    ----------
    read_batch
        Returns ``(input, target)`` of what the loader yields; None: read it as usual.
    **options
        As of ``Context``.

    Attributes
    ----------
    with_closure : frozenset of str
        Optimizers that evaluate the loss several times in a step.
    is_repeated : bool
        True in an evaluation of the loss after the first one of a step.
    split_state : tensor or None
        Random state that a fraction of the data was drawn with, for validation.

    Examples
    --------
    >>> def step(self) -> None:  # a GAN: one loss for each named optimizer
    ...     ctx = self.ctx
    ...     for name, loss_of in {"critic": self.critic_loss, "gen": self.gen_loss}.items():
    ...         with ctx.optimizing(name):
    ...             ctx.optimize(loss_of(ctx.input))
    """

    __slots__ = (
        "_is_optimized",
        "_section",
        "has_warned",
        "is_repeated",
        "read_batch",
        "split_state",
        "with_closure",
    )

    def __init__(self, *, read_batch: ReadBatch | None = None, **options: Any) -> None:
        self.read_batch = read_batch
        self._section: _Section | None = None
        self._is_optimized = self.is_repeated = False
        self.has_warned: set[str] = set()
        self.with_closure: frozenset[str] = frozenset()
        self.split_state: Tensor | None = None
        Context.__init__(self, **options)

    def __getattr__(self, name: str) -> Any:
        """Refuse what the context does not have; offer the nearest name, or ``ctx.run``."""
        if hasattr(NullRun, name) and not name.startswith("_"):
            msg = f"ctx.{name}: expected a field of the context, got {name!r}."
            raise AttributeError(f"{msg} The run has it: ctx.run.{name}.")
        names = [known for known in dir(type(self)) if not known.startswith("_")]
        msg = f"ctx.{name}: expected a field of the context, got {name!r}."
        if name in _NAMES_ELSEWHERE:
            advice = f"It is {_NAMES_ELSEWHERE[name]} here."
            raise AttributeError(f"{msg} {advice}", name=name, obj=self)
        guess = "" if name in names or name.startswith("_") else nearest(name, names)
        raise AttributeError(f"{msg}{guess}", name=name, obj=self)

    def optimizing(self, name: str | None = None) -> AbstractContextManager[None]:
        """Run the forward and backward of one named optimizer inside.

        It is the current optimizer there (``opt_name``, ``opt``), and only its parameters
        get gradients.

        Parameters
        ----------
        name
            Name of the optimizer; None: the only one.

        Raises
        ------
        ValueError
            If there is no such optimizer, or None could mean several.
        """
        names = self._optimizers
        if name is None and len(names) == 1:
            name = next(iter(names))
        if name not in names:
            guess = "" if name is None else nearest(name, names)
            msg = f"ctx.optimizing: expected the name of an optimizer, got {name!r}."
            raise ValueError(f"{msg}{guess} Choose from {list(names)}.")
        return _Section(self, name)

    def _switch_to(self, name: str) -> None:
        """Make a named optimizer the current one."""
        if self._opt_name != name or self._opt is not self._optimizers[name]:
            self._opt_name, self._opt = name, self._optimizers[name]

    def optimize(self, loss: object) -> None:
        """Train the current optimizer on a loss; in validation, only record the loss.

        Training runs the backward pass. At the end of a window of accumulated batches the
        optimizer steps. All events from ``on_train_batch_after_loss`` to
        ``on_train_batch_after_step`` fire as in the default step.

        Parameters
        ----------
        loss
            Tensor with one element, or a dict of parts, which are summed. Each part is
            logged by its name, and the sum as ``loss``. Or a function that returns one of
            these: an optimizer such as LBFGS calls it several times in a step.

        Raises
        ------
        TypeError, ValueError
            If the loss is of another kind or shape or has no graph, if there are several
            optimizers and no ``optimizing`` around it, or if the optimizer needs a function.

        Notes
        -----
        An optimizer whose ``step`` needs a closure evaluates the loss several times, each
        time with all events but ``on_train_batch_after_step``. What is recorded (losses,
        predictions, logged values) is that of the first evaluation.
        """
        if callable(loss):
            self.optimize_first(loss(), loss)
        else:
            self.optimize_first(loss, None)

    def optimize_first(
        self, loss: object, evaluate: Callable[[], object] | None
    ) -> None:
        """Train on a loss that is computed; `evaluate` computes it again, for a closure."""
        if self._section is None and len(self._optimizers) > 1:
            names = list(self._optimizers)
            msg = "ctx.optimize(loss): expected 'with ctx.optimizing(name)' around it"
            raise ValueError(f"{msg}, got none. Choose name from {names}.")
        name = self.opt_name
        self._take_loss(loss, name)
        if not self._is_optimized:
            self._is_optimized = True
        if not self.training:
            self.call_callbacks("on_valid_batch_after_loss")
            return
        if evaluate is None and name in self.with_closure:
            kind = type(self.optimizers[name]).__name__
            msg = "ctx.optimize(loss): expected a function that returns the loss, which"
            advice = (
                "Write ctx.optimize(self.my_loss), or let the step return the loss."
            )
            raise TypeError(f"{msg} {kind} evaluates several times, got one. {advice}")
        self._run_backward()
        self._step(name, evaluate if name in self.with_closure else None)

    def _take_loss(self, loss: object, name: str) -> None:
        total = self.loss_grad = self._sum_parts(loss)
        if not isinstance(self.loss, dict):
            self.loss = {}
        self.loss[name] = total.detach()

    def _run_backward(self) -> None:
        """Run the backward pass of ``loss_grad``, with the events before it."""
        self.call_callbacks("on_train_batch_after_loss")
        self.call_callbacks("on_train_batch_before_backward")
        assert self.backward is not None and self.loss_grad is not None
        if not self.loss_grad.requires_grad:
            msg = "loss: expected a loss with gradients, got one without."
            cuts = "detach(), item(), numpy(), argmax and torch.no_grad() cut them off"
            raise ValueError(f"{msg} Compute it from the parameters: {cuts}.")
        try:
            self.backward(self.loss_grad)
        except Exception as error:
            note_loss(self, error)
            raise

    def _step(self, name: str, evaluate: Callable[[], object] | None) -> None:
        """Step outside the section: neither frozen parameters nor autocast belong there."""
        section, accelerator = self._section, self.accelerator
        if not accelerator.is_boundary(name):
            return
        step_opt, later = self.step_opt or default_step_opt, None
        if evaluate is not None:
            later = _LaterSignals(self.listeners)
            step_opt = partial(self._step_by_closure, evaluate, later, step_opt)
        if section is None or not section.holds:
            accelerator.step(name, step_opt)
        else:
            section.leave()
            try:
                accelerator.step(name, step_opt)
            finally:
                section.enter()
        if later is not None and later.raised is not None:
            raise later.raised

    def _step_by_closure(
        self,
        evaluate: Callable[[], object],
        later: _LaterSignals,
        step_opt: StepOpt,
        opt: Any,
    ) -> None:
        """Step an optimizer that evaluates the loss; keep what the first evaluation gave."""
        assert self.loss_grad is not None
        first = (self.pred, dict(self.loss), self.loss_grad, self.batch_values)
        self.is_repeated, self.listeners = True, later
        try:
            step_opt(_WithClosure(opt, partial(self._repeat, evaluate), self.loss_grad))
        except BaseException:
            if type(opt) is torch.optim.LBFGS:
                opt.state.clear()  # it is half changed, and the next step would fail
            raise
        finally:
            self.is_repeated, self.listeners = False, later.listeners
            self.pred, self.loss, self.loss_grad, self.batch_values = first

    def _repeat(self, evaluate: Callable[[], object]) -> Tensor:
        """Evaluate the loss and its gradients again; nothing of it is recorded."""
        section, name, accelerator = self._section, self.opt_name, self.accelerator
        self.batch_values = []
        self.optimizers[name].zero_grad()
        with torch.enable_grad():
            if section is not None:
                section.enter()
            try:
                self._take_loss(evaluate(), name)
                self._run_backward()
            finally:
                if section is not None:
                    section.leave()
        accelerator.before_step(name)
        assert self.loss_grad is not None
        return self.loss_grad.detach()

    def log_step(self, values: Mapping[str, object]) -> None:
        """Log values of this optimizer step, as ``Context``; once in a step by closure."""
        if not self.is_repeated:
            Context.log_step(self, values)

    def _sum_parts(self, loss: object) -> Tensor:
        """The loss as a scalar; the parts of a dict are logged."""
        if isinstance(loss, Tensor) or not isinstance(loss, Mapping):
            return as_scalar(loss, "loss")
        if not loss or ("loss" in loss and len(loss) > 1):
            msg = (
                f"loss: expected parts with names other than 'loss', got {list(loss)}."
            )
            advice = "Return the parts alone, which are summed, or the loss alone"
            raise ValueError(f"{msg} {advice}, and ctx.log_metric the others.")
        parts = {
            str(name): torch.as_tensor(part)
            if isinstance(part, int | float)
            else as_scalar(part, f"loss[{name!r}]")
            for name, part in loss.items()
        }
        first, *rest = parts.values()
        total = sum(rest, first)
        several = len(self._optimizers) > 1
        for name, part in parts.items():
            if name != "loss":
                value = part.detach()
                self.add_to_mean(name, {self.opt_name: value} if several else value)
        return total


class _LaterSignals(Listeners):
    """Listeners whose signals wait until an optimizer has finished its step."""

    def __init__(self, listeners: Listeners) -> None:
        self.listeners, self.silent = listeners, listeners.silent
        self.raised: Signal | None = None

    def call(self, event: str) -> None:
        """Call all listeners of an event; keep a signal, ``EarlyStop`` before others."""
        try:
            self.listeners.call(event)
        except Signal as signal:
            if self.raised is None or isinstance(signal, EarlyStop):
                self.raised = signal


class _WithClosure:
    """What steps an optimizer that needs a closure: its ``step`` takes no arguments.

    The first evaluation is made before the step. The optimizer's first one is the same,
    unless something has changed the weights or their gradients in between, as
    sharpness-aware minimization does; only LBFGS is known not to.
    """

    def __init__(self, opt: Any, repeat: Callable[[], Tensor], loss: Tensor) -> None:
        self._opt, self._repeat = opt, repeat
        self._first = loss.detach() if type(opt) is torch.optim.LBFGS else None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opt, name)

    def step(self) -> object:
        """Step the optimizer."""
        return self._opt.step(self._evaluate)

    def _evaluate(self) -> Tensor:
        first, self._first = self._first, None
        return self._repeat() if first is None else first


class _Section:
    """The block of ``StepContext.optimizing``."""

    __slots__ = ("_ctx", "_inside", "_name", "_outer")

    def __init__(self, ctx: StepContext, name: str) -> None:
        self._ctx, self._name = ctx, name

    def __enter__(self) -> None:
        self._outer = self._ctx._section
        if self._outer is not None:
            self._outer.leave()
        self._ctx._section = self
        self.enter()

    def __exit__(self, *_: object) -> None:
        self.leave()
        self._ctx._section = self._outer
        if self._outer is not None:
            self._outer.enter()

    @property
    def holds(self) -> bool:
        """Whether the accelerator holds anything for it, such as frozen parameters."""
        return self._inside is not None

    def enter(self) -> None:
        """Make the optimizer the current one, again after a step or an inner block."""
        ctx, name = self._ctx, self._name
        ctx._switch_to(name)
        self._inside = None
        if ctx.accelerator is not None:
            inside = ctx.accelerator.optimizing(name)
            if type(inside) is not nullcontext:
                inside.__enter__()
                self._inside = inside

    def leave(self) -> None:
        """Leave what the accelerator holds, for a step or an inner block."""
        if self._inside is not None:
            inside, self._inside = self._inside, None
            inside.__exit__(None, None, None)


def begin_batch(
    ctx: Context, iter: int, loaded: object, read: Callable[[object], Batch]
) -> None:
    """Set the fields of a new batch; `read` makes it of what the loader yields."""
    put = object.__setattr__  # in each step: these names need no check
    put(ctx, "_iter", iter)
    put(ctx, "_batch", read(loaded))
    put(ctx, "_rows", None)
    put(ctx, "pred", None)
    put(ctx, "loss", {})
    put(ctx, "batch_values", [])


def switch_optimizers(ctx: Context, *, is_training: bool) -> None:
    """Tell the optimizers of a fit that have ``train()`` and ``eval()`` what follows."""
    for opt in ctx.optimizers.values():
        if has_modes(opt):
            opt.train() if is_training else opt.eval()  # type: ignore[attr-defined]


def get_rest(ctx: StepContext, num_needed: int) -> Sequence[object]:
    """What a batch holds after input and target, for a loss that must be given more.

    Raises
    ------
    TypeError
        If the batch holds less than the loss needs.
    """
    batch = ctx.batch
    num_items = len(batch) if isinstance(batch, tuple | list) else 1
    if num_items < num_needed:
        name = getattr(ctx.loss_fn, "__name__", type(ctx.loss_fn).__name__)
        msg = (
            f"loss: expected batches of {num_needed} items for {name}, got {num_items}."
        )
        advice = "Yield (input, target, ...), or give the loss defaults."
        raise TypeError(f"{msg} {advice}")
    rest: Sequence[object] = batch[2:]
    return rest


def default_step(ctx: StepContext, *, num_needed: int = 2) -> None:
    """Run the step of a model that defines none: once for each named optimizer.

    Parameters
    ----------
    ctx
        Context of the fit or evaluation.
    num_needed
        Arguments that the loss must be given. With more than two it also gets what a batch
        holds after input and target, such as weights.

    References
    ----------
    luz 0.5.0, default ``step`` of ``luz_module``. Differs from luz: gradients are cleared
    after the step, so that they can accumulate over a window of batches.
    """
    assert ctx.loss_fn is not None
    split = "train" if ctx.training else "valid"
    rest = get_rest(ctx, num_needed) if num_needed > 2 else ()
    for name in ctx.optimizers:
        with ctx.optimizing(name):
            loss = compute_loss(ctx, split, rest)
            again = None
            if name in ctx.with_closure:
                again = partial(compute_loss, ctx, split, rest)
            ctx.optimize_first(loss, again)


def compute_loss(ctx: StepContext, split: str, rest: Sequence[object]) -> object:
    """Predict, and return the loss; `rest` are further arguments of the loss."""
    assert ctx.loss_fn is not None
    try:
        ctx.pred = call_model(ctx.model, ctx.input)
    except Exception as error:
        add_model_note(ctx, error)
        raise
    ctx.call_callbacks(f"on_{split}_batch_after_pred")
    try:
        return ctx.loss_fn(ctx.pred, ctx.target, *rest)
    except Exception as error:
        if ctx.target is None and "None" in str(error):
            raise missing_target_error("loss") from error
        add_loss_note(ctx, error)
        raise


def add_model_note(ctx: Context, error: Exception) -> None:
    """Add to an error of the model which batch it was called with."""
    batch = f"input {describe(ctx.input)}, target {describe(ctx.target)}"
    _add_note(ctx, error, f"{type(ctx.model).__name__} ({batch})")
    add_hint(error, find_model_hint, error, ctx.model, ctx.input, ctx.target)


def note_loss(ctx: Context, error: Exception) -> None:
    """Note what a loss was called with, whose computation or backward failed."""
    loss = ctx.loss_fn or ctx.model
    name = getattr(loss, "__name__", type(loss).__name__)
    pair = f"prediction {describe(ctx.pred)}, target {describe(ctx.target)}"
    _add_note(ctx, error, f"loss {name} ({pair})")


def add_loss_note(ctx: Context, error: Exception) -> None:
    """Add to an error of the loss what it was called with, and what may be wrong with that."""
    note_loss(ctx, error)
    if ctx.pred is not None or get_method(ctx.model, "step") is None:
        add_hint(error, find_loss_hint, ctx.pred, ctx.target, error)
    if getattr(ctx.loss_fn, "__self__", None) is ctx.model:  # it may call submodules
        add_hint(error, find_model_hint, error, ctx.model, ctx.input, ctx.target)


def _add_note(ctx: Context, error: Exception, where: str) -> None:
    """Note where an error happened, unless a callback in it already has."""
    if not getattr(error, "__notes__", None):
        ctx.add_note(error, where)


def own_step(ctx: StepContext, step: Callable[[], object]) -> None:
    """Run the step of a model that defines one, and optimize the loss that it returns.

    A loss is optimized once: not if the step has made a backward pass, or has recorded the
    loss of a validation batch. The loss of a step that ran its own optimizer is recorded.
    """
    accelerator = ctx.accelerator
    ctx._is_optimized, before = False, (accelerator.num_backwards, ctx.step)
    with ctx.optimizing() if len(ctx.optimizers) == 1 else nullcontext():
        try:
            returned = step()
        except Exception as error:
            add_model_note(ctx, error)
            raise
        _optimize_returned(ctx, step, returned, before)


def _optimize_returned(
    ctx: StepContext,
    step: Callable[[], object],
    returned: object,
    before: tuple[int, int],
) -> None:
    if returned is None or ctx._is_optimized:
        return
    has_trained = before != (ctx.accelerator.num_backwards, ctx.step)
    if not has_trained and (ctx.training or not ctx.loss):
        ctx.optimize_first(returned, step)
    elif has_trained and not ctx.loss and len(ctx.optimizers) == 1:
        ctx._take_loss(returned, next(iter(ctx.optimizers)))
