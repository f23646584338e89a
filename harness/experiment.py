"""An experiment: a learner with its data, loaded by file and name, built from settings."""

from __future__ import annotations

import ast
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from harness.accelerators.base import Accelerator
from harness.callback import Callback
from harness.data.loaders import Data
from harness.data.pace import Limit
from harness.errors import ExperimentError, unknown_parameter
from harness.fitted import Fitted
from harness.learner import Learner, Start
from harness.run_binding import Tracker


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What ``harness fit`` trains.

    Attributes
    ----------
    learner
        From ``harness.setup``.
    data, valid_data, epochs, max_steps, valid_every, limit_batches
        As in ``Learner.fit``.
    callbacks, seed, dataloader_options, accelerator, start
        As in ``Learner.fit``.
    test_data
        Data for ``harness evaluate``; None: `valid_data`.
    name
        Name of the run.
    mlflow_experiment
        MLflow experiment of the run.
    """

    learner: Learner
    data: Data
    valid_data: Data = None
    test_data: Data = None
    epochs: int | tuple[int, int] | None = None
    max_steps: int | None = None
    valid_every: int | str | None = None
    limit_batches: Limit = None
    callbacks: Iterable[Callback] = ()
    name: str | None = None
    mlflow_experiment: str | None = None
    seed: int | None = None
    dataloader_options: Mapping[str, object] | None = None
    accelerator: Accelerator | None = None
    start: Start = None

    def __post_init__(self) -> None:
        """Refuse anything but a learner here, before the command line uses it."""
        if not isinstance(self.learner, Learner):
            msg = f"Experiment(learner): expected a Learner, got {self.learner!r}."
            raise TypeError(f"{msg} Create one with harness.setup().")

    def set_opt_hparams(self, **opt_hparams: object) -> Experiment:
        """Return an experiment with more keyword arguments for its optimizers."""
        return replace(self, learner=self.learner.set_opt_hparams(**opt_hparams))

    def fit(self, *, verbose: bool | None = None, tracker: Tracker = None) -> Fitted:
        """Train; `verbose` and `tracker` as in ``Learner.fit``."""
        if tracker is None or isinstance(tracker, Mapping):
            own = {"name": self.name, "experiment": self.mlflow_experiment}
            tracker = own | dict(tracker or {})
        return self.learner.fit(
            self.data,
            self.epochs,
            self.valid_data,
            max_steps=self.max_steps,
            valid_every=self.valid_every,
            limit_batches=self.limit_batches,
            callbacks=self.callbacks,
            accelerator=self.accelerator,
            verbose=verbose,
            dataloader_options=self.dataloader_options,
            seed=self.seed,
            tracker=tracker,
            start=self.start,
        )


def build_experiment(
    target: object,
    settings: Mapping[str, object],
    places: Mapping[str, str] = types.MappingProxyType({}),
) -> Experiment:
    """Return the experiment that `target` is or returns.

    Parameters
    ----------
    target
        ``Experiment``, or function that returns one.
    settings
        Arguments of the function by name; text is converted by its annotations.
    places
        Where settings come from, for messages, if that is not ``--set``.
    """
    arguments = check_target(target, settings, places)
    if isinstance(target, Experiment):
        return target
    assert callable(target)
    made = target(**arguments)
    if not isinstance(made, Experiment):
        name = getattr(target, "__name__", "it")
        given = " ".join(repr(made).split())  # that of a model has lines
        msg = f"{name}(): expected it to return a harness.Experiment, got {given:.100}."
        raise ExperimentError(
            f"{msg} Return harness.Experiment(learner=..., data=...)."
        )
    return made


def check_target(
    target: object,
    settings: Mapping[str, object],
    places: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, object]:
    """Check what ``build_experiment`` is given, without a call; returns the arguments."""
    if isinstance(target, Experiment):
        if settings:
            first = next(iter(settings))
            place = places.get(first, f"--set {first}")
            msg = f"{place}: expected a function, got an Experiment."
            raise ExperimentError(f"{msg} Return it from a function with parameters.")
        return {}
    if not callable(target):
        msg = f"harness fit: expected an Experiment or a function, got {target!r}."
        raise ExperimentError(
            f"{msg} NAME must be a function that returns an Experiment."
        )
    return parse_arguments(target, settings, places)


def parse_arguments(
    function: Callable[..., object],
    settings: Mapping[str, object],
    places: Mapping[str, str] = types.MappingProxyType({}),
) -> dict[str, object]:
    """Convert settings to arguments of a function, by its signature."""
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    name = getattr(function, "__name__", "experiment")
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found: dict[str, object] = {}
    for key, value in settings.items():
        place = places.get(key, f"--set {key}")
        if key not in parameters and not takes_any:
            raise unknown_parameter(place, name, key, parameters)
        found[key] = parse_value(place, value, hints.get(key))
    for key, parameter in parameters.items():
        is_variadic = parameter.kind in {
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        }
        if (
            parameter.default is parameter.empty
            and key not in found
            and not is_variadic
        ):
            msg = f"{name}(): expected a value for {key!r}, got none."
            raise ExperimentError(f"{msg} Add --set {key}=VALUE.")
    return found


def parse_value(place: str, value: object, hint: object) -> object:
    """Convert the text of a setting by an annotation, or as a Python literal without one."""
    if not isinstance(value, str):
        return value
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    is_union = typing.get_origin(hint) in {typing.Union, types.UnionType}
    if is_union and value.lower() == "none" and len(kinds) < len(typing.get_args(hint)):
        return None
    kind = kinds[0] if is_union and len(kinds) == 1 else hint
    if kind is str:
        return value
    if kind is bool:
        return _parse_bool(place, value)
    if kind is int or kind is float:
        try:
            return int(value) if kind is int else float(value)
        except ValueError:
            msg = f"{place}: expected {kind.__name__}, got {value!r}."
            raise ExperimentError(f"{msg} Write for example 1.") from None
    return parse_literal(value)


def _parse_bool(place: str, text: str) -> bool:
    if text.lower() in {"true", "yes", "1"}:
        return True
    if text.lower() in {"false", "no", "0"}:
        return False
    msg = f"{place}: expected true or false, got {text!r}."
    raise ExperimentError(f"{msg} Write true or false.")


def parse_literal(text: str) -> object:
    """Return the value of a Python literal, or the text if it is not one."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
