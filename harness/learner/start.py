"""What a fit begins with: its model, new or with weights of another, its data and callbacks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor, nn

from harness.accelerators.base import Accelerator
from harness.callback import Callback
from harness.callbacks import Interrupt, Metrics, Profile, Progress, TrainValid
from harness.checkpoint.resume import Resume
from harness.checkpoint.start_weights import Weights, load_start
from harness.checkpoint.weights import WeightsReport, get_tensors
from harness.checks.arguments import check_start
from harness.checks.callbacks import check_callbacks
from harness.checks.calls import warn_user
from harness.checks.model import check_definition
from harness.data.loaders import (
    Data,
    Loader,
    get_device_options,
    make_eval_loader,
    make_train_loader,
    split_data,
    without_order,
)
from harness.data.valid_sets import name_sets
from harness.fitted import Fitted
from harness.metrics.sets import MetricSet
from harness.model_copy import copy_model

if TYPE_CHECKING:
    from harness.learner.learner import Learner

Start = Fitted | nn.Module | Mapping[str, object] | str | Path | None
"""What a fit may start from: a result, a model, a state dict, or the path of weights."""


@dataclass(frozen=True, kw_only=True)
class StartModel:
    """Model and loss at the beginning of a fit, and what became of start weights.

    Attributes
    ----------
    original
        What the user's factory has returned; the model itself, if it is no copy.
    """

    model: nn.Module
    original: nn.Module
    loss: Callable[..., Tensor] | None
    report: WeightsReport | None = None
    name: str = ""


def build_start(
    learner: Learner, start: Start, strict: bool | None, accelerator: Accelerator
) -> StartModel:
    """Build the model of a fit, with the weights that it starts from."""
    check_start(start, strict)
    if start is None:
        model, original = build_model(learner, accelerator)
        return StartModel(model=model, original=original, loss=learner.loss)
    name, loss = describe_start(start), learner.loss
    if isinstance(start, Fitted):
        loss = choose_loss(learner, start)
        if start.learner is learner:
            check_trainable(learner, start.placement.module)
            with start.placement.full_on_each_rank(accelerator) as trained:
                model = copy_model(trained)
            report = WeightsReport(loaded=tuple(get_tensors(model)))
            return StartModel(
                model=model, original=model, loss=loss, report=report, name=name
            )
    model, original = build_model(learner, accelerator)
    with open_start(start, accelerator) as weights:
        report = load_start(model, weights, accelerator, strict=bool(strict))
    if strict is None and not report.is_complete and accelerator.is_main:
        msg = f"fit(start={name}): expected weights of the whole model, got {report}."
        advice = "The rest of the model is new. Pass strict=False if that is right."
        warn_user(f"{msg} {advice}")
    return StartModel(
        model=model, original=original, loss=loss, report=report, name=name
    )


def build_model(
    learner: Learner, accelerator: Accelerator
) -> tuple[nn.Module, nn.Module]:
    """Build a new model, in the way that the accelerator wants it built.

    Returns
    -------
    As ``Learner._build_with_original``.
    """
    with accelerator.building():
        return learner._build_with_original()


def check_trainable(learner: Learner, model: nn.Module) -> None:
    """Check that a copy of a trained model, with all that the user changed, can be trained."""
    if learner.optimizer is None and not hasattr(model, "set_optimizers"):
        msg = "fit: expected an optimizer in the learner of this result, got none."
        advice = "Train with one that has it: learner.fit(data, start=fitted)."
        raise ValueError(f"{msg} {advice}")
    check_definition(model, learner.loss, learner.optimizer)


@contextmanager
def open_start(start: Fitted | Weights, accelerator: Accelerator) -> Iterator[Weights]:
    """Give the weights to start from inside, in memory if they are of a fit."""
    if isinstance(start, Fitted):
        with start.placement.full_on_each_rank(accelerator) as model:
            yield model
    else:
        yield start


def choose_loss(learner: Learner, fitted: Fitted) -> Callable[..., Tensor] | None:
    """Return the loss as the fit left it, if this learner has the same one."""
    is_same = learner.loss is fitted.learner.loss and fitted.loss is not None
    return fitted.loss if is_same else learner.loss


def describe_start(start: Start) -> str:
    """Name the weights that a fit starts from: run, class or path."""
    if isinstance(start, Fitted):
        return (
            f"run {start.run_id}"
            if start.run_id
            else type(start.placement.module).__name__
        )
    if isinstance(start, nn.Module):
        return type(start).__name__
    return f"{len(start)} tensors" if isinstance(start, Mapping) else repr(str(start))


# ------------------------------------------------------------------------- data


def is_fraction(valid_data: object) -> TypeGuard[float]:
    """Whether validation data are a share of the training data."""
    return isinstance(valid_data, float | int) and not isinstance(valid_data, bool)


def restore_split_state(resume: Resume | None, accelerator: Accelerator) -> Tensor:
    """Return torch's random state for a split; a resumed fit draws its split again."""
    if resume is not None and resume.is_exact:
        resume.restore_split_state(accelerator)
    return torch.get_rng_state()


def build_loaders(
    data: Data,
    valid_data: Data,
    options: Mapping[str, object] | None,
    accelerator: Accelerator,
) -> tuple[Loader, dict[str, Loader]]:
    """Return the loaders of training and validation data; a fraction splits `data`."""
    if is_fraction(valid_data):
        for name in {"sampler", "batch_sampler"} & set(options or {}):
            msg = f"dataloader_options({name}): expected validation data of their own"
            got = f"got valid_data={valid_data}, which renumbers the rows"
            raise ValueError(f"{msg}, {got}. Split the data yourself.")
        data, valid_data = split_data(data, valid_data)
    like = get_device_options(accelerator.device)
    train = make_train_loader(data, options, accelerator.world_size, like)
    sets, loaders = name_sets(valid_data, "valid_data", data), {}
    for name, own in sets.items():
        place = "valid_data" if own is valid_data else f"valid_data[{name!r}]"
        loaders[name] = make_eval_loader(own, without_order(options), place, like)
    return train, loaders


# -------------------------------------------------------------------- callbacks


def default_callbacks(metrics: MetricSet) -> list[Callback]:
    """Return the callbacks of every fit."""
    return [Profile(), TrainValid(), Metrics(metrics), Progress(), Interrupt()]


def make_progress(verbose: bool | None) -> Progress:
    """Make what shows an evaluation or prediction: a line only if asked for, or if it is long."""
    return Progress() if verbose else Progress(min_s=1.0)


def add_defaults(
    defaults: Iterable[Callback], given: Iterable[Callback]
) -> list[Callback]:
    """Return default callbacks and given ones; a given one replaces the default it derives from."""
    given = check_callbacks(given)
    kept = [
        default
        for default in defaults
        if not any(isinstance(callback, type(default)) for callback in given)
    ]
    return [*kept, *given]
