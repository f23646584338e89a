"""Checks of calls: arguments that a function does not take, or still needs."""

from __future__ import annotations

import contextlib
import difflib
import functools
import inspect
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, TypeVar

import torch
from torch import nn

from harness.events import nearest

P = ParamSpec("P")
R = TypeVar("R")

_OWN_FILES = tuple(
    f"{Path(__file__).parents[2] / package}/" for package in ("harness", "tracking")
)

_BETWEEN = (
    contextlib.__file__,
    *(
        f"{Path(torch.__file__).parents[1] / name}/"
        for name in ("torch", "torchmetrics")
    ),
)
"""Files of others that this package calls, and that call it."""


def explain_calls(function: Callable[P, R]) -> Callable[P, R]:
    """Make the errors of a public function short to read.

    An error that is explained by its message (``<place>: expected <what>``) ends in the line
    of the user that led to it, without the frames of this package below that line. A call
    with arguments that the function does not take gets a note of what it takes instead.
    All frames stay if the environment variable ``HARNESS_DEBUG`` is set.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        __tracebackhide__ = True  # in notebooks and in pytest
        try:
            return function(*args, **kwargs)
        except Exception as error:
            below = error.__traceback__.tb_next if error.__traceback__ else None
            if below is None and isinstance(error, TypeError):
                hint = _hint_arguments(function, str(error))
                if hint:
                    error.add_note(f"hint: {hint}")
            elif ": expected " in str(error) and not is_debugged():
                _cut_own_frames(error.__traceback__)
            raise

    return call


def is_debugged() -> bool:
    """Whether errors keep all of their frames, for a report of a bug."""
    return os.environ.get("HARNESS_DEBUG", "0") != "0"  # noqa: TID251


def warn_user(message: str) -> None:
    """Warn at the line of the user that called this package."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OWN_FILES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _cut_own_frames(frames: TracebackType | None) -> None:
    """Cut what follows the user's last frame, or else the first one, if an own frame ends it."""
    last, file = frames, ""
    while frames is not None:
        file = frames.tb_frame.f_code.co_filename
        if not file.startswith(_OWN_FILES + _BETWEEN):
            last = frames
        frames = frames.tb_next
    if last is not None and file.startswith(_OWN_FILES + _BETWEEN[:1]):
        last.tb_next = None


_OTHER_WAYS = {
    ("batch_size", "shuffle", "num_workers", "collate_fn", "drop_last"): (
        "dataloader_options={{{0!r}: ...}}"
    ),
    ("device", "precision", "accumulate"): ("accelerator=harness.accelerator({0}=...)"),
    ("val_data", "validation_data", "validation_split"): "valid_data=...",
    ("max_epochs", "num_epochs", "n_epochs"): "epochs=...",
    ("experiment", "name", "runs_dir"): "tracker={{{0!r}: ...}}",
    ("resume", "ckpt_path"): "callbacks=[ResumeFromCheckpoint(path)]",
    ("loss_fn", "criterion"): "loss=...",
    ("lr", "learning_rate"): "set_opt_hparams(lr=...)",
}
"""How to pass here what functions of other libraries take by these names."""


def _hint_arguments(function: Callable[..., object], text: str) -> str:
    """Return how to pass what a call of a function, which failed as `text` says, was given."""
    known = list(get_parameters(function) or {})
    if found := re.search(r"unexpected keyword argument '(\w+)'", text):
        ways = {
            name: way.format(name)
            for names, way in _OTHER_WAYS.items()
            for name in names
            if "set_" in way or way.partition("=")[0] in known
        }
        near = difflib.get_close_matches(found[1], [*known, *ways], 1)
        if near and near[0] in ways:
            return f"It is {ways[near[0]]} here."
        return nearest(found[1], known).strip()
    if "data" in known and re.search(
        r"positional arguments? but|multiple values", text
    ):
        return "Data is one argument: (input, target)."
    if text.endswith("missing 1 required positional argument: 'data'"):
        return (
            "The first argument is the result of fit. fitted.predict(data) is shorter."
        )
    if "positional argument" in text and "hparams" in known:
        return "Pass each by name, such as lr=0.1, or a dict as **options."
    return ""


def takes_model(build: Callable[..., object]) -> bool:
    """Whether the first parameter of a function that makes optimizers is called ``model``."""
    return next(iter(get_parameters(build) or {}), None) == "model"


def check_function(place: str, function: object, argument: str, advice: str) -> None:
    """Check that an option is a function of one argument, or None."""
    if function is None:
        return
    if not callable(function):
        msg = f"{place}: expected a function of the {argument}, got {function!r}."
        raise TypeError(f"{msg} {advice}")
    check_call(place, function, argument)


