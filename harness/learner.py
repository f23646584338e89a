"""``setup`` makes a ``Learner``; a learner fits, evaluates and predicts."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from harness import loop
from harness.accelerators.base import Accelerator
from harness.accelerators.select import accelerator as pick_accelerator
from harness.callback import Callback
from harness.callbacks import Interrupt, Metrics, Profile, Progress, TrainValid
from harness.callbacks.resuming import resume_of
from harness.checkpoint.saved_model import import_module_class, read_saved
from harness.checkpoint.weights import put_weights
from harness.checkpoint.writer import about_fit
from harness.context import (
    Context,
    EvaluateContext,
    FitContext,
    PredictContext,
    bind_context,
)
from harness.data.loaders import eval_loader, split_data, train_loader
from harness.errors import CheckpointError
from harness.fitted import Evaluation, Fitted
from harness.metrics.sets import MetricSet, as_metric_set
from harness.run_binding import Unrecorded, code_commit, describe_fit, tracked
from harness.setup_checks import as_pair, check_callbacks, check_epochs

if TYPE_CHECKING:
    import tracking

Data = Any
"""DataLoader, Dataset, tensor, array, or a tuple or list of those with equal lengths."""


@dataclass(frozen=True, kw_only=True)
class Learner:
    """Everything that defines a training but the data. Made by ``setup``; never changes.

    Attributes
    ----------
    module
        ``nn.Module`` class or factory, called with ``**hparams``.
    loss, optimizer, metrics, backward
        As given to ``setup``.
    hparams, opt_hparams : dict
        Keyword arguments for module and optimizer.
    """

    module: Callable[..., nn.Module]
    loss: Callable[..., Tensor] | None = None
    optimizer: Callable[..., Optimizer] | Literal["config"] | None = None
    metrics: MetricSet = field(default_factory=MetricSet)
    backward: Callable[[Tensor], object] | None = None
    hparams: Mapping[str, Any]
    opt_hparams: Mapping[str, Any]

    def __post_init__(self) -> None:
        """Guard what is shared by learners made of one another."""
        for name in ("hparams", "opt_hparams"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def set_hparams(self, **hparams: Any) -> Learner:
        """A learner whose model is built with these keyword arguments, added to earlier ones."""
        return replace(self, hparams={**self.hparams, **hparams})

    def set_opt_hparams(self, **opt_hparams: Any) -> Learner:
        """A learner whose optimizers are built with these, added to earlier ones."""
        return replace(self, opt_hparams={**self.opt_hparams, **opt_hparams})

    def build_model(self) -> nn.Module:
        """A fresh model.

        Raises
        ------
        TypeError
            If `module` gives no ``nn.Module``.
        """
        model = self.module(**self.hparams)
        if not isinstance(model, nn.Module):
            msg = f"setup(module): expected an nn.Module from it, got {model!r}."
            raise TypeError(f"{msg} Give the class or a function that returns a model.")
        check_whole(model, self)
        return model

    def build_optimizers(self, model: nn.Module) -> Any:
        """Optimizers of a model: from ``setup(optimizer=...)``, else the model's own.

        None if the accelerator makes them by its config.
        """
        own = getattr(model, "set_optimizers", None)
        if self.optimizer == "config":
            return None
        if self.optimizer is not None:
            return self.optimizer(model.parameters(), **self.opt_hparams)
        assert own is not None
        return own(**self.opt_hparams)

    def loss_fn_of(
        self, model: nn.Module, device: torch.device
    ) -> Callable[..., Tensor] | None:
        """The loss in force, on the device: from ``setup(loss=...)``, else the model's own."""
        loss: Any = self.loss if self.loss is not None else getattr(model, "loss", None)
        return loss.to(device) if isinstance(loss, nn.Module) else loss

    def fit(
        self,
        data: Data,
        epochs: int | tuple[int, int] = 10,
        valid_data: Data | float | None = None,
        *,
        callbacks: Iterable[Callback] = (),
        accelerator: Accelerator | None = None,
        verbose: bool | None = None,
        dataloader_options: Mapping[str, Any] | None = None,
        seed: int | None = None,
        tracker: tracking.Run | Mapping[str, Any] | bool | None = None,
    ) -> Fitted:
        """Train a fresh model.

        Parameters
        ----------
        data
            DataLoader, Dataset, tensor, array, or several of equal length; batches are
            ``(input, target)``. Batches of 32, shuffled, a short last one dropped.
        epochs : >= 1
            Number, or pair ``(min_epochs, max_epochs)``.
        valid_data
            Share of `data` in (0, 1), data in one of the same forms, or None.
        callbacks
            Instances of ``harness.Callback``, beside the default ones.
        accelerator
            None: one device, or DeepSpeed where several ranks were launched.
        verbose
            Show progress; None: when a person watches.
        dataloader_options
            Arguments of torch's ``DataLoader``.
        seed
            Seeds Python's, NumPy's and torch's generators first; None leaves them.
        tracker
            None: a new run in ``./runs`` and in MLflow's own default. A dict: the same with
            these arguments of ``tracking.start``. False: none. A ``tracking.Run``: that
            one; it is left open.

        Returns
        -------
        Fitted

        Raises
        ------
        TypeError, ValueError
            Before any epoch runs, if an argument is wrong.

        References
        ----------
        luz 0.5.0, ``fit``.
        """
        check_epochs(*as_pair(epochs))
        own = check_callbacks(callbacks)
        if seed is not None:
            seed_all(seed)
        if isinstance(valid_data, float | int) and not isinstance(valid_data, bool):
            data, valid_data = split_data(data, valid_data)
        train = train_loader(data, dataloader_options)
        valid = None
        if valid_data is not None:
            valid = eval_loader(valid_data, dataloader_options)
        accelerator = accelerator or pick_accelerator()
        resume = resume_of(own)
        has_one = getattr(accelerator, "has_optimizer", False)
        if self.optimizer == "config" and not has_one:
            msg = "fit: expected an optimizer in the accelerator's config, got none."
            raise ValueError(
                f"{msg} Give DeepSpeedAccelerator a config with one, or setup(optimizer=...)"
                " a class."
            )
        model = self.build_model()
        if resume is not None and resume.is_weights_only:
            put_weights(model, resume.place)
        defaults = [
            Profile(),
            TrainValid(),
            Metrics(self.metrics),
            Progress(),
            Interrupt(),
        ]
        ctx = FitContext(
            model=model,
            optimizers=self.build_optimizers(model),
            loss_fn=self.loss_fn_of(model, accelerator.device),
            hparams=self.hparams,
            opt_hparams=self.opt_hparams,
            data=train,
            valid_data=valid,
            epochs=epochs,
            accelerator=accelerator,
            verbose=verbose,
            callbacks=[*defaults, *own],
        )
        ctx.backward = self._backward_of(ctx)
        ctx.about = {**about_fit(ctx), "code": code_commit()}
        try:
            if resume is not None and not resume.is_weights_only:
                resume.check(ctx)
                ctx.resume = resume
            with tracked(ctx, tracker) as run:
                if run is not None and not (resume and resume.goes_on_with(run)):
                    describe_fit(run, ctx, self, seed)
                loop.fit(ctx)
            fitted = self._fitted(ctx, run)
        except BaseException:
            accelerator.finish(failed=True)
            raise
        call_after_fit(ctx)
        ctx.clean()
        bind_context(fitted.model, None)
        return fitted

    def _backward_of(self, ctx: Context) -> Callable[[Tensor], object]:
        """How a loss goes back: the user's way, else the accelerator's."""
        own = self.backward or getattr(ctx.model, "backward", None)
        accelerator = ctx.accelerator
        assert accelerator is not None
        if own is None:
            return lambda loss: accelerator.backward(loss, ctx.opt_name)

        def backward(loss: Tensor) -> None:
            with accelerator.counting(ctx.opt_name):
                own(loss)

        return backward

    def _fitted(self, ctx: FitContext, run: tracking.Run | None) -> Fitted:
        """Gather the weights and build the result, with the model on the CPU."""
        accelerator = ctx.accelerator
        assert accelerator is not None
        weights = accelerator.whole_state_dict(ctx.model)
        accelerator.finish()
        return Fitted(
            model=plain_model(ctx.model, weights),
            records=ctx.records,
            learner=self,
            hparams=ctx.hparams,
            opt_hparams=ctx.opt_hparams,
            run_id=run.id if run is not None else None,
            run_path=run.path if run is not None else None,
            signum=ctx.stop_signal,
        )

    def evaluate(
        self,
        fitted: Fitted,
        data: Data,
        *,
        metrics: Any = None,
        callbacks: Iterable[Callback] = (),
        accelerator: Accelerator | None = None,
        verbose: bool | None = None,
        dataloader_options: Mapping[str, Any] | None = None,
    ) -> Evaluation:
        """Losses and metrics of a trained model on new data.

        Parameters
        ----------
        fitted
            What ``fit`` gave.
        data
            As in ``fit``; in order, the short last batch included.
        metrics
            Other metrics than the learner's; None: the learner's for validation.
        callbacks, accelerator, verbose, dataloader_options
            As in ``fit``.

        Returns
        -------
        Evaluation

        References
        ----------
        luz 0.5.0, ``evaluate``.
        """
        check_loss(f"evaluate({type(fitted.model).__name__})", fitted.model, self)
        accelerator = accelerator or pick_accelerator()
        measured = self.metrics if metrics is None else as_metric_set(metrics)
        ctx = EvaluateContext(
            model=fitted.model,
            newdata=eval_loader(data, dataloader_options, "data"),
            optimizers=self._named_optimizers(fitted.model),
            loss_fn=self.loss_fn_of(fitted.model, accelerator.device),
            opt_hparams=fitted.opt_hparams,
            accelerator=accelerator,
            verbose=verbose,
            recorder=Unrecorded(),
            callbacks=[TrainValid(), Metrics(measured), *check_callbacks(callbacks)],
        )
        with lent_model(ctx):
            loop.evaluate(ctx)
        return Evaluation(records=ctx.records)

    def _named_optimizers(self, model: nn.Module) -> Any:
        """Optimizers for their names alone; a stand-in where there are none."""
        has_own = self.optimizer is None and hasattr(model, "set_optimizers")
        if not has_own and not callable(self.optimizer):
            return torch.optim.SGD([nn.Parameter(torch.zeros(()))])
        return self.build_optimizers(model)

    def predict(
        self,
        fitted: Fitted,
        data: Data,
        *,
        callbacks: Iterable[Callback] = (),
        accelerator: Accelerator | None = None,
        verbose: bool | None = None,
        dataloader_options: Mapping[str, Any] | None = None,
    ) -> Any:
        """The model's output for each row of `data`, in order, on the CPU.

        Parameters
        ----------
        fitted
            What ``fit`` gave.
        data
            As in ``fit``; targets are ignored.
        callbacks, accelerator, verbose, dataloader_options
            As in ``fit``.

        Returns
        -------
        tensor, first dim the rows of `data`; tuples and dicts of tensors where the model
        gives those; a list by batch for anything else

        References
        ----------
        luz 0.5.0, ``predict``.
        """
        accelerator = accelerator or pick_accelerator()
        ctx = PredictContext(
            model=fitted.model,
            newdata=eval_loader(data, dataloader_options, "data"),
            accelerator=accelerator,
            verbose=verbose,
            recorder=Unrecorded(),
            callbacks=[TrainValid(), *check_callbacks(callbacks)],
        )
        with lent_model(ctx):
            return joined(loop.predict(ctx))


