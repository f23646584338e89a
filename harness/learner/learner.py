"""``setup`` makes a ``Learner``, which fits, evaluates and predicts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness import loop
from harness.accelerators.base import Accelerator
from harness.accelerators.select import accelerator as pick_accelerator
from harness.callback import Callback
from harness.callbacks import Metrics, TrainValid
from harness.callbacks.resuming import find_resume
from harness.callbacks.train_valid import Mode
from harness.checkpoint.description import describe_fit
from harness.checkpoint.full_weights.placement import ModelPlacement
from harness.checks.arguments import (
    check_call_arguments,
    check_gather,
    check_predict,
    check_setup,
)
from harness.checks.callbacks import check_callbacks
from harness.checks.calls import (
    check_arguments,
    check_given,
    check_numbers,
    explain_calls,
    takes_model,
)
from harness.checks.model import (
    check_compile,
    check_definition,
    check_loss,
    check_loss_items,
    check_model,
    check_model_names,
    get_method,
)
from harness.checks.optimizers import (
    check_config_optimizer,
    check_optimizers,
    explain_optimizer_errors,
    note_options_on_error,
)
from harness.context import Context
from harness.data.batch import join
from harness.data.loaders import (
    Data,
    get_batch_options,
    get_device_options,
    make_eval_loader,
    num_items,
)
from harness.data.pace import Limit, check_limits, fill_epochs, parse_pace
from harness.data.valid_sets import name_sets
from harness.export.html import as_html
from harness.export.summary import ModelSummary, summarize
from harness.fitted import Evaluation, Fitted
from harness.learner.originals import (
    WatchOriginals,
    check_parameters_of_loss,
    find_originals,
    refuse_gradients,
    warn_of_references,
)
from harness.learner.result import (
    GATHER_BYTES,
    call_after_fit,
    choose_placement,
    decide_gather,
    finish_on_error,
    make_fitted,
    restore_model_after,
)
from harness.learner.start import (
    Start,
    add_defaults,
    build_loaders,
    build_start,
    choose_loss,
    default_callbacks,
    is_fraction,
    make_progress,
    restore_split_state,
)
from harness.loop import EvaluateContext, FitContext, PredictContext
from harness.loss import (
    check_parameters,
    list_parameters,
    make_loss,
    use_copies,
    warn_of_untrained,
)
from harness.metrics.sets import MetricSet, as_metric_set
from harness.model_copy import build_unshared, keep_buffers
from harness.reshard.meta_parameters import count_bytes
from harness.rng import seed_all, share_rng_state
from harness.run_binding import (
    Tracker,
    check_tracker,
    get_code_commit,
    log_description,
    make_null_run,
    prepare_tracking,
    record_shapes,
    report_start,
    start_tracking,
)
from harness.signals import EndOfProcess
from harness.steps import ReadBatch


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Everything that defines a training except the data. Made by ``setup``; immutable.

    Attributes
    ----------
    module
        ``nn.Module`` class or factory, called with ``**hparams``.
    loss, optimizer, metrics, backward, batch, compile
        As passed to ``setup``.
    hparams, opt_hparams : dict
        Keyword arguments for module and optimizer.
    """

    module: Callable[..., nn.Module]
    loss: Callable[..., Tensor] | None = None
    optimizer: Callable[..., Optimizer] | Literal["config"] | None = None
    metrics: MetricSet = field(default_factory=MetricSet)
    backward: Callable[[Tensor], object] | None = None
    batch: ReadBatch | None = None
    compile: bool | Mapping[str, object] = False
    hparams: Mapping[str, object]
    opt_hparams: Mapping[str, object]

    def __post_init__(self) -> None:
        """Make the hparams read-only, since learners share them."""
        for name in ("hparams", "opt_hparams"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def __getstate__(self) -> dict[str, object]:
        """Return the fields with the hparams as dicts, which can be pickled and copied."""
        plain = {"hparams": dict(self.hparams), "opt_hparams": dict(self.opt_hparams)}
        return {**vars(self), **plain}

    def __setstate__(self, state: Mapping[str, object]) -> None:
        """Restore the fields; the hparams become read-only again."""
        vars(self).update(state)
        self.__post_init__()

    @explain_calls
    def set_hparams(self, **hparams: object) -> Learner:
        """Return a learner with more keyword arguments for the model."""
        return replace(self, hparams={**self.hparams, **hparams})

    @explain_calls
    def set_opt_hparams(self, **opt_hparams: object) -> Learner:
        """Return a learner with more keyword arguments for the optimizers."""
        return replace(self, opt_hparams={**self.opt_hparams, **opt_hparams})

    def build_model(self) -> nn.Module:
        """Build a new model; one that something else holds is copied.

        Raises
        ------
        TypeError
            If `module` does not return an ``nn.Module``, or one that cannot be copied.
        ValueError
            If neither the learner nor the model has a loss, or an optimizer.
        """
        return self._build_with_original()[0]

    def _build_with_original(self) -> tuple[nn.Module, nn.Module]:
        """As ``build_model``, and what it is a copy of; the same twice if it is none."""
        model, original = build_unshared(self._call_module)
        check_definition(model, self.loss, self.optimizer)
        return model, original

    def summary(self, example: object = None) -> ModelSummary:
        """Describe the model that this learner builds; ``print`` shows it as a table.

        Parameters
        ----------
        example
            Input of the model as a batch has it, such as ``torch.zeros(1, 3, 32, 32)``, for
            the shapes of outputs. None: layers and parameters without shapes.

        Notes
        -----
        The model is built without storage for its weights, where it can be.
        """
        with torch.random.fork_rng(devices=[]):
            try:
                with torch.device("meta"):
                    model = self._call_module()
            except Exception:  # noqa: BLE001  such as where it reads weights from a file
                model = self._call_module()
            return summarize(model, example)

    def __repr__(self) -> str:
        name = getattr(self.module, "__name__", type(self.module).__name__)
        given = {**self.hparams, **{f"opt.{k}": v for k, v in self.opt_hparams.items()}}
        texts = (f"{key}={value!r:.40}" for key, value in given.items())
        return f"<Learner of {', '.join([name, *texts])}>"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the hparams and the layers of the model."""
        return as_html(self)

    def __str__(self) -> str:
        name = getattr(self.module, "__name__", type(self.module).__name__)
        parts = {"hparams": dict(self.hparams), "opt_hparams": dict(self.opt_hparams)}
        lines = [f"Learner of {name}"]
        lines += [f"{part}: {given}" for part, given in parts.items() if given]
        try:
            return "\n".join([*lines, str(self.summary())])
        except Exception as error:  # noqa: BLE001  a text never fails
            return "\n".join([*lines, f"not built: {error}"])

    def _call_module(self) -> nn.Module:
        check_arguments("set_hparams", self.module, self.hparams)
        advice = "Pass them by set_hparams({})."
        check_given("setup(module)", self.module, self.hparams, advice)
        with note_options_on_error(self.module, self.hparams):
            model = self.module(**self.hparams)
        return check_model(model)

    def build_optimizers(
        self, model: nn.Module, loss: object = None
    ) -> dict[str, Any] | None:
        """Build the optimizers of a model, as ``setup(optimizer=...)`` or the model defines them.

        Parameters
        ----------
        model
            The model.
        loss
            Loss of the fit, whose parameters are trained too.

        Returns
        -------
        Optimizers by name, or None if the accelerator makes them from its config.
        """
        if self.optimizer == "config":
            return None
        build = self.optimizer or getattr(model, "set_optimizers", None)
        assert build is not None
        is_own = self.optimizer is None
        place = "set_optimizers()" if is_own else "setup(optimizer)"
        advice = "Pass them by set_opt_hparams({})."
        num_given = 0 if is_own else 1
        check_arguments("set_opt_hparams", build, self.opt_hparams, num_given)
        check_numbers("set_opt_hparams", build, self.opt_hparams)
        check_given(place, build, self.opt_hparams, advice, num_given)
        has_choice = is_own or takes_model(build)
        with (
            explain_optimizer_errors(model),
            note_options_on_error(build, self.opt_hparams),
        ):
            if is_own:
                built = build(**self.opt_hparams)
            elif has_choice:
                built = build(model, **self.opt_hparams)
            else:
                own = list_parameters(loss, model).values()
                params = [*model.parameters(), *own] if own else model.parameters()
                built = build(params, **self.opt_hparams)
        optimizers = check_optimizers(built, place)
        if has_choice:
            use_copies(optimizers, self.loss, loss, model)
            warn_of_untrained(optimizers, loss, model)
        return optimizers

    @explain_calls
    def fit(
        self,
        data: Data,
        epochs: int | tuple[int, int] | None = None,
        valid_data: Data = None,
        *,
        max_steps: int | None = None,
        valid_every: int | str | None = None,
        limit_batches: Limit = None,
        callbacks: Iterable[Callback] = (),
        accelerator: Accelerator | None = None,
        verbose: bool | None = None,
        dataloader_options: Mapping[str, object] | None = None,
        seed: int | None = None,
        tracker: Tracker = None,
        start: Start = None,
        strict: bool | None = None,
        gather: bool | int = GATHER_BYTES,
    ) -> Fitted:
        """Train a new model.

        Parameters
        ----------
        data
            DataLoader, or any iterable of batches that can be read in each pass; Dataset,
            or any object with ``__len__`` and ``__getitem__``; list of samples; tensors or
            arrays of equal length, also nested in tuples and dicts. Batches are ``(input,
            target)``. By default they have 32 rows and are shuffled, and a short last batch
            is dropped.
        epochs : >= 1
            Number, or pair ``(min_epochs, max_epochs)``; None: 10, or with `max_steps` as
            many as those need.
        valid_data
            Fraction of `data` in (0, 1), data in one of the same forms, a dict of several
            sets by name, or None.
        max_steps : >= 1
            Optimizer steps after which the fit ends, as ``ctx.step`` counts them: with
            several optimizers, those of the one with the most. If `epochs` is given too,
            what comes first ends the fit.
        valid_every
            Number of epochs (``2`` or ``"2 epochs"``) or optimizer steps (``"500 steps"``)
            from one validation to the next; None: every epoch. The fit ends with a
            validation. By steps, metrics are recorded at each validation, at its step.
        limit_batches : >= 1, or in (0, 1)
            Number or fraction of the batches of each pass, for a quick try: one for all, or a
            dict by set, such as ``{"train": 100, "valid": 10}``.
        callbacks
            Instances of ``harness.Callback``, added to the default ones. One of the class of
            a default callback, such as ``Profile``, replaces it.
        accelerator
            None: one device, or DeepSpeed if several ranks were launched.
        verbose
            Show progress; None: in a terminal, a notebook or a Python prompt.
        dataloader_options
            Arguments of torch's ``DataLoader``.
        seed
            Seed for Python's, NumPy's and torch's generators, set first; None leaves them.
            With several ranks, all begin with the random state of rank 0.
        tracker
            None: a new run in ``./runs`` and in MLflow's default store. A dict: the same
            with these arguments of ``tracking.start``. False: no tracking. A
            ``tracking.Run``: that run, which stays open.
        start
            Weights that the new model starts from: of a ``Fitted``, of another model, a
            state dict, or a path. That is a file of safetensors or of ``torch.save`` with
            plain tensors, a folder of ``Fitted.save``, a checkpoint, a folder of those, or
            the folder of a run.
            A ``Fitted`` of this learner is copied whole, as by ``Fitted.fit``.
        strict
            True refuses weights that do not all fit the model. Otherwise those of the same
            name and shape are loaded, and ``fitted.start`` and the run say which. None: the
            same, with a warning if not all fit.
        gather : >= 0
            Whether rank 0 gathers the whole weights in memory at the end. False: they stay
            in a final checkpoint, ``fitted.checkpoint``, next to the fit's other
            checkpoints or in the folder of its run. A number: True for a model of at most
            this many bytes, or on one rank. See also ``Fitted.model``.

        Raises
        ------
        TypeError, ValueError
            Before any epoch runs, if an argument is wrong.
        CheckpointError
            Before any epoch runs, if `start` has no weights that fit.
        SystemExit
            At once, if SIGTERM or SIGHUP has ended an earlier fit of this process.

        References
        ----------
        luz 0.5.0, ``fit``.
        """
        epochs = fill_epochs(epochs, max_steps)
        check_call_arguments("fit", accelerator, seed=seed, verbose=verbose)
        callbacks = check_callbacks(callbacks)
        check_tracker(tracker)
        check_gather(gather)
        validates = valid_data is not None
        pace = parse_pace(max_steps, valid_every, epochs, validates=validates)
        accelerator = accelerator or pick_accelerator()
        accelerator.meet("fit")
        EndOfProcess.check(accelerator)
        if seed is not None:
            seed_all(seed)
        share_rng_state(accelerator)
        resume, split_state = find_resume(callbacks, accelerator), None
        if is_fraction(valid_data):
            split_state = restore_split_state(resume, accelerator)
        train, valid = build_loaders(data, valid_data, dataloader_options, accelerator)
        limits = check_limits(limit_batches, valid)
        check_config_optimizer(self.optimizer, accelerator)
        start_model = build_start(self, start, strict, accelerator)
        model = start_model.model
        if resume is not None and resume.is_weights_only:
            resume.load_weights(model, accelerator)
        if self.compile is not False:
            model.compile(**check_compile(self.compile))
        num_bytes = count_bytes(model)
        is_whole = decide_gather(gather, num_bytes, accelerator, tracker, callbacks)
        loss = make_loss(start_model.loss, model, accelerator.device)
        check_parameters(loss, model, accelerator)
        originals = find_originals(start_model.original, model, self.loss, loss)
        check_parameters_of_loss(list_parameters(self.loss, model).values(), originals)
        watch = [WatchOriginals(originals)] if originals.by_field else []
        trains_loss = getattr(accelerator, "trains_loss", True)
        if self.batch is None:
            check_loss_items(model, loss, num_items(train))
        prepare_tracking(tracker, accelerator)
        ctx = FitContext(
            model=model,
            read_batch=self.batch,
            # An engine has no part of the loss, whose parameters are frozen there.
            optimizers=partial(
                self.build_optimizers, model, loss if trains_loss else None
            ),
            loss_fn=loss,
            hparams=self.hparams,
            opt_hparams=self.opt_hparams,
            data=train,
            valid_data=valid,
            epochs=epochs,
            pace=pace,
            limits=limits,
            accelerator=accelerator,
            verbose=verbose,
            callbacks=add_defaults(
                [*default_callbacks(self.metrics), *watch], callbacks
            ),
        )
        warn_of_references(originals, ctx.callbacks, train)
        ctx.backward, ctx.split_state = self._get_backward(ctx), split_state
        # A thousand ranks do not ask git all at once.
        code = {"code": cache(get_code_commit)} if accelerator.is_main else {}
        ctx.about = describe_fit(ctx) | code
        with finish_on_error(ctx):
            if resume is not None and not resume.is_weights_only:
                resume.check(ctx)
                ctx.resume = resume
            with start_tracking(ctx, tracker):
                is_described = resume is not None and resume.continues(ctx.run)
                if ctx.run.id is not None and not is_described:
                    log_description(ctx, seed)
                if start_model.report is not None and not is_described:
                    report_start(ctx, start_model.name, start_model.report)
                with record_shapes(ctx), refuse_gradients(originals):
                    loop.fit(ctx)
                placement = choose_placement(ctx, num_bytes, gather=is_whole)
            options = get_batch_options(train)
            fitted = make_fitted(self, ctx, options, start_model.report, placement)
        call_after_fit(ctx)
        ctx.clean()
        ctx.model = None  # unbinds it
        return fitted

    def _get_backward(self, ctx: Context) -> Callable[[Tensor], object]:
        """Return the user's backward if there is one, or else the accelerator's."""
        own = self.backward or get_method(ctx.model, "backward")
        accelerator = ctx.accelerator
        if own is None:
            return lambda loss: accelerator.backward(loss, ctx.opt_name)

        def backward(loss: Tensor) -> None:
            with accelerator.counting_backward(ctx.opt_name):
                own(loss)

        return backward

    def with_model(self, model: nn.Module) -> Fitted:
        """Wrap a model that was trained elsewhere as a result without records.

        It evaluates and predicts with the model, and trains a copy of it further.

        Parameters
        ----------
        model
            Used as it is, and not copied.

        Raises
        ------
        TypeError
            If it is not a model, or uses a name of ``harness`` for something else.

        Examples
        --------
        >>> net = nn.Linear(2, 1)  # of another program
        >>> learner = setup(lambda: net, loss=nn.MSELoss())
        >>> learner.with_model(net).predict(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
        """
        if not isinstance(model, nn.Module):
            msg = f"with_model(model): expected an nn.Module, got {model!r:.100}."
            raise TypeError(f"{msg} Pass the trained model.")
        check_model_names(model)
        return Fitted(
            placement=ModelPlacement(module=model),
            records={},
            learner=self,
            hparams=dict(self.hparams),
            opt_hparams=dict(self.opt_hparams),
        )

    @explain_calls
    def evaluate(
        self,
        fitted: Fitted,
        data: Data,
        *,
        metrics: object = None,
        callbacks: Iterable[Callback] = (),
        accelerator: Accelerator | None = None,
        verbose: bool | None = None,
        dataloader_options: Mapping[str, object] | None = None,
    ) -> Evaluation:
        """Compute losses and metrics of a trained model on new data.

        Parameters
        ----------
        fitted
            Result of ``fit``.
        data
            As in ``fit``, or a dict of several sets by name; read in order, with the short
            last batch.
        metrics
            Metrics in place of the learner's; None: the learner's for validation.
        callbacks, accelerator, verbose, dataloader_options
            As in ``fit``. Batches have the size that they had in the fit, and data sets its
            ``collate_fn``, unless `dataloader_options` says otherwise.

        References
        ----------
        luz 0.5.0, ``evaluate``.
        """
        check_call_arguments("evaluate", accelerator, verbose=verbose, fitted=fitted)
        module = fitted.placement.module
        check_loss(f"evaluate({type(module).__name__})", module, self.loss)
        accelerator = accelerator or pick_accelerator()
        accelerator.meet("evaluate")
        measured = self.metrics if metrics is None else as_metric_set(metrics)
        loaders = {}
        like = {**fitted.batch_options, **get_device_options(accelerator.device)}
        for name, own in name_sets(data, "data").items():
            place = "data" if own is data else f"data[{name!r}]"
            loaders[name] = make_eval_loader(own, dataloader_options, place, like)
        with fitted.placement.allocate(accelerator) as model:
            ctx = EvaluateContext(
                model=model,
                read_batch=self.batch,
                newdata=loaders,
                optimizers=partial(self._build_optimizers_for_names, model),
                loss_fn=make_loss(choose_loss(self, fitted), model, accelerator.device),
                opt_hparams=fitted.opt_hparams,
                accelerator=accelerator,
                verbose=verbose,
                run=make_null_run(),
                callbacks=add_defaults(
                    [TrainValid(), Metrics(measured), make_progress(verbose)], callbacks
                ),
            )
            with restore_model_after(ctx):
                loop.evaluate(ctx)
        return Evaluation(records=ctx.records)

    def _build_optimizers_for_names(self, model: nn.Module) -> object:
        """Build optimizers whose names are used; a placeholder if there are none."""
        has_own = self.optimizer is None and hasattr(model, "set_optimizers")
        if not has_own and not callable(self.optimizer):
            return torch.optim.SGD([nn.Parameter(torch.zeros(()))])
        return self.build_optimizers(model)

    @explain_calls
    def predict(
        self,
        fitted: Fitted,
        data: Data,
        *,
        callbacks: Iterable[Callback] = (),
        accelerator: Accelerator | None = None,
        verbose: bool | None = None,
        dataloader_options: Mapping[str, object] | None = None,
        stack: bool = True,
        mode: Mode = "eval",
        **arguments: object,
    ) -> Any:
        """Return the model's output for each row of `data`, in order, on the CPU.

        Parameters
        ----------
        fitted
            Result of ``fit``.
        data
            As in ``fit``; targets are ignored.
        callbacks, accelerator, verbose, dataloader_options
            As in ``evaluate``.
        stack
            Join the outputs of all batches; False returns a list with one item per batch.
            On several ranks these are the batches of each rank, in order of their rows.
        mode
            ``"train"`` keeps dropout on, to predict several times, for example. Modes and
            buffers, such as BatchNorm's statistics, are restored afterwards.
        **arguments
            For the model's own ``predict(input, **arguments)``.

        Returns
        -------
        tensor whose first dim is the rows of `data`, or its second one if the model returns
        them there; tuples and dicts of tensors if the model returns those; a list with one
        item per batch for anything else

        Raises
        ------
        TypeError, ValueError
            Before the first batch, if an argument is wrong, or the model's ``predict`` does
            not take it.

        References
        ----------
        luz 0.5.0, ``predict``.
        """
        check_call_arguments("predict", accelerator, verbose=verbose, fitted=fitted)
        check_predict(
            fitted.placement.module, stack=stack, mode=mode, arguments=arguments
        )
        accelerator = accelerator or pick_accelerator()
        accelerator.meet("predict")
        like = {**fitted.batch_options, **get_device_options(accelerator.device)}
        with fitted.placement.allocate(accelerator) as model:
            ctx = PredictContext(
                model=model,
                read_batch=self.batch,
                newdata=make_eval_loader(data, dataloader_options, "data", like),
                accelerator=accelerator,
                verbose=verbose,
                run=make_null_run(),
                callbacks=add_defaults(
                    [TrainValid(predict_mode=mode), make_progress(verbose)], callbacks
                ),
            )
            with restore_model_after(ctx), keep_buffers(ctx.model, mode):
                found = loop.predict(ctx, arguments)
        preds = [pred for pred, _ in found]
        return join(preds, [rows for _, rows in found]) if stack else preds


@explain_calls
def setup(
    module: Callable[..., nn.Module],
    *,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[..., Optimizer] | Literal["config"] | None = None,
    metrics: object = None,
    backward: Callable[[Tensor], object] | None = None,
    batch: ReadBatch | None = None,
    compile: bool | Mapping[str, object] = False,
) -> Learner:
    """Define how a model is trained.

    Parameters
    ----------
    module
        ``nn.Module`` class, or a function that returns a model.
    loss
        ``loss(pred, target)``, which returns a scalar; None: the model's own ``loss`` or
        ``step``.
    optimizer
        Optimizer class, or a function that returns an optimizer or several by name. It is
        called with ``(parameters, **opt_hparams)``; a function whose first parameter is
        called ``model`` gets the model. Options of a ``functools.partial`` become
        ``opt_hparams``. None: the model's own ``set_optimizers(**opt_hparams)``.
        ``"config"``: the optimizer in the config of a ``DeepSpeedAccelerator``.
    metrics
        torchmetrics objects or functions ``f(pred, target)``: one, a list, a dict by name,
        or a ``MetricSet``.
    backward
        Called with the loss instead of ``ctx.accelerator.backward(loss, ctx.opt_name)``,
        which it may call; on one device it may also call ``loss.backward()``.
    batch
        ``batch(loaded)`` returns ``(input, target, ...)`` of what a loader yields, on the device,
        in ``fit``, ``evaluate`` and ``predict``. None: a tuple or list is a pair, a mapping
        with ``labels`` has them as its target, anything else is the input alone.
    compile
        Compile the model's forward in fits by ``torch.compile``: True, or its options, such
        as ``{"mode": "reduce-overhead"}``. The fitted model is a plain one.

    Raises
    ------
    TypeError
        If an argument has the wrong type.
    ValueError
        If there is no loss or no optimizer.

    References
    ----------
    luz 0.5.0, ``setup``. Differs from luz: the class itself is not changed.
    """
    check_setup(module, loss, optimizer, backward, batch)
    check_compile(compile)
    opt_hparams: Mapping[str, object] = {}
    made_of: object = optimizer
    if isinstance(made_of, partial) and not made_of.args:
        optimizer, opt_hparams = made_of.func, made_of.keywords
    learner = Learner(
        module=module,
        loss=loss,
        optimizer=optimizer,
        metrics=as_metric_set(metrics),
        backward=backward,
        batch=batch,
        compile=compile,
        hparams={},
        opt_hparams=opt_hparams,
    )
    if isinstance(module, type):
        check_definition(module, loss, optimizer)
    return learner
