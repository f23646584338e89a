"""An experiment: a learner with its data, found by file and name, built from settings."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.accelerators.base import Accelerator
from harness.callback import Callback
from harness.errors import ExperimentError
from harness.events import nearest
from harness.fitted import Fitted
from harness.learner import Learner


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What ``harness fit`` trains.

    Attributes
    ----------
    learner
        From ``harness.setup``.
    data, valid_data, epochs, callbacks, seed, dataloader_options, accelerator
        As in ``Learner.fit``.
    test_data
        Data for ``harness evaluate``; None: `valid_data`.
    name, experiment
        Of the run, and of the MLflow experiment it belongs to.
    """

    learner: Learner
    data: Any
    valid_data: Any = None
    test_data: Any = None
    epochs: int | tuple[int, int] = 10
    callbacks: Iterable[Callback] = ()
    name: str | None = None
    experiment: str | None = None
    seed: int | None = None
    dataloader_options: Mapping[str, Any] | None = None
    accelerator: Accelerator | None = None

    def __post_init__(self) -> None:
        """Check what fit would only find later."""
        if not isinstance(self.learner, Learner):
            msg = f"Experiment(learner): expected a Learner, got {self.learner!r}."
            raise TypeError(f"{msg} Make one with harness.setup().")

    def set_opt_hparams(self, **opt_hparams: Any) -> Experiment:
        """The experiment with other keyword arguments for its optimizers."""
        return replace(self, learner=self.learner.set_opt_hparams(**opt_hparams))

    def fit(self, *, verbose: bool | None = None, tracker: Any = None) -> Fitted:
        """Train; `verbose` and `tracker` as in ``Learner.fit``."""
        if tracker is None or isinstance(tracker, Mapping):
            own = {"name": self.name, "experiment": self.experiment}
            tracker = own | dict(tracker or {})
        return self.learner.fit(
            self.data,
            self.epochs,
            self.valid_data,
            callbacks=self.callbacks,
            accelerator=self.accelerator,
            verbose=verbose,
            dataloader_options=self.dataloader_options,
            seed=self.seed,
            tracker=tracker,
        )


def find(target: str) -> Any:
    """The object that ``FILE.py:NAME`` or ``package.module:NAME`` names.

    Raises
    ------
    ExperimentError
        If the file, module or name does not exist; the nearest name is offered.
    """
    where, _, name = target.rpartition(":")
    if not where or not name:
        msg = f"harness fit: expected FILE.py:NAME or MODULE:NAME, got {target!r}."
        raise ExperimentError(f"{msg} NAME is an Experiment or a function giving one.")
    module = _from_file(Path(where)) if where.endswith(".py") else _from_name(where)
    if not hasattr(module, name):
        names = [key for key in vars(module) if not key.startswith("_")]
        msg = f"{where}: expected {name!r} in it, found no such name."
        raise ExperimentError(f"{msg}{nearest(name, names)}")
    return getattr(module, name)


def _from_file(path: Path) -> types.ModuleType:
    """The module in a file, imported under its own name from its own folder."""
    if not path.is_file():
        near = [str(item) for item in path.parent.glob("*.py")] if path.parent else []
        msg = f"harness fit: expected a Python file, found no {str(path)!r}."
        raise ExperimentError(f"{msg}{nearest(str(path), near)}")
    name = path.stem
    if name in sys.stdlib_module_names or hasattr(sys.modules.get(name), "__path__"):
        msg = f"harness fit: expected a file with a name of its own, got {path.name!r}."
        raise ExperimentError(f"{msg} It hides the module {name!r}: rename the file.")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_name(name: str) -> types.ModuleType:
    """The importable module, the working folder included."""
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as exc:
        if exc.name is None or not name.startswith(exc.name):
            raise
        msg = f"harness fit: expected an importable module, found no {name!r}."
        raise ExperimentError(f"{msg} A file needs its suffix: FILE.py:NAME.") from exc


def build(target: Any, settings: Mapping[str, Any]) -> Experiment:
    """The experiment that `target` is or returns.

    Parameters
    ----------
    target
        ``Experiment``, or function that returns one.
    settings
        Arguments of the function by name; text is read as its annotations say.

    Raises
    ------
    ExperimentError
        If a name is no parameter (the nearest is offered), a value does not fit, or what
        comes back is no ``Experiment``.
    """
    if isinstance(target, Experiment):
        if settings:
            msg = (
                f"--set {next(iter(settings))}: expected a function, got an Experiment."
            )
            raise ExperimentError(f"{msg} Return it from a function with parameters.")
        return target
    if not callable(target):
        msg = f"harness fit: expected an Experiment or a function, got {target!r}."
        raise ExperimentError(f"{msg} Name a function that returns an Experiment.")
    made = target(**arguments(target, settings))
    if not isinstance(made, Experiment):
        name = getattr(target, "__name__", "it")
        msg = f"{name}(): expected a harness.Experiment back, got {made!r}."
        raise ExperimentError(
            f"{msg} Return harness.Experiment(learner=..., data=...)."
        )
    return made


def arguments(
    function: Callable[..., Any], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The settings as arguments of the function, typed by its signature."""
    parameters = inspect.signature(function).parameters
    hints = typing.get_type_hints(function)
    name = getattr(function, "__name__", "experiment")
    open_end = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    found = {}
    for key, value in settings.items():
        if key not in parameters and not open_end:
            msg = f"--set {key}: expected a parameter of {name}(), got {key!r}."
            choices = ", ".join(parameters) or "none"
            raise ExperimentError(f"{msg}{nearest(key, parameters)} It has: {choices}.")
        found[key] = typed(key, value, hints.get(key, Any))
    for key, parameter in parameters.items():
        if parameter.default is parameter.empty and key not in found:
            if parameter.kind in {parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL}:
                continue
            msg = f"{name}(): expected a value for {key!r}, got none."
            raise ExperimentError(f"{msg} Give --set {key}=VALUE.")
    return found


def typed(key: str, value: Any, hint: Any) -> Any:
    """Text as the annotation says; without one, as a Python literal if it is one."""
    if not isinstance(value, str):
        return value
    kinds = [kind for kind in typing.get_args(hint) if kind is not types.NoneType]
    is_union = typing.get_origin(hint) in {typing.Union, types.UnionType}
    if is_union and value.lower() == "none" and len(kinds) < len(typing.get_args(hint)):
        return None
    kind = kinds[0] if is_union and len(kinds) == 1 else hint
    if kind is str:
        return value
    if kind is bool and value.lower() in {"true", "false", "yes", "no", "1", "0"}:
        return value.lower() in {"true", "yes", "1"}
    if kind in {int, float}:
        try:
            return kind(value)
        except ValueError:
            msg = f"--set {key}: expected {kind.__name__}, got {value!r}."
            raise ExperimentError(f"{msg} Write for example --set {key}=1.") from None
    if kind is bool:
        msg = f"--set {key}: expected true or false, got {value!r}."
        raise ExperimentError(f"{msg} Write --set {key}=true.")
    return literal(value)


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