def setup(
    module: Callable[..., nn.Module],
    *,
    loss: Callable[..., Tensor] | None = None,
    optimizer: Callable[..., Optimizer] | Literal["config"] | None = None,
    metrics: Any = None,
    backward: Callable[[Tensor], object] | None = None,
) -> Learner:
    """Say how a model is trained.

    Parameters
    ----------
    module
        ``nn.Module`` class, or a function that returns a model.
    loss
        ``loss(pred, target)``, a scalar; None: the model's own ``loss`` or ``step``.
    optimizer
        Optimizer class, called with ``(parameters, **opt_hparams)``; None: the model's own
        ``set_optimizers(**opt_hparams)``, which may return several by name; ``"config"``:
        the one in the config of a ``DeepSpeedAccelerator``.
    metrics
        torchmetrics objects or functions ``f(pred, target)``: one, a list, a dict by name,
        or a ``MetricSet``.
    backward
        Called with the loss in place of ``ctx.accelerator.backward(loss, ctx.opt_name)``,
        which it may call; on one device ``loss.backward()`` serves as well.

    Returns
    -------
    Learner

    Raises
    ------
    TypeError
        If something has the wrong kind.
    ValueError
        If there is no loss or no optimizer.

    References
    ----------
    luz 0.5.0, ``setup``. Differs from luz: the class itself is left unchanged.
    """
    if isinstance(module, nn.Module):
        name = type(module).__name__
        msg = f"setup(module): expected a class or factory, got an instance of {name}."
        raise TypeError(f"{msg} Give {name} itself; arguments go to set_hparams().")
    if not callable(module):
        msg = f"setup(module): expected an nn.Module class or factory, got {module!r}."
        raise TypeError(f"{msg} Give the class of your model.")
    if isinstance(optimizer, Optimizer):
        name = type(optimizer).__name__
        msg = f"setup(optimizer): expected a class, got an instance of {name}."
        raise TypeError(f"{msg} Give torch.optim.{name}; set_opt_hparams() sets lr.")
    if optimizer is not None and optimizer != "config" and not callable(optimizer):
        msg = f"setup(optimizer): expected a class or 'config', got {optimizer!r}."
        raise TypeError(f"{msg} Give torch.optim.AdamW, say.")
    if isinstance(loss, type):
        msg = f"setup(loss): expected an instance, got the class {loss.__name__}."
        raise TypeError(f"{msg} Write {loss.__name__}().")
    learner = Learner(
        module=module,
        loss=loss,
        optimizer=optimizer,
        metrics=as_metric_set(metrics),
        backward=backward,
        hparams={},
        opt_hparams={},
    )
    if isinstance(module, type):
        check_whole(module, learner)
    return learner


