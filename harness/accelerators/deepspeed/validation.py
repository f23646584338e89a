"""Checks before training with DeepSpeed: model, optimizers, devices, equal ranks."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import platform
import sys
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.utils.data import IterableDataset, Subset

from harness.accelerators.base import (
    check_whole,
    has_modes,
    list_parameters,
    needs_closure,
)
from harness.accelerators.deepspeed.config import (
    SEE_KEYS,
    ConfigFacts,
    fill_config,
    zero_stage,
)
from harness.accelerators.deepspeed.library import find_config_error
from harness.accelerators.deepspeed.precision import find_weights_dtype
from harness.data.loaders import num_batches
from harness.pytree import Options
from harness.reshard.layout import ELEMENTWISE


def is_elementwise(opt: object) -> bool:
    """True for optimizers of torch that ZeRO may divide anywhere."""
    kind = type(opt)
    return kind.__name__ in ELEMENTWISE and kind is getattr(torch.optim, kind.__name__)


def complete_config(
    config: Mapping[str, object],
    model: nn.Module,
    optimizers: Mapping[str, Optimizer] | None,
    facts: ConfigFacts,
) -> dict[str, object]:
    """Check that this model can be trained, and complete the config for it.

    Parameters
    ----------
    config
        DeepSpeed's config as the user wrote it.
    optimizers
        By name; None to evaluate only.
    """
    check_parameters(model.named_parameters())
    check_divided(model, config, facts.world_size, trains=optimizers is not None)
    if optimizers is not None:
        check_layers(model, zero_stage(config), facts)
        check_deepspeed_optimizers(model, optimizers, config)
        check_dtypes(model, optimizers, config)
    lr = next(
        (opt.param_groups[0].get("lr") for opt in (optimizers or {}).values()), None
    )
    if lr is not None:
        facts = replace(facts, opt_hparams={"lr": lr, **facts.opt_hparams})
    filled = fill_config(config, facts)
    found = find_config_error(filled)
    if found is not None:
        key, reason = found
        msg = f"accelerator(config): expected a value that DeepSpeed reads at {key!r}"
        raise ValueError(f"{msg}, got: {reason}. {SEE_KEYS}")
    check_packages(filled)
    if all(is_elementwise(opt) for opt in (optimizers or {}).values()):
        filled.setdefault("zero_allow_untested_optimizer", True)
    # By default DeepSpeed refuses torch's optimizers with offload, because they are slow.
    filled.setdefault("zero_force_ds_cpu_optimizer", False)
    return filled


_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "comet": "comet_ml"}
"""Packages that sections of the config need, which DeepSpeed does not install."""


def check_packages(config: Options) -> None:
    """Check that the packages of DeepSpeed's monitors are installed."""
    for section, package in _PACKAGES.items():
        is_enabled = config.get(section, {}).get("enabled", False)
        if is_enabled and importlib.util.find_spec(package) is None:
            what = f"the package {package!r} for {section!r}"
            msg = f"accelerator(config): expected {what}"
            advice = "Install it, or leave the section out"
            raise ValueError(f"{msg}, found no such package. {advice}.")


def check_devices(devices: Sequence[Hashable]) -> None:
    """Check that each rank has its own device; two ranks on one would wait forever.

    Raises
    ------
    ValueError
        If two of the ranks' devices are the same.
    """
    found = len(set(devices))
    if found < len(devices):
        msg = f"accelerator: expected a device for each of {len(devices)} ranks"
        advice = "Start fewer ranks (--num_gpus), or pass device='cpu'."
        raise ValueError(f"{msg}, got {found}. {advice}")


def check_num_batches(loaders: Sequence[Any], world_size: int) -> None:
    """Check that the data fills a batch on every rank."""
    for place, loader in enumerate(loaders):
        if loader is not None and num_batches(loader) == 0:
            sizes = f"{world_size} ranks x {loader.batch_size} rows"
            msg = f"prepare: expected at least one batch of {sizes} in data {place}"
            got = f"got {len(loader.dataset)} rows with drop_last"
            advice = "Make batch_size smaller or set drop_last=False."
            raise ValueError(f"{msg}, {got}. {advice}")


