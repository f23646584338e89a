"""What is refused before training: optimizers that cannot work, ranks that differ."""

from __future__ import annotations

import hashlib
import inspect
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset

from harness.reshard.layout import ELEMENTWISE


def is_elementwise(opt: Any) -> bool:
    """True for torch's own optimizers that ZeRO may divide."""
    kind = type(opt)
    return kind.__name__ in ELEMENTWISE and kind is getattr(torch.optim, kind.__name__)


def check_optimizers(
    model: nn.Module,
    optimizers: Mapping[str, Any],
    config: Mapping[str, Any],
    stage: int,
) -> None:
    """Refuse optimizers that cannot work under DeepSpeed, before an engine is made.

    Raises
    ------
    ValueError
        If there are none, or two places name one, or two own the same parameter, or one
        needs a closure or cannot be divided, or a parameter of the model has no dims.
    """
    for name, param in model.named_parameters():
        if param.dim() == 0 and not hasattr(param, "ds_id"):
            msg = f"prepare: expected parameters with dims, got {name!r} of shape ()."
            advice = (
                "DeepSpeed 0.19.8 cannot send it to other ranks: give it shape (1,)."
            )
            raise ValueError(f"{msg} {advice}")
    if "optimizer" in config and optimizers:
        msg = f"prepare: expected one place for the optimizer, got {list(optimizers)}"
        advice = "Take it out of the config, or out of the learner."
        raise ValueError(f"{msg} in the learner and one in the config. {advice}")
    if "optimizer" not in config and not optimizers:
        msg = (
            "prepare: expected an optimizer in the learner or in the config, got none."
        )
        raise ValueError(f"{msg} Give one, or None for optimizers to evaluate only.")
    for name, opt in optimizers.items():
        if isinstance(opt, torch.optim.LBFGS):
            msg = f"prepare({name!r}): expected an optimizer without a closure, got LBFGS."
            raise ValueError(f"{msg} DeepSpeed cannot step it: train on one device.")
        if stage and not is_elementwise(opt) and not _is_allowed(config):
            kind = type(opt).__name__
            msg = f"prepare({name!r}): expected an optimizer that treats elements one by one"
            advice = 'If it does, set "zero_allow_untested_optimizer": true.'
            raise ValueError(f"{msg} at ZeRO {stage}, got {kind}. {advice}")
        if not any(
            p.requires_grad for group in opt.param_groups for p in group["params"]
        ):
            msg = f"prepare({name!r}): expected parameters to train, got frozen ones only."
            raise ValueError(f"{msg} Set requires_grad on some, or leave {name!r} out.")
    _check_ownership(model, optimizers)


def _is_allowed(config: Mapping[str, Any]) -> bool:
    """True if the user vouches for the optimizer."""
    return bool(config.get("zero_allow_untested_optimizer", False))


def _check_ownership(model: nn.Module, optimizers: Mapping[str, Any]) -> None:
    """Each parameter belongs to one optimizer, and to the model."""
    names = {id(param): name for name, param in model.named_parameters()}
    owner: dict[int, str] = {}
    for opt_name, opt in optimizers.items():
        for param in (p for group in opt.param_groups for p in group["params"]):
            before = owner.setdefault(id(param), opt_name)
            if before != opt_name:
                which = names.get(id(param), "a parameter")
                msg = f"prepare: expected one optimizer for {which!r}"
                advice = "Give each parameter to one of them."
                raise ValueError(f"{msg}, got {before!r} and {opt_name!r}. {advice}")
            if id(param) not in names:
                shape = tuple(param.shape)
                msg = f"prepare({opt_name!r}): expected parameters of the model"
                advice = "Build the optimizer from the model that is trained."
                raise ValueError(f"{msg}, got one of shape {shape}. {advice}")


def describe_model(model: nn.Module, optimizers: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same on every rank of model, optimizers and code."""
    shapes = [(name, str(p.dtype), *p.shape) for name, p in model.named_parameters()]
    facts: dict[str, Any] = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "model class": type(model).__qualname__,
        "model parameters": _digest(map(str, shapes)),
        "code of the model": _code_of(type(model)),
        "script": _digest_file(sys.argv[0]),
    }
    for name, opt in optimizers.items():
        settings = [
            {key: str(value) for key, value in group.items() if key != "params"}
            for group in opt.param_groups
        ]
        sizes = [len(group["params"]) for group in opt.param_groups]
        facts[f"optimizer {name!r}"] = f"{type(opt).__name__} {sizes} {settings}"
    return facts


def describe_loaders(loaders: Sequence[Any]) -> dict[str, Any]:
    """What must be the same on every rank of the data."""
    facts: dict[str, Any] = {}
    for place, loader in enumerate(loaders):
        if loader is None:
            facts[f"data {place}"] = None
            continue
        dataset = loader.dataset
        facts[f"batch size of data {place}"] = loader.batch_size
        facts[f"drop_last of data {place}"] = loader.drop_last
        if not isinstance(dataset, IterableDataset):
            facts[f"length of data {place}"] = len(dataset)
        while isinstance(dataset, Subset):
            # A split drawn at random on each rank would train on what is held out elsewhere.
            rows = hashlib.sha256(repr(list(dataset.indices)).encode())
            facts[f"choice of rows of data {place}"] = rows.hexdigest()[:16]
            dataset = dataset.dataset
    return facts


def _digest(texts: Iterable[str]) -> str:
    """A short name for a list of texts."""
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def _code_of(kind: type) -> str | None:
    """Digest of the file that defines a class; None where it is not to be had."""
    try:
        return _digest_file(inspect.getfile(kind))
    except (OSError, TypeError):
        return None


def _digest_file(path: str) -> str | None:
    """Digest of a file; None where it is not to be had, as in a notebook."""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    except OSError:
        return None