def check_whole(model: Any, learner: Learner) -> None:
    """Raise if neither the learner nor the model says how to compare or how to step."""
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    check_loss(f"setup({name})", model, learner)
    if learner.optimizer is None and not hasattr(model, "set_optimizers"):
        msg = f"setup({name}): expected an optimizer, got none."
        raise ValueError(
            f"{msg} Give optimizer=..., or define {name}.set_optimizers()."
        )


def check_loss(place: str, model: Any, learner: Learner) -> None:
    """Raise if neither the learner nor the model says how to compare."""
    name = model.__name__ if isinstance(model, type) else type(model).__name__
    own = hasattr(model, "loss") or hasattr(model, "step")
    if learner.loss is None and not own:
        msg = f"{place}: expected a loss, got none, and {name} has no loss or step."
        advice = f"Give setup(loss=...), or define {name}.loss(pred, target)."
        raise ValueError(f"{msg} {advice}")


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators, on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def lent_model(ctx: Context) -> Iterator[None]:
    """Give the model back as it was, off the context and on the CPU, however it ends."""
    failed = True
    try:
        yield
        failed = False
    finally:
        assert ctx.accelerator is not None
        ctx.accelerator.finish(failed=failed)
        ctx.clean()
        ctx.state_dict()["model"].cpu()