def check_arguments(
    place: str,
    function: Callable[..., object],
    names: Iterable[str],
    num_positional: int = 0,
) -> None:
    """Check that a function takes keyword arguments of these names.

    Parameters
    ----------
    num_positional
        How many arguments it is given before those.
    """
    known = get_parameters(function)
    if known is None or any(p.kind is p.VAR_KEYWORD for p in known.values()):
        return
    given = _list_positional(known)[:num_positional]
    choices = [
        name
        for name, p in known.items()
        if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY} and name not in given
    ]
    for name in map(str, names):
        if name not in choices:
            called = getattr(function, "__name__", type(function).__name__)
            msg = f"{place}: expected an argument of {called}, got {name!r}."
            raise TypeError(
                f"{msg}{nearest(name, choices)} It takes: {', '.join(choices)}."
            )


def check_numbers(
    place: str, function: Callable[..., object], options: Mapping[str, object]
) -> None:
    """Check that an option of one of torch's classes is no text or list where it is a number."""
    function = getattr(function, "func", function)  # of a partial
    known = get_parameters(function) or {}
    if not str(getattr(function, "__module__", "")).startswith("torch."):
        return
    for name, value in options.items():
        called = getattr(function, "__name__", "the class")
        if isinstance(value, float) and math.isnan(value):
            msg = f"{place}({name}): expected a number for {called}, got nan."
            raise ValueError(f"{msg} Check how it is computed.")
        if not isinstance(value, str | list | dict) or name not in known:
            continue
        default, kind = known[name].default, known[name].annotation
        is_number = isinstance(default, int | float) and not isinstance(default, bool)
        takes_list = not isinstance(value, str) and "list" in str(kind).lower()
        if (is_number and not takes_list) or kind in {int, float, "int", "float"}:
            msg = f"{place}({name}): expected a number for {called}"
            raise TypeError(f"{msg}, got {value!r:.100}. Pass a number.")


def check_given(
    place: str,
    function: Callable[..., object],
    names: Iterable[str],
    advice: str,
    num_positional: int = 0,
) -> None:
    """Check that a function is given all the arguments that it needs.

    Parameters
    ----------
    function
        Model, optimizer or scheduler class, or a function that returns one.
    names
        Names of the keyword arguments that it is given.
    advice
        How to give an argument, with ``{}`` for ``name=...``.
    num_positional
        How many arguments it is given before those.
    """
    parameters = get_parameters(function)
    if parameters is None:
        return
    called = getattr(function, "__name__", type(function).__name__)
    kinds = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    given = _list_positional(parameters)[:num_positional]
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    if len(given) < num_positional and not takes_any:
        msg = f"{place}: expected a function of {num_positional} argument"
        signature = f"{called}({', '.join(parameters)})"
        raise TypeError(f"{msg}, got {signature}. It is called with what it builds on.")
    missing = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and p.kind not in kinds and name not in {*given, *names}
    ]
    if missing:
        msg = f"{place}: expected values for {missing} of {called}, got none."
        ways = advice.format(", ".join(f"{name}=..." for name in missing))
        raise TypeError(f"{msg} {ways}")


def _list_positional(parameters: Mapping[str, inspect.Parameter]) -> list[str]:
    """Names of the parameters that can be given by position."""
    kinds = {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}
    return [name for name, p in parameters.items() if p.kind in kinds]


def check_call(
    place: str, function: object, *arguments: str, is_partial: bool = False
) -> None:
    """Check that a function can be called with so many positional arguments.

    With `is_partial`, others may be needed beside them.
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        signature = inspect.signature(called)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return  # written in C
    try:
        (signature.bind_partial if is_partial else signature.bind)(*arguments)
    except TypeError as error:
        name = getattr(function, "__name__", type(function).__name__)
        given, takes = ", ".join(arguments), ", ".join(signature.parameters)
        msg = f"{place}: expected a function that can be called as f({given})"
        raise TypeError(f"{msg}, got {name}({takes:.100}): {error}.") from None


def count_needed(function: object) -> int:
    """How many positional arguments a loss must be given, at least two."""
    called = function.forward if isinstance(function, nn.Module) else function
    parameters = get_parameters(called) or {}  # one written in C tells none
    named = [parameters[name] for name in _list_positional(parameters)]
    return max(2, sum(p.default is p.empty for p in named))


def get_parameters(function: object) -> Mapping[str, inspect.Parameter] | None:
    """Parameters of a function without ``self``; None if Python cannot tell them."""
    try:
        return inspect.signature(function).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
