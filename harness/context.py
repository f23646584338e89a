"""The context: one object that model, metrics and callbacks share.

It holds state and has no training logic. Logged values go to ``records`` and to ``run``.
"""

from __future__ import annotations

import copy
import operator
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from harness.callback import Callback
from harness.checkpoint.state import (
    IN_VALIDATION,
    BeforeValid,
    by_name,
    extra_state,
    put_extra_state,
)
from harness.data.batch import input_of, num_rows, target_of, with_input, with_target
from harness.errors import EarlyStop, Signal
from harness.events import EVENTS, check_event, nearest
from harness.pytree import named_leaves
from harness.records import (
    ARRAYS,
    NullRun,
    Records,
    append_logged,
    copy_logged,
    metrics_frame,
)
from harness.rng import find_generators, get_rng_state
from harness.setup_checks import (
    check_callbacks,
    check_epochs,
    check_optimizers,
    parse_epochs,
)

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch.utils.data import DataLoader

    import tracking
    from harness.accelerators.base import Accelerator, StepOpt

Handlers = dict[type[BaseException], Callable[[BaseException], object]]
Phase = Literal["train", "valid", "epoch"]

NO_LIMIT = 999_999_999
"""``max_epochs`` where none was given."""


def interactive() -> bool:
    """True where a person watches: a terminal, a notebook or a Python prompt."""
    return hasattr(sys, "ps1") or sys.stderr.isatty()


