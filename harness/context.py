"""The context: one object that model, metrics and callbacks share.

It holds state and has no training logic. Logged values go to ``records`` and to ``run``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from harness.callback import Callback, Listeners, bind_context, get_context
from harness.checks.arguments import check_accelerator
from harness.checks.callbacks import check_callbacks
from harness.checks.context import (
    check_iter,
    check_stepped,
    check_trained_model,
    describe_moment,
    refuse_field,
)
from harness.checks.hints import add_hint, find_state_hint
from harness.checks.model import check_model_names
from harness.checks.optimizers import check_optimizers
from harness.checks.values import check_epochs
from harness.data.batch import BatchFields, keep_numbers
from harness.data.loaders import Loader
from harness.data.pace import NO_LIMIT, Pace, count_steps
from harness.pytree import Options, StateDict
from harness.records import (
    NullRun,
    RecordBook,
    Records,
    copy_logged,
    format_metrics,
    metrics_frame,
)
from tracking.errors import is_terminal

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch.optim import Optimizer

    import tracking
    from harness.accelerators.base import Accelerator, StepOpt
    from harness.checkpoint.resume import Resume
    from harness.checkpoint.validation_start import ValidationStart
    from harness.data.train_pass import TrainPass
    from harness.metrics.split import SplitMetrics

Handlers = dict[type[BaseException], Callable[[BaseException], object]]


@dataclass(slots=True, init=False, eq=False, repr=False)
class Context(BatchFields):
    """State shared by model, metrics and callbacks during one fit, evaluation or prediction.

    Parameters
    ----------
    verbose
        Whether to display progress; None: if a person watches.
    accelerator
        Places model and data; see ``harness.accelerator``.
    callbacks
        Instances of ``Callback``; they are sorted by weight.
    training
        Initial value of `training`.
    run
        Run that records every logged value; None: no run.

    References
    ----------
    luz 0.5.0, ``context``. Differs from luz: all contexts have the same fields; `step`,
    `steps`, `run` and ``log_step`` are new; ``log`` fills a gap before its index with None.
    """

    # Kept after training.
    hparams: Options  #: keyword arguments that built `model`
    opt_hparams: Options  #: keyword arguments that built `optimizers`
    steps: dict[str, int]  #: optimizer steps finished, by optimizer name
    record_book: RecordBook  #: holds `records`; tensors in it are read later
    _min_epochs: int
    _max_epochs: int
    _model: nn.Module | None
    _outer: Context | None
    # For this call of fit, evaluate or predict.
    buffers: dict[str, Any]  #: temporary values of callbacks
    run: tracking.Run | NullRun  #: the run, or one that drops all if not tracked
    accelerator: Accelerator  #: device placement, backward, stepping, ranks
    train_data: Loader | None  #: loader of the training data
    valid_data: (
        Loader | None
    )  #: loader of the validation data; of several, the current one
    valid_sets: dict[str, Loader]  #: loaders of the validation data, by name of the set
    valid_name: str  #: name of the current set of validation data
    pace: Pace  #: steps of the fit, and how often it validates
    is_saved: bool  #: whether a callback saves checkpoints of the fit
    about: StateDict  #: description of the fit, which a resume compares
    resume: Resume | None  #: checkpoint to resume from, until it is restored
    train_pass: TrainPass | None  #: current pass over the training data
    is_data_at_end: bool  #: whether the last pass read all training data
    epoch_start: StateDict | None  #: random state before the events of the epoch
    valid_start: ValidationStart | None  #: state before the current validation
    train_random: StateDict | None  #: random state to restore after a validation
    stop_signal: int | None  #: signal that ended the fit after a batch
    handlers: Handlers  #: exception type -> callable; a match ends the fit quietly
    epoch_handlers: Handlers  #: as `handlers`; a match ends the epoch quietly
    metrics: dict[str, SplitMetrics] | None  #: metrics in use, by split
    step_opt: StepOpt | None  #: called with the optimizer to step it
    loss_fn: Callable[..., Tensor] | None  #: ``loss_fn(pred, target)``
    backward: Callable[[Tensor], object] | None  #: called with the loss
    _verbose: bool
    _callbacks: tuple[Callback, ...]
    listeners: Listeners  #: methods of callbacks, by event
    _optimizers: dict[str, Optimizer]
    # For this batch.
    training: bool  #: True in the training part of an epoch
    data: Loader | None  #: loader in use
    epoch: int | None  #: current epoch, from 1
    trained: int  #: training batches finished in this epoch
    pred: Any  #: last prediction of `model`
    loss: Any  #: last losses, detached, by optimizer name
    loss_grad: Tensor | None  #: last loss with its graph
    batch_values: (
        list[tuple[str, Any]] | None
    )  #: logged in this batch; None outside one
    _iter: int | None
    _opt: Optimizer | None
    _opt_name: str | None

    def __init__(
        self,
        *,
        verbose: bool | None = None,
        accelerator: Accelerator | None = None,
        callbacks: Iterable[Callback] = (),
        training: bool = True,
        run: tracking.Run | NullRun | None = None,
    ) -> None:
        self.hparams, self.opt_hparams, self.steps = {}, {}, {}
        self.record_book = RecordBook()
        self._min_epochs, self._max_epochs, self._model = 0, NO_LIMIT, None
        self._outer = None
        self.clean()
        self.run = run or NullRun()
        self.accelerator: Accelerator = accelerator  # type: ignore[assignment]
        self.training = training
        self.set_verbose(verbose)
        self.callbacks = callbacks

    def __setattr__(self, name: str, value: object) -> None:
        try:
            object.__setattr__(self, name, value)
        except AttributeError as error:
            refuse_field(type(self), name, error)

    def __deepcopy__(self, memo: object) -> Context:
        return self  # a copy of a bound model shares the context

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # a pickled model has no context

    def log(
        self,
        what: str,
        set: str,
        value: object,
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
            Index in the series; a gap before it reads as None. None adds at the end.
        append
            True adds to an earlier value at the index: dicts are merged, other values
            become a list. False replaces it.

        Raises
        ------
        TypeError
            If the value holds something that cannot be recorded; the error names its path.
        """
        kept = copy_logged(value) if type(value) is not float else value
        index = self.record_book.check_index(what, set, index)
        self.run.log(what, set, kept, index, append, epoch=self.epoch, step=self.step)
        self.record_book.add(what, set, kept, index, append)

    def log_metric(self, name: str, value: object) -> None:
        """Log a metric of the current epoch and set; see `index` and `split`.

        Inside a batch, each call is recorded at its step, as by ``log_step``. The metric of
        the epoch is then the mean over the epoch's rows.

        Parameters
        ----------
        name
            Name of the metric.
        value
            A number, a 0-d tensor, or a dict of those by optimizer name.
        """
        split, index = self.split, self.index
        if self.batch_values is not None:
            self.add_to_mean(name, value)  # first: it refuses what is no number
            self.log_step({name: value})
            return
        series = self.record_book.get_series("metrics", split)
        if type(value) is float and series and index == len(series):
            current = series[-1]
            if type(current) is dict:  # the common call, at a third of the time
                logged = {name: value}
                place, step = self.epoch, self.step
                self.run.log("metrics", split, logged, index, epoch=place, step=step)
                current[name] = value
                return
        self.log("metrics", split, {name: value}, index=index)

    def add_to_mean(self, name: str, value: object) -> None:
        """Add a value of this batch to a metric that is a mean over the epoch's rows.

        It is a number, a tensor with one element, or a dict of those by optimizer name.
        """
        numbers = keep_numbers(value, f"ctx.log_metric({name!r})")
        if self.batch_values is not None:
            self.batch_values.append((name, numbers))

    def log_step(self, values: Mapping[str, object]) -> None:
        """Log numbers or 0-d tensors of this optimizer step, by name, to the journal only.

        Memory does not grow. MLflow shows the series ``<set>/<name>_step``.
        """
        self.run.log_step(values, self.step, set=self.split, epoch=self.epoch)

    def get_log(self, what: str, set: str, index: int | None = None) -> Any:
        """Value logged at `index` (from 1; None: the last); None if there is none."""
        return self.record_book.get(what, set, index)

    def get_metrics(self, set: str, epoch: int | None = None) -> dict[str, Any]:
        """All metrics of a set at an epoch (None: the last), by name."""
        found = self.get_log("metrics", set, epoch)
        return found if isinstance(found, dict) else {}

    def get_metric(self, name: str, set: str, epoch: int | None = None) -> Any:
        """One metric at an epoch (None: the last); None if it was not logged."""
        return self.get_metrics(set, epoch).get(name)

    def get_formatted_metrics(
        self, set: str, epoch: int | None = None
    ) -> dict[str, str]:
        """Metrics of a set at an epoch as text with four significant digits, by name."""
        return format_metrics(self.get_metrics(set, epoch))

    def get_metrics_df(self) -> pd.DataFrame:
        """All metrics as a DataFrame with the columns set, metric, epoch (or step), value."""
        return metrics_frame(self.records, self.pace.unit)

    @property
    def records(self) -> Records:
        """Logged values: ``records[what][set][index - 1]``. Read-only."""
        return self.record_book.read()

    def unsafe_set_records(self, records: Records) -> None:
        """Replace all records; warn if training metrics are overwritten."""
        self.record_book = self.record_book.replace(records)

    def set_verbose(self, verbose: bool | None = None) -> None:
        """Switch the display on or off; None: on if a person watches."""
        if verbose is None:  # a terminal, a notebook or a Python prompt
            verbose = hasattr(sys, "ps1") or is_terminal()
        self._verbose = bool(verbose)

    def call_callbacks(self, name: str) -> None:
        """Call every callback that listens to the event `name`, in order of weight.

        A signal (``EarlyStop``, ``SkipEpoch``) leaves after the last callback, any other
        exception at once, except at ``on_exception``. An unknown event is a ``ValueError``.
        """
        if name not in self.listeners.silent:
            self.listeners.call(name)

    def add_note(self, exc: BaseException, where: str) -> None:
        """Add to an exception where it was raised: callback or metric, epoch, iter."""
        exc.add_note(f"in {where}{describe_moment(self)}")
        add_hint(exc, find_state_hint, exc)

    def clean(self) -> None:
        """Drop everything that does not outlive the call: all but records, model, hparams."""
        self.about, self.buffers, self._optimizers = {}, {}, {}
        self.handlers, self.epoch_handlers, self.run = {}, {}, NullRun()
        self.accelerator = None  # type: ignore[assignment]
        self.train_data = self.valid_data = self.data = None
        self.resume = self.train_pass = self.valid_start = self.stop_signal = None
        self.valid_sets, self.valid_name, self.pace = {}, "valid", Pace()
        self.train_random, self.is_saved, self.is_data_at_end = None, False, False
        self.metrics = self.step_opt = self.loss_fn = self.backward = None
        self._verbose, self._callbacks, self.listeners = False, (), Listeners()
        self.training, self.trained, self.epoch_start = False, 0, None
        self._rows, self._has_warned_of_rows = None, False
        self.epoch = self._iter = self._batch = self.pred = self.batch_values = None
        self.loss = self.loss_grad = self._opt = self._opt_name = None

    def state_dict(self) -> StateDict:
        """Return ``model``, ``records`` and ``ctx`` (both hparams); unbind the model after a fit.

        A checkpoint holds more: see ``harness.checkpoint.state``.
        """
        if self.train_pass is None:
            bind_context(self._model, self._outer)
        hparams = {"hparams": self.hparams, "opt_hparams": self.opt_hparams}
        return {"model": self._model, "records": self.records, "ctx": hparams}

    @property
    def model(self) -> nn.Module:
        """The model. Setting it binds the context to it, as ``model.ctx``; None unbinds it."""
        return self._model  # type: ignore[return-value]  # None if none was given

    @model.setter
    def model(self, new: nn.Module | None) -> None:
        if new is not None and self.training:
            check_model_names(new, ["ctx"])
            check_trained_model(self, new)
        bind_context(self._model, self._outer)  # an evaluation may be within a fit
        self._model, self._outer = new, get_context(new)
        bind_context(new, self)

    @property
    def device(self) -> torch.device:
        """Device of the accelerator. Read-only."""
        return check_accelerator(self.accelerator, "ctx.device").device

    @property
    def callbacks(self) -> tuple[Callback, ...]:
        """Callbacks in running order. Setting them binds the context to each."""
        return self._callbacks

    @callbacks.setter
    def callbacks(self, new: Iterable[Callback]) -> None:
        self._callbacks = check_callbacks(new)
        for callback in self._callbacks:
            callback.ctx = self
        self.listeners = Listeners(self._callbacks)

    @property
    def verbose(self) -> bool:
        """Whether to display progress; see ``set_verbose``."""
        return self._verbose

    @verbose.setter
    def verbose(self, new: bool | None) -> None:
        self.set_verbose(new)

    @property
    def step(self) -> int:
        """Optimizer steps finished, the most of any optimizer. Read-only."""
        steps = self.steps
        if len(steps) == 1:
            for count in steps.values():
                return count
        return max(steps.values(), default=0)

    @property
    def total_steps(self) -> int | None:
        """Optimizer steps of the fit if nothing ends it early; None: not known. Read-only."""
        return count_steps(self)

    @property
    def index(self) -> int | None:
        """Index of metrics: the epoch, or the step if the fit validates by steps. Read-only."""
        return max(self.step, 1) if self.pace.unit == "step" else self.epoch

    @property
    def split(self) -> str:
        """Set that metrics are logged in: `train`, or `valid_name`. Read-only."""
        return "train" if self.training else self.valid_name

    @property
    def iter(self) -> int | None:
        """Batch in this epoch, from 1."""
        return self._iter

    @iter.setter
    def iter(self, new: int | None) -> None:
        self._iter = new if type(new) is int or new is None else check_iter(new)

    @property
    def min_epochs(self) -> int:
        """Minimum number of epochs, even if a callback stops the fit; 0 by default."""
        return self._min_epochs

    @min_epochs.setter
    def min_epochs(self, new: int) -> None:
        self._min_epochs, _ = check_epochs(new, self._max_epochs)

    @property
    def max_epochs(self) -> int:
        """Maximum number of epochs."""
        return self._max_epochs

    @max_epochs.setter
    def max_epochs(self, new: int) -> None:
        _, self._max_epochs = check_epochs(self._min_epochs, new)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Optimizers by name; a single one is called ``opt``."""
        return self._optimizers

    @optimizers.setter
    def optimizers(self, new: object) -> None:
        checked = check_optimizers(new)
        check_stepped(self, "optimizers", checked.values())
        self._optimizers = checked

    @property
    def opt(self) -> Optimizer:
        """Current optimizer; if none was set, the only one."""
        return self._opt if self._opt is not None else self._only("opt")[1]

    @opt.setter
    def opt(self, new: Optimizer | None) -> None:
        check_stepped(self, "opt", [new])
        self._opt = new

    @property
    def opt_name(self) -> str:
        """Name of the current optimizer; if none was set, of the only one."""
        return self._only("opt_name")[0] if self._opt_name is None else self._opt_name

    @opt_name.setter
    def opt_name(self, new: str | None) -> None:
        self._opt_name = new

    def _only(self, field: str) -> tuple[str, Optimizer]:
        if len(self._optimizers) != 1:
            msg = f"ctx.{field}: expected one optimizer, got {list(self._optimizers)}."
            raise AttributeError(f"{msg} Set ctx.{field}, or use ctx.optimizers[name].")
        return next(iter(self._optimizers.items()))