def check_layer(module: nn.Module) -> None:
    """Check that ``zero.Init`` can divide the parameters of a module; see ``check_parameters``."""
    kind = type(module).__name__
    params = module.named_parameters(recurse=False)
    check_parameters((f"{kind}.{name}", param) for name, param in params)


def check_parameters(params: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that DeepSpeed can divide and send parameters, given by name.

    Raises
    ------
    ValueError
        If a parameter is lazy, has no values, or no dims: DeepSpeed 0.19.8 cannot send that to
        other ranks.
    """
    for name, param in params:
        if is_lazy(param):
            msg = f"prepare: expected parameters with shapes, got the lazy {name!r}."
            advice = (
                "Call the model once on a batch when it is built, or give its sizes"
            )
            raise ValueError(f"{msg} {advice}.")
        if param.is_meta:
            msg = f"prepare: expected parameters with values, got {name!r} on 'meta'."
            advice = "Build it on the CPU; harness.accelerator(config, zero_init=True)"
            raise ValueError(f"{msg} {advice} divides each layer as it is made.")
        if len(getattr(param, "ds_shape", param.shape)) == 0:
            msg = f"prepare: expected parameters with dimensions, got {name!r} of shape ()."
            advice = "DeepSpeed cannot send it to other ranks: make its shape (1,)."
            raise ValueError(f"{msg} {advice}")


def check_zero_init(zero_init: object, stage: int) -> None:
    """Check that a model can be built under ``deepspeed.zero.Init``, if that is asked for."""
    if not isinstance(zero_init, bool):
        msg = f"accelerator(zero_init): expected True or False, got {zero_init!r}."
        raise TypeError(f"{msg} True builds the model under deepspeed.zero.Init.")
    if zero_init and stage != 3:
        msg = f"accelerator(zero_init): expected ZeRO 3, got {stage}."
        advice = 'Set "zero_optimization": {"stage": 3} in the config, or leave it out.'
        raise ValueError(f"{msg} {advice}")


def check_divided(
    model: nn.Module, config: Mapping[str, Any], world_size: int, *, trains: bool
) -> None:
    """Check that a model which was built under ``deepspeed.zero.Init`` can be trained as it is.

    Raises
    ------
    ValueError
        If it is not trained at ZeRO 3, or is divided over other ranks, twice, or on disk.
    """
    stage = zero_stage(config)
    if stage != 3 or not trains:
        where = f"at ZeRO {stage}" if stage != 3 else "without an optimizer"
        check_whole(model, where)
    params: dict[str, Any] = dict(model.named_parameters())
    for name, param in params.items():
        if not hasattr(param, "ds_id"):
            continue
        ranks = param.ds_zero_partition_world_size
        if ranks != world_size:
            msg = f"prepare: expected {name!r} divided over {world_size} ranks"
            advice = "Leave data_parallel_group of deepspeed.zero.Init out."
            raise ValueError(f"{msg}, got {ranks}. {advice}")
        for key, value, advice in (
            ("zero_hpz_partition_size", param.ds_secondary_tensor, "Leave it out"),
            ("offload_param.device 'nvme'", param.nvme_swapper, "Use 'cpu'"),
        ):
            if value is not None:
                msg = f"prepare: expected no {key} where zero.Init divides the model"
                advice = f"{advice}, or build it whole."
                raise ValueError(f"{msg}, got {name!r} with it. {advice}")


def check_layers(model: nn.Module, stage: int, facts: ConfigFacts) -> None:
    """Check for layers that do something else on several ranks or at ZeRO, unless frozen.

    Raises
    ------
    ValueError
        If an embedding has sparse gradients, which ZeRO cannot divide, or changes its weights
        in the forward, which ranks would do to other rows, and ZeRO would lose; or if
        BatchNorm cannot talk to other ranks.
    """
    is_divided, on_cpu = facts.world_size > 1, facts.device == "cpu"
    if stage == 3:
        _check_divisible(model, facts.world_size)
    for name, module in model.named_modules():
        own = list(module.parameters(recurse=False))
        if own and not any(weight.requires_grad for weight in own):
            continue
        # A weight may be computed from others when it is read.
        is_sparse = getattr(module, "sparse", False) is True
        if stage and is_sparse and isinstance(getattr(module, "weight", None), Tensor):
            msg = f"prepare: expected dense gradients at ZeRO {stage}"
            advice = "Build it with sparse=False, or use ZeRO 0."
            raise ValueError(f"{msg}, got sparse ones of {name!r}. {advice}")
        is_embedding = isinstance(module, nn.Embedding | nn.EmbeddingBag)
        has_max = is_embedding and module.max_norm is not None
        if has_max and (stage or is_divided):
            msg = "prepare: expected weights that only the optimizer changes, got"
            does = f"{name!r} with max_norm, which changes them in each forward"
            advice = "Leave max_norm out, or train on one device."
            raise ValueError(f"{msg} {does}. {advice}")
        if isinstance(module, nn.SyncBatchNorm) and is_divided and on_cpu:
            msg = f"prepare: expected a GPU for SyncBatchNorm {name!r}, got the CPU."
            raise ValueError(f"{msg} Use BatchNorm, or a norm of each row.")


def _check_divisible(model: nn.Module, world_size: int) -> None:
    """Refuse what DeepSpeed 0.19.8 fails on at ZeRO 3, in its hooks or when it gathers."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            msg = f"prepare: expected layers without torch.jit at ZeRO 3, got {name!r}."
            raise ValueError(f"{msg} Use the layer before torch.jit, or ZeRO 2.")
        # It computes with divided weights, which ends the process by a signal.
        kinds = {type(hook).__module__ for hook in module._forward_pre_hooks.values()}
        if world_size > 1 and "torch.nn.utils.weight_norm" in kinds:
            msg = f"prepare: expected torch.nn.utils.parametrizations.weight_norm of {name!r}"
            raise ValueError(f"{msg} at ZeRO 3, got torch.nn.utils.weight_norm.")
    for name, param in model.named_parameters():
        if 0 in getattr(param, "ds_shape", param.shape):
            msg = f"prepare: expected parameters with elements at ZeRO 3, got {name!r}"
            raise ValueError(f"{msg} without any. Leave it out, or use ZeRO 2.")


def check_dtypes(
    model: nn.Module, optimizers: Mapping[str, Optimizer], config: Mapping[str, Any]
) -> None:
    """Check that DeepSpeed can step the dtypes of what is trained.

    Raises
    ------
    ValueError
        If there are complex numbers, or several dtypes in what ZeRO makes one tensor of: it
        would change them without an error, or fail without a message.
    """
    stage, names = zero_stage(config), {id(p): n for n, p in model.named_parameters()}
    groups = [] if optimizers else [list(model.parameters())]  # the config's optimizer
    for opt in optimizers.values():
        own = [group["params"] for group in opt.param_groups]
        groups += [list_parameters(opt)] if stage == 3 else own
    for group in groups:
        found = {p.dtype: names.get(id(p)) for p in group if p.requires_grad}
        for dtype, name in found.items():
            if dtype.is_complex:
                msg = f"prepare: expected real parameters under DeepSpeed, got {name!r}"
                advice = "Keep it as torch.view_as_real of it, or train on one device."
                raise ValueError(f"{msg} of {dtype}. {advice}")
        if stage and len(found) > 1 and find_weights_dtype(config) is None:
            kinds = " and ".join(f"{dtype} {name!r}" for dtype, name in found.items())
            msg = f"prepare: expected parameters of one dtype at ZeRO {stage}, got {kinds}"
            raise ValueError(f"{msg}. Cast the model to one of them, or use ZeRO 0.")


def check_deepspeed_optimizers(
    model: nn.Module, optimizers: Mapping[str, Optimizer], config: Mapping[str, object]
) -> None:
    """Check that DeepSpeed can step the optimizers.

    Raises
    ------
    ValueError
        If there is none, or both learner and config have one, or two own the same
        parameter, or one needs a closure, has modes, cannot be divided or has only frozen
        parameters.
    """
    _check_one_source(optimizers, config)
    for name, opt in optimizers.items():
        _check_optimizer(name, opt, config)
    _check_ownership(model, optimizers)


def _check_one_source(
    optimizers: Mapping[str, Optimizer], config: Mapping[str, object]
) -> None:
    if "optimizer" in config and optimizers:
        msg = f"prepare: expected one place for the optimizer, got {list(optimizers)}"
        advice = "Remove it from the config or from the learner."
        raise ValueError(f"{msg} in the learner and one in the config. {advice}")
    if "optimizer" not in config and not optimizers:
        msg = "prepare: expected an optimizer in the learner or in the config, got none"
        raise ValueError(f"{msg}. Pass one, or optimizers=None to evaluate only.")


def _check_optimizer(name: str, opt: Any, config: Mapping[str, Any]) -> None:
    place, kind, stage = f"prepare({name!r})", type(opt).__name__, zero_stage(config)
    if needs_closure(opt):
        msg = f"{place}: expected an optimizer without a closure, got {kind}."
        raise ValueError(f"{msg} DeepSpeed cannot step it: train on one device.")
    if has_modes(opt):
        msg = f"{place}: expected an optimizer without train() and eval(), got {kind}."
        advice = "Engines keep copies of the weights, which it changes"
        raise ValueError(f"{msg} {advice}: train on one device.")
    if not hasattr(opt, "_optimizer_step_pre_hooks"):  # it wraps another one
        msg = f"{place}: expected an optimizer that calls torch's Optimizer.__init__"
        how = "super().__init__(base.param_groups, base.defaults) for one that wraps another"
        advice = f"Call it in its own __init__, as {how}, or train on one device."
        raise ValueError(f"{msg}, got {kind}. {advice}")
    is_allowed = config.get("zero_allow_untested_optimizer", False)
    if stage and not is_elementwise(opt) and not is_allowed:
        msg = f"{place}: expected an optimizer that updates each element separately"
        advice = 'If it does, set "zero_allow_untested_optimizer": true.'
        raise ValueError(f"{msg} at ZeRO {stage}, got {kind}. {advice}")
    if not any(param.requires_grad for param in list_parameters(opt)):
        msg = f"{place}: expected parameters to train, got frozen ones only."
        raise ValueError(f"{msg} Set requires_grad on some, or remove {name!r}.")


def _check_ownership(model: nn.Module, optimizers: Mapping[str, Optimizer]) -> None:
    """Check that each parameter belongs to one optimizer, and to the model."""
    names = {id(param): name for name, param in model.named_parameters()}
    owner: dict[int, str] = {}
    for opt_name, opt in optimizers.items():
        for param in list_parameters(opt):
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


def describe_model(
    model: nn.Module, optimizers: Mapping[str, Optimizer]
) -> dict[str, object]:
    """Facts of model, optimizers and code that must be the same on every rank."""
    shapes = [
        (name, str(p.dtype), *getattr(p, "ds_shape", p.shape))
        for name, p in model.named_parameters()
    ]
    facts: dict[str, object] = {
        "Python": platform.python_version(),
        "torch": torch.__version__,
        "model class": type(model).__qualname__,
        "model parameters": _hash("\n".join(map(str, shapes)).encode()),
        "code of the model": _hash_source(type(model)),
        "script": _hash_file(sys.argv[0]),
    }
    for name, opt in optimizers.items():
        settings = [
            {key: str(value) for key, value in group.items() if key != "params"}
            for group in opt.param_groups
        ]
        sizes = [len(group["params"]) for group in opt.param_groups]
        facts[f"optimizer {name!r}"] = f"{type(opt).__name__} {sizes} {settings}"
    return facts


def describe_loaders(loaders: Sequence[Any]) -> dict[str, object]:
    """Facts of the data that must be the same on every rank."""
    facts: dict[str, object] = {}
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
            # Ranks with different random splits would train on each other's held-out rows.
            rows = repr(list(dataset.indices))
            facts[f"choice of rows of data {place}"] = _hash(rows.encode())
            dataset = dataset.dataset
    return facts


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _hash_source(kind: type) -> str | None:
    """Hash of the file that defines a class; None if it cannot be read."""
    try:
        return _hash_file(inspect.getfile(kind))
    except (OSError, TypeError):
        return None


def _hash_file(path: str) -> str | None:
    """Hash of a file; None if it cannot be read, as in a notebook."""
    try:
        return _hash(Path(path).read_bytes())
    except OSError:
        return None