@dataclass(slots=True, init=False, eq=False, repr=False)
class Context:
    """State shared by model, metrics and callbacks during one call of fit, evaluate or predict.

    Parameters
    ----------
    verbose
        Whether to display; None: when a person watches.
    accelerator
        Places model and data; see ``harness.accelerator``.
    callbacks
        Instances of ``Callback``; kept in order of weight.
    training
        Whether training starts out on.
    run
        Records every logged value; None: no run.

    Raises
    ------
    AttributeError
        When an unknown field is set (the nearest name is offered), or a read-only one.

    References
    ----------
    luz 0.5.0, ``context``. Differs from luz: fields of all contexts are declared once;
    ``step``, ``steps`` and ``log_step`` are new; every log call goes to ``run`` too.
    """

    # Kept after training.
    hparams: dict[str, Any]  #: keyword arguments that built `model`
    opt_hparams: dict[str, Any]  #: keyword arguments that built `optimizers`
    steps: dict[str, int]  #: optimizer steps finished, by optimizer name
    _records: Records
    _unread: list[tuple[Any, Any]]
    _min_epochs: int
    _max_epochs: int
    _model: nn.Module | None
    # For this call of fit, evaluate or predict.
    buffers: dict[str, Any]  #: room for callbacks' temporary values
    run: (
        tracking.Run | NullRun
    )  #: run that records the call; drops everything if tracking is off
    accelerator: Accelerator | None  #: device placement, backward, stepping, ranks
    train_data: DataLoader[Any] | None  #: loader of the training data
    valid_data: DataLoader[Any] | None  #: loader of the validation data
    about: dict[str, Any]  #: what checkpoints say of this fit, to compare with later
    resume: Any  #: checkpoint to go on from, until that is done
    train_pass: Any  #: present pass over the training data
    stop_signal: int | None  #: signal that ended the fit at the end of a batch
    handlers: Handlers  #: exception type -> callable; a match ends the fit quietly
    epoch_handlers: (
        Handlers  #: exception type -> callable; a match ends the epoch quietly
    )
    metrics: Any  #: metric objects in use, by split
    step_opt: StepOpt | None  #: called with the optimizer to step it
    loss_fn: Callable[..., Tensor] | None  #: ``loss_fn(pred, target)``
    backward: Callable[[Tensor], object] | None  #: called with the loss to go back from
    _verbose: bool
    _callbacks: tuple[Callback, ...]
    _listeners: dict[str, tuple[Callable[[], object], ...]]
    _optimizers: dict[str, Any]
    # For this batch.
    training: bool  #: True in the training part of an epoch
    data: DataLoader[Any] | None  #: loader in use
    epoch: int | None  #: present epoch, from 1
    trained: int  #: training batches done in this epoch
    pred: Any  #: last prediction, as `model` gave it
    loss: Any  #: last losses, detached, by optimizer name
    loss_grad: Tensor | None  #: last loss with its graph
    _iter: int | None
    _batch: Any
    _rows: int | None
    _has_warned_of_rows: bool
    _opt: Any
    _opt_name: str | None
    _before_valid: BeforeValid | None

    def __init__(
        self,
        *,
        verbose: bool | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Iterable[Callback] = (),
        training: bool = True,
        run: tracking.Run | NullRun | None = None,
    ) -> None:
        self.hparams = {}
        self.opt_hparams = {}
        self.steps = {}
        self._records = {"metrics": {"train": [], "valid": []}}
        self._unread = []
        self._min_epochs, self._max_epochs = 0, NO_LIMIT
        self._model = None
        self.clean()
        self.run = run or NullRun()
        self.accelerator = accelerator
        self.set_verbose(verbose)
        self.callbacks = callbacks
        self.training = training

    def __setattr__(self, name: str, value: Any) -> None:
        try:
            object.__setattr__(self, name, value)
        except AttributeError:
            names = [name for name in dir(type(self)) if not name.startswith("_")]
            if name in names:
                raise
            msg = f"Context.{name}: expected a field of the context, got {name!r}."
            msg = f"{msg}{nearest(name, names)} Put your own values into ctx.buffers."
            raise AttributeError(msg) from None

    def __deepcopy__(self, memo: object) -> Context:
        """Itself: a copy of a bound model shares the context."""
        return self

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        """None: a pickled model goes without its context."""
        return type(None), ()

    # --- logging

    def log(
        self,
        what: str,
        set: str,
        value: Any,
        index: int | None = None,
        append: bool = True,
    ) -> None:
        """Log a value in memory, in the journal and, through it, in MLflow.

        Parameters
        ----------
        what
            What is logged, such as ``"metrics"`` or ``"notes"``.
        set
            Usually ``"train"`` or ``"valid"``.
        value
            A number, bool, string, None, small tensor or array, or dict or list of those.
        index : >= 1
            Place in the list of records; None adds at the end.
        append
            True adds to a value that is already there: dicts are merged, a name that both
            hold takes the new value; other values become a list. False replaces it.

        Raises
        ------
        TypeError
            If the value holds something that cannot be recorded; its path is named.

        References
        ----------
        luz 0.5.0, ``context$log``. Differs from luz: a gap before `index` is filled with None.
        """
        kept = copy_logged(value) if type(value) is not float else value
        series = self._records.get(what, {}).get(set, [])
        if index is None:
            index = len(series) + 1
        elif index < 1:
            msg = f"ctx.log(index): expected an index from 1, got {index!r}."
            raise ValueError(f"{msg} Leave it out to add at the end.")
        self.run.log(what, set, kept, index, append, epoch=self.epoch, step=self.step)
        series = self._records.setdefault(what, {}).setdefault(set, series)
        while len(series) < index:
            series.append(None)
        current = series[index - 1]
        series[index - 1] = append_logged(current, kept) if append else kept
        self._remember_tensors(series, index - 1)

    def log_metric(self, name: str, value: Any) -> None:
        """Log a metric of the present epoch under ``train`` or ``valid``, as `training` says.

        Parameters
        ----------
        name
            Name of the metric.
        value
            A number, a 0-d tensor, or a dict of those by optimizer name.
        """
        split, epoch = ("train" if self.training else "valid"), self.epoch
        series = self._records.get("metrics", {}).get(split)
        if type(value) is float and series is not None and epoch == len(series):
            # The common call, at a third of the price: the epoch's dict is there already.
            current = series[-1]
            if type(current) is dict:
                self.run.log(
                    "metrics", split, {name: value}, epoch, epoch=epoch, step=self.step
                )
                current[name] = value
                return
        self.log("metrics", split, {name: value}, index=epoch)

    def log_step(self, values: Mapping[str, Any]) -> None:
        """Log numbers of this optimizer step to the journal only; memory does not grow.

        Parameters
        ----------
        values
            Number or 0-d tensor by name; found as series ``<set>/<name>_step``.
        """
        split = "train" if self.training else "valid"
        self.run.log_step(values, step=self.step, set=split, epoch=self.epoch)

    def get_log(self, what: str, set: str, index: int | None = None) -> Any:
        """The value logged at `index` (from 1; None: the last); None where there is none."""
        series = self.records.get(what, {}).get(set, [])
        if index is None:
            index = len(series)
        return series[index - 1] if 1 <= index <= len(series) else None

    def get_metrics(self, set: str, epoch: int | None = None) -> dict[str, Any]:
        """All metrics of a set at an epoch (None: the last), by name."""
        found = self.get_log("metrics", set, epoch)
        return found if isinstance(found, dict) else {}

    def get_metric(self, name: str, set: str, epoch: int | None = None) -> Any:
        """One metric at an epoch (None: the last); None where it was not logged."""
        return self.get_metrics(set, epoch).get(name)

    def get_formatted_metrics(
        self, set: str, epoch: int | None = None
    ) -> dict[str, str]:
        """The metrics of a set at an epoch as text with four significant digits, by name."""
        metrics = dict(named_leaves(self.get_metrics(set, epoch)))
        return {
            name: f"{value:.4g}" if isinstance(value, int | float) else str(value)
            for name, value in metrics.items()
        }

    def get_metrics_df(self) -> pd.DataFrame:
        """All metrics as a DataFrame with the columns set, metric, epoch, value."""
        return metrics_frame(self.records)

    # --- state

    def set_verbose(self, verbose: bool | None = None) -> None:
        """Display or not; None: when a person watches."""
        self._verbose = interactive() if verbose is None else bool(verbose)

    def call_callbacks(self, name: str) -> None:
        """Call every callback that listens to the event `name`, in order of weight.

        A signal that one raises (``EarlyStop``, ``SkipEpoch``) goes on when all have heard
        the event, ``EarlyStop`` first; any other exception goes on at once.

        Raises
        ------
        ValueError
            If `name` is no event.
        """
        listeners = self._listeners.get(name)
        if listeners is None:
            check_event("call_callbacks", name)
            return
        raised: Signal | None = None
        for listener in listeners:
            try:
                listener()
            except Signal as signal:
                if raised is None or isinstance(signal, EarlyStop):
                    raised = signal
            except Exception as exc:
                self.add_note(exc, f"{type(listener.__self__).__name__}.{name}")  # type: ignore[attr-defined]
                raise
        if raised is not None:
            raise raised

    def add_note(self, exc: BaseException, where: str) -> None:
        """Tell in a note of the exception where it was raised: callback or metric, epoch, iter."""
        part = "training" if self.training else "not training"
        exc.add_note(f"in {where}, epoch {self.epoch}, iter {self.iter}, {part}")

    def clean(self) -> None:
        """Drop everything that does not outlive the call: all but records, model and hparams."""
        self.about = {}
        self.buffers, self.handlers, self.epoch_handlers = {}, {}, {}
        self.run = NullRun()
        self.accelerator = self.train_data = self.valid_data = self.data = None
        self.resume = self.train_pass = self.stop_signal = None
        self.metrics = self.step_opt = self.loss_fn = self.backward = None
        self._verbose, self._callbacks, self._listeners = False, (), {}
        self._optimizers = {}
        self.training, self.trained = False, 0
        self._before_valid = self._rows = None
        self._has_warned_of_rows = False
        self.epoch = self._iter = self._batch = self.pred = None
        self.loss = self.loss_grad = self._opt = self._opt_name = None

    def state_dict(self, phase: Phase | None = None) -> dict[str, Any]:
        """The model, the records, the hparams; during a fit all that the rest depends on.

        Outside a fit the model is unbound from the context, so that both can be freed.

        Parameters
        ----------
        phase
            Where in the epoch this is; None: as `training` says. See ``Position``.

        Returns
        -------
        dict
            ``model``, ``records`` and ``ctx`` (hparams and opt_hparams). During a fit also
            ``position``, ``accelerator`` (weights, optimizers, gradients of an open
            window), ``callbacks`` (metrics among them), ``random``, ``pass`` (position and
            order of the loader) and ``journal``.

        References
        ----------
        luz 0.5.0, ``context$state_dict``. Differs from luz: what a fit needs to go on
        exactly is there as well.
        """
        hparams = {"hparams": self.hparams, "opt_hparams": self.opt_hparams}
        state: dict[str, Any] = {"model": self._model, "records": self.records}
        state["ctx"] = hparams
        if self.train_pass is None or self.accelerator is None:
            if self._model is not None:
                bind_context(self._model, None)
            return state
        phase = phase or ("train" if self.training else "valid")
        loaders = (self.train_data, self.valid_data, self._model)
        state |= {
            "position": self.position(phase),
            "accelerator": self.accelerator.state_dict(),
            "extra": extra_state(self._model),
            "callbacks": {
                name: cb.state_dict() for name, cb in by_name(self.callbacks)
            },
            "random": get_rng_state(find_generators(*loaders)),
            "pass": self.train_pass.state_dict() if phase == "train" else None,
            "journal": self.run.position(),
            "run": self.run.id,
        }
        if phase == "valid" and self._before_valid is not None:
            self._before_valid.put_in(state)
        return state

    def position(self, phase: Phase) -> dict[str, Any]:
        """Epoch, batches done in it, steps finished and phase, as in ``Position``."""
        return {
            "epoch": self.epoch,
            "iter": self.trained,
            "step": self.step,
            "phase": phase,
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        restore_model: bool = True,
        restore_optimizers: bool = True,
        restore_records: bool = True,
        restore_callbacks: bool = True,
    ) -> list[str]:
        """Take back what ``state_dict`` gave during a fit; loader and random state stay.

        Parameters
        ----------
        state
            From ``state_dict`` or a checkpoint.
        restore_model, restore_optimizers, restore_records, restore_callbacks
            What is taken; counters of steps belong to the optimizers.

        Returns
        -------
        list of str
            What did not fit: callbacks that have no state, or are no longer there.

        Raises
        ------
        CheckpointError
            If weights or optimizers do not fit.
        """
        assert self.accelerator is not None
        wanted = {"model": restore_model, "optimizers": restore_optimizers}
        parts = [part for part, is_wanted in wanted.items() if is_wanted]
        self.accelerator.load_state_dict(state["accelerator"], parts)
        if restore_model:
            put_extra_state(self._model, state["extra"])
        if restore_records:
            self._records, self._unread = state["records"], []
            self._rewind(state["run"], state["journal"])
        return self._load_callbacks(state["callbacks"]) if restore_callbacks else []

    def _rewind(self, run_id: str | None, position: int) -> None:
        """Bring the recorder to the records: back in the same run, anew in another one."""
        if run_id is not None and run_id == self.run.id:
            self.run.rewind(position)
            return
        for what, sets in self._records.items():
            for split, series in sets.items():
                for index, value in enumerate(series, start=1):
                    if value is not None:
                        self.run.log(what, split, value, index, epoch=index)

    def _load_callbacks(self, saved: Mapping[str, Any]) -> list[str]:
        """Give each callback the state of its class and turn; tells what is left over."""
        named = dict(by_name(self.callbacks))
        notes = []
        for name, callback in named.items():
            if name in saved:
                callback.load_state_dict(saved[name])
            elif callback.state_dict():
                notes.append(f"{name} is new and starts afresh")
        gone = (name for name in saved if saved[name] and name not in named)
        return notes + [f"{name} is no longer there" for name in gone]

    def mark_validation(self) -> None:
        """Remember what a resume in the middle of validation begins it again from."""
        if self.train_pass is None:
            return
        loaders = (self.train_data, self.valid_data, self._model)
        involved = {
            listener.__self__  # type: ignore[attr-defined]
            for event in IN_VALIDATION
            for listener in self._listeners[event]
        }
        self._before_valid = BeforeValid(
            random=get_rng_state(find_generators(*loaders)),
            journal=self.run.position(),
            lengths={
                what: {split: len(series) for split, series in sets.items()}
                for what, sets in self._records.items()
            },
            callbacks={
                name: copy.deepcopy(cb.state_dict())
                for name, cb in by_name(self.callbacks)
                if cb in involved
            },
        )

    def unsafe_set_records(self, records: Records) -> None:
        """Replace all records; warns if training metrics are overwritten."""
        if self._records.get("metrics", {}).get("train"):
            msg = "unsafe_set_records: the records held training metrics; they are replaced."
            warnings.warn(msg, stacklevel=2)
        self._records, self._unread = records, []

    # --- fields that are checked, derived or read-only

    @property
    def records(self) -> Records:
        """What was logged: ``records[what][set][index - 1]``. Read-only."""
        if self._unread:
            for container, key in self._unread:
                if isinstance(container[key], ARRAYS):
                    container[key] = container[key].tolist()
            self._unread.clear()
        return self._records

    @records.setter
    def records(self, _: object) -> None:
        msg = "ctx.records: expected no assignment, records are read-only."
        raise AttributeError(f"{msg} Use ctx.log() or ctx.log_metric().")

    @property
    def device(self) -> torch.device:
        """Device of the accelerator. Read-only."""
        if self.accelerator is None:
            msg = "ctx.device: expected an accelerator, got None."
            raise AttributeError(f"{msg} Set ctx.accelerator first.")
        return self.accelerator.device

    @device.setter
    def device(self, _: object) -> None:
        msg = "ctx.device: expected no assignment, the device is read-only."
        raise AttributeError(f"{msg} Change ctx.accelerator.")

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """Callbacks in running order; setting them binds the context to each."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, new: Iterable[Callback]) -> None:
        self._callbacks = check_callbacks(new)
        for callback in self._callbacks:
            callback.ctx = self
        self._listeners = {
            event: tuple(
                getattr(callback, event)
                for callback in self._callbacks
                if hasattr(callback, event)
            )
            for event in EVENTS
        }

    @property
    def verbose(self) -> bool:
        """Whether to display; see ``set_verbose``."""
        return self._verbose

    @verbose.setter
    def verbose(self, new: bool | None) -> None:
        self.set_verbose(new)

    @property
    def step(self) -> int:
        """Optimizer steps finished; with several optimizers the most of one."""
        steps = self.steps
        if len(steps) == 1:
            for count in steps.values():
                return count
        return max(steps.values(), default=0)

    @property
    def iter(self) -> int | None:
        """Batch in this epoch, from 1."""
        return self._iter

    @iter.setter
    def iter(self, new: int | None) -> None:
        if type(new) is not int and new is not None:
            if not isinstance(new, Integral) or isinstance(new, bool):
                msg = f"ctx.iter: expected a whole number, got {new!r}."
                raise TypeError(f"{msg} Count batches from 1.")
            new = int(new)
        self._iter = new

    @property
    def batch(self) -> Any:
        """Present batch, ``(input, target)``, on the device."""
        return self._batch

    @batch.setter
    def batch(self, new: Any) -> None:
        self._batch, self._rows = new, None

    @property
    def rows(self) -> int:
        """Rows that the batch counts for in averages; set it to count tokens, for example."""
        if self._rows is not None:
            return self._rows
        rows = num_rows(self.input, self.target, self.pred)
        if rows is not None:
            return rows
        if not self._has_warned_of_rows:
            self._has_warned_of_rows = True
            kind = type(self._batch).__name__
            msg = f"ctx.rows: expected tensors or lists in the batch, got {kind}."
            advice = "Each batch counts as one row. Set ctx.rows in a step or callback."
            warnings.warn(f"{msg} {advice}", stacklevel=2)
        return 1

    @rows.setter
    def rows(self, new: int) -> None:
        try:
            rows = operator.index(new)
        except TypeError:
            rows = -1
        if rows < 0:
            msg = f"ctx.rows: expected a whole number >= 0, got {new!r}."
            raise ValueError(f"{msg} Pass how many rows the batch counts for.")
        self._rows = rows

    @property
    def input(self) -> Any:
        """First item of the batch: a tensor, tuple or mapping; the batch if it is no pair."""
        return input_of(self._batch)

    @input.setter
    def input(self, new: Any) -> None:
        self._batch = with_input(self._batch, new)

    @property
    def target(self) -> Any:
        """Second item of the batch; None where there is none."""
        return target_of(self._batch)

    @target.setter
    def target(self, new: Any) -> None:
        self._batch = with_target(self._batch, new)

    @property
    def min_epochs(self) -> int:
        """Epochs that run whatever a callback decides; 0 where none was given."""
        return self._min_epochs

    @min_epochs.setter
    def min_epochs(self, new: int) -> None:
        self._min_epochs, _ = check_epochs(new, self._max_epochs)

    @property
    def max_epochs(self) -> int:
        """Epochs that run at most."""
        return self._max_epochs

    @max_epochs.setter
    def max_epochs(self, new: int) -> None:
        _, self._max_epochs = check_epochs(self._min_epochs, new)

    @property
    def optimizers(self) -> dict[str, Any]:
        """Optimizers by name; a single one is called ``opt``."""
        return self._optimizers

    @optimizers.setter
    def optimizers(self, new: Any) -> None:
        self._optimizers = check_optimizers(new)

    @property
    def opt(self) -> Any:
        """Present optimizer; the only one where none was set."""
        if self._opt is not None:
            return self._opt
        if len(self._optimizers) == 1:
            return next(iter(self._optimizers.values()))
        names = list(self._optimizers)
        msg = f"ctx.opt: expected an optimizer, but none is set. Have {names}."
        raise AttributeError(f"{msg} Set ctx.opt, or use ctx.optimizers[name].")

    @opt.setter
    def opt(self, new: Any) -> None:
        self._opt = new

    @property
    def opt_name(self) -> str:
        """Name of the present optimizer; of the only one where none was set."""
        if self._opt_name is not None:
            return self._opt_name
        if len(self._optimizers) == 1:
            return next(iter(self._optimizers))
        names = list(self._optimizers)
        msg = f"ctx.opt_name: expected a name, but none is set. Have {names}."
        raise AttributeError(f"{msg} Set ctx.opt_name first.")

    @opt_name.setter
    def opt_name(self, new: str | None) -> None:
        self._opt_name = new

    @property
    def model(self) -> Any:
        """The model; setting it binds the context to it, so that ``model.ctx`` is this."""
        return self._model

    @model.setter
    def model(self, new: nn.Module | None) -> None:
        self._model = new
        if new is not None:
            bind_context(new, self)

    def _remember_tensors(self, container: Any, key: Any) -> None:
        """Keep the places of logged tensors and arrays, to read them out when somebody asks."""
        value = container[key]
        if isinstance(value, ARRAYS):
            self._unread.append((container, key))
        elif isinstance(value, dict):
            for name in value:
                self._remember_tensors(value, name)
        elif isinstance(value, list):
            for place in range(len(value)):
                self._remember_tensors(value, place)


def bind_context(model: nn.Module, ctx: Context | None) -> None:
    """Make `ctx` the model's ``self.ctx``, or take it off."""
    if ctx is None:
        model.__dict__.pop("ctx", None)
    else:
        model.__dict__["ctx"] = ctx


