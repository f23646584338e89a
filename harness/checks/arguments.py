"""Checks of the arguments of setup, fit, evaluate and predict."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from harness.checks.calls import check_arguments, check_function, check_given
from harness.checks.model import get_method
from harness.checks.optimizers import check_optimizer
from harness.checks.values import check_count
from harness.events import nearest

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


def check_setup(
    module: object,
    loss: object,
    optimizer: object,
    backward: object = None,
    batch: object = None,
) -> None:
    """Check the arguments of ``setup`` that a model is built from."""
    if isinstance(module, nn.Module):
        name = type(module).__name__
        msg = f"setup(module): expected a class or factory, got an instance of {name}."
        raise TypeError(
            f"{msg} Pass {name} itself, and its arguments to set_hparams()."
        )
    if not callable(module):
        msg = f"setup(module): expected an nn.Module class or factory, got {module!r}."
        raise TypeError(f"{msg} Pass the class of your model.")
    check_optimizer(optimizer)
    if isinstance(loss, type):
        msg = f"setup(loss): expected an instance, got the class {loss.__name__}."
        raise TypeError(f"{msg} Write {loss.__name__}().")
    if loss is not None and not callable(loss):
        msg = f"setup(loss): expected a function or module, got {loss!r}."
        raise TypeError(f"{msg} Pass for example torch.nn.MSELoss().")
    check_function(
        "setup(backward)",
        backward,
        "loss",
        "Leave it out for the accelerator's backward.",
    )
    check_function("setup(batch)", batch, "batch", "It returns (input, target).")


@contextmanager
def explain_loader_errors(options: Mapping[str, object]) -> Iterator[None]:
    """Name the options of a ``DataLoader`` that torch refuses, in front of torch's reason."""
    try:
        yield
    except (TypeError, ValueError) as error:
        last = error.__traceback__
        while last is not None and last.tb_next is not None:
            last = last.tb_next
        assert last is not None
        if not last.tb_frame.f_globals["__name__"].startswith("torch.utils.data"):
            raise  # of the user's data set or sampler
        given = ", ".join(f"{name}={value!r:.50}" for name, value in options.items())
        msg = "dataloader_options: expected options that DataLoader takes together"
        raise type(error)(f"{msg}, got {given}: {error} Change them.") from error


def check_start(start: object, strict: object) -> None:
    """Check ``fit(start=..., strict=...)``."""
    has_weights = hasattr(start, "placement") or isinstance(
        start, nn.Module | Mapping | str | os.PathLike
    )
    if start is not None and (not has_weights or isinstance(start, type)):
        msg = f"fit(start): expected weights to start from, got {start!r:.100}."
        raise TypeError(f"{msg} Pass a result of fit, a model, a state dict or a path.")
    if strict is not None and not isinstance(strict, bool):
        msg = f"fit(strict): expected True, False or None, got {strict!r}."
        raise TypeError(f"{msg} True refuses weights that do not all fit.")
    if start is None and strict is not None:
        msg = f"fit(strict): expected start=... with it, got strict={strict!r} alone."
        raise ValueError(f"{msg} Pass what the fit starts from.")


def check_gather(gather: object) -> None:
    """Check ``fit(gather=...)``."""
    if not isinstance(gather, bool):
        advice = "True gathers a model of any size, False none."
        check_count("fit(gather)", gather, 0, advice)


def check_predict(
    model: nn.Module, *, stack: object, mode: object, arguments: Mapping[str, object]
) -> None:
    """Check what ``predict`` alone takes."""
    if not isinstance(stack, bool):
        msg = f"predict(stack): expected True or False, got {stack!r}."
        raise TypeError(f"{msg} False returns a list with one item a batch.")
    if mode not in ("eval", "train"):
        msg = f"predict(mode): expected 'eval' or 'train', got {mode!r}."
        raise ValueError(f"{msg} 'train' keeps dropout on.")
    own = get_method(model, "predict")
    if own is None and arguments:
        near = nearest(next(iter(arguments)), _PREDICT_OPTIONS)
        msg = f"predict: expected options of predict, got {list(arguments)}.{near}"
        advice = f"define {type(model).__name__}.predict(self, input, **arguments)."
        raise TypeError(f"{msg} It takes {', '.join(_PREDICT_OPTIONS)}; or {advice}")
    if own is not None:
        check_arguments("predict", own, arguments)
        advice = "Pass them to predict: {}."
        check_given(f"{type(model).__name__}.predict", own, arguments, advice, 1)


_PREDICT_OPTIONS = (
    "callbacks",
    "accelerator",
    "verbose",
    "dataloader_options",
    "stack",
    "mode",
)


def check_call_arguments(
    place: str,
    accelerator: object,
    *,
    seed: object = None,
    verbose: object = None,
    fitted: object = True,
) -> None:
    """Check arguments that ``fit``, ``evaluate`` and ``predict`` have in common."""
    has_parts = hasattr(accelerator, "prepare") and not isinstance(accelerator, type)
    if accelerator is not None and not has_parts:
        msg = f"{place}(accelerator): expected an accelerator, got {accelerator!r}."
        raise TypeError(f"{msg} Pass harness.accelerator(...), or leave it out.")
    if place == "fit" and torch.is_inference_mode_enabled():
        msg = "fit: expected gradients to be on, got a call in torch.inference_mode()."
        raise RuntimeError(f"{msg} Call it outside of that.")
    if place == "fit" and any(map(torch.is_autocast_enabled, _AUTOCAST)):
        # torch 2.13: inside one autocast, casts of weights are kept when the weights change.
        msg = "fit: expected autocast to be off, got a call in torch.autocast."
        advice = "Pass accelerator=harness.accelerator(precision='bf16') instead."
        raise RuntimeError(f"{msg} {advice}")
    if seed is not None:
        check_count(f"{place}(seed)", seed, -(2**63), "Leave it out for no seed.")
    if verbose is not None and not isinstance(verbose, int | np.bool_):
        msg = f"{place}(verbose): expected True, False or None, got {verbose!r:.100}."
        raise TypeError(f"{msg} None shows progress in a terminal or notebook.")
    if fitted is not True and not hasattr(fitted, "learner"):
        msg = f"{place}(fitted): expected the result of fit, got {fitted!r:.100}."
        raise TypeError(f"{msg} Pass what fit or harness.load returned.")


_AUTOCAST = ("cpu", "cuda", "mps")


def check_accelerator(accelerator: Accelerator | None, place: str) -> Accelerator:
    """Return the accelerator of a context.

    Raises
    ------
    AttributeError
        If there is none.
    """
    if accelerator is None:
        msg = f"{place}: expected an accelerator, got None. Set ctx.accelerator."
        raise AttributeError(msg)
    return accelerator