def call_after_fit(ctx: Context) -> None:
    """Call ``after_fit`` of every callback once every rank has its result.

    A failure becomes a warning, because it must not keep the result from the caller.
    """
    assert ctx.accelerator is not None
    try:
        ctx.accelerator.barrier()
        for callback in ctx.callbacks:
            callback.after_fit()
    except Exception as error:  # noqa: BLE001  any failure, the result is complete
        msg = f"fit: expected after_fit to succeed, got {error!r}. The result is complete."
        warnings.warn(msg, stacklevel=3)


def plain_model(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """The model on the CPU with whole weights, in evaluation mode."""
    model.cpu()
    if weights:
        model.load_state_dict(weights)
    return model.eval()


def joined(parts: Sequence[Any]) -> Any:
    """Outputs of batches as one, in the same form, on the CPU."""
    first = parts[0] if parts else None
    if isinstance(first, Tensor) and first.dim():
        return torch.cat([part.cpu() for part in parts])
    if isinstance(first, Mapping):
        return {name: joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        items = [joined(items) for items in zip(*parts, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else tuple(items)
    return list(parts)


def load(path: str | Path, module: Callable[..., nn.Module] | None = None) -> Fitted:
    """A fitted model that ``Fitted.save`` wrote, on the CPU.

    Parameters
    ----------
    path
        The folder.
    module
        Model class or factory; None: the importable one that was saved.

    Returns
    -------
    Fitted
        It predicts, and evaluates if the model has a loss of its own; for another loss or
        metrics use ``Learner.evaluate`` of a learner from ``setup``.

    Raises
    ------
    CheckpointError
        If the folder is missing, torn or of another format, or the class cannot be
        imported or does not fit the weights.
    """
    path = Path(path)
    weights, about = read_saved(path)
    module = module or import_module_class(path, str(about["module"]))
    learner = Learner(
        module=module, hparams=about["hparams"], opt_hparams=about["opt_hparams"]
    )
    try:
        model = module(**learner.hparams)
        model.load_state_dict(weights)
    except (RuntimeError, TypeError) as exc:
        msg = f"load({str(path)!r}): expected weights that fit {module!r}, got: {exc}."
        raise CheckpointError(f"{msg} Give the right class as module=.") from exc
    return Fitted(
        model=model.eval(),
        records=about["records"],
        learner=learner,
        hparams=learner.hparams,
        opt_hparams=learner.opt_hparams,
        run_id=about.get("run_id"),
    )