class FitContext(Context):
    """Context of ``fit``: built model, named optimizers, prepared loaders.

    Parameters
    ----------
    model
        Placed on the device by the accelerator.
    optimizers
        One optimizer, or several by name; None: the accelerator's config has one.
    loss_fn
        ``loss_fn(pred, target)``; None where the model has its own ``step``.
    hparams, opt_hparams
        What built model and optimizers.
    data, valid_data
        Loaders; `valid_data` may be None.
    epochs
        Whole number, or pair ``(min_epochs, max_epochs)``.
    verbose, accelerator, callbacks, run
        As in ``Context``.

    References
    ----------
    luz 0.5.0, ``fit_context``. Differs from luz: model, optimizers and loaders are built
    by the learner and given.
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        model: nn.Module,
        optimizers: Any,
        loss_fn: Callable[..., Tensor] | None,
        hparams: Mapping[str, Any],
        opt_hparams: Mapping[str, Any],
        data: DataLoader[Any],
        valid_data: DataLoader[Any] | None,
        epochs: int | tuple[int, int],
        accelerator: Accelerator,
        verbose: bool | None = None,
        callbacks: Iterable[Callback] = (),
        run: tracking.Run | NullRun | None = None,
        step_opt: StepOpt | None = None,
    ) -> None:
        Context.__init__(
            self,
            verbose=verbose,
            accelerator=accelerator,
            callbacks=callbacks,
            training=True,
            run=run,
        )
        self._min_epochs, self._max_epochs = parse_epochs(epochs)
        self.hparams, self.opt_hparams = dict(hparams), dict(opt_hparams)
        prepare: Callable[..., Any] = accelerator.prepare
        if optimizers is None:
            prepare = partial(prepare, opt_hparams=self.opt_hparams)
        named = {} if optimizers is None else check_optimizers(optimizers)
        model, named, loaders = prepare(model, named, [data, valid_data])
        self.model, self.optimizers = model, named
        self.steps = accelerator.steps
        self.loss_fn, self.step_opt = loss_fn, step_opt
        self.train_data, self.valid_data = loaders
        self.data = self.train_data


class PredictContext(Context):
    """Context of ``predict``: a model in evaluation mode and the data to predict.

    Parameters
    ----------
    model
        Placed on the device by the accelerator.
    newdata
        Loader of the data.
    verbose, accelerator, callbacks, run
        As in ``Context``.

    References
    ----------
    luz 0.5.0, ``predict_context``.
    """

    __slots__ = ()

    def __init__(
        self,
        *,
        model: nn.Module,
        newdata: DataLoader[Any],
        accelerator: Accelerator,
        verbose: bool | None = None,
        callbacks: Iterable[Callback] = (),
        run: tracking.Run | NullRun | None = None,
    ) -> None:
        Context.__init__(
            self,
            verbose=verbose,
            accelerator=accelerator,
            callbacks=callbacks,
            training=False,
            run=run,
        )
        model, _, loaders = accelerator.prepare(model, None, [None, newdata])
        self.model = model
        self.data = loaders[1]


class EvaluateContext(PredictContext):
    """Context of ``evaluate``: as ``PredictContext``, with epoch 1, losses and optimizer names.

    Parameters
    ----------
    optimizers
        The model's optimizers; only their names are used.
    loss_fn
        ``loss_fn(pred, target)``.
    opt_hparams
        What built the optimizers.

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
        self.epoch = 1
        self.opt_hparams = dict(opt_hparams)
        self.optimizers = check_optimizers(optimizers)
        self.loss_fn = loss_fn
        self.valid_data = self.data
