"""Describe a fit in its checkpoints, so that a resume can tell what differs."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import numpy as np
import torch

from harness.accelerators.kernels import describe_kernels
from harness.checkpoint.callback_matching import describe_callbacks
from harness.checkpoint.held.search import name_parameters
from harness.checkpoint.hparams import encode_hparams
from harness.checkpoint.param_groups import describe_groups
from harness.checkpoint.state import search_context
from harness.context import Context
from harness.data.pace import list_limits
from harness.data.tensors import unwrap_tensors
from harness.pytree import as_bytes
from harness.reshard.consolidated import weights_dtype


def describe_fit(ctx: Context) -> dict[str, Any]:
    """Describe a fit, so that a resume can report what differs."""
    model, data = ctx.model, ctx.train_data
    whole, loss = getattr(data, "undivided", data), ctx.loss_fn
    precision = ctx.accelerator.precision
    params = name_parameters(model, search_context(ctx))
    limits = list_limits(ctx)
    return {
        "model": f"{type(model).__module__}:{type(model).__qualname__}",
        "hparams": str(encode_hparams(ctx.hparams)),
        "opt_hparams": str(encode_hparams(ctx.opt_hparams)),
        "rows": _count_rows(getattr(data, "dataset", None)),
        "data": _digest_data(getattr(data, "dataset", None)),
        "batch_size": getattr(data, "batch_size", None),
        "num_workers": getattr(data, "num_workers", None),
        "accumulate": ctx.accelerator.accumulate,
        "accelerator": type(ctx.accelerator).__name__,
        "dtype": weights_dtype(model),
        "device": describe_device(ctx.accelerator.device),
        "kernels": describe_kernels(ctx.accelerator.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        # Checkpoints from before there was a choice do not name it.
        **({} if precision == "fp32" else {"precision": precision}),
        **({"valid_every": str(ctx.pace)} if ctx.pace.is_given else {}),
        **({"limit_batches": limits} if limits else {}),
        "loss": getattr(loss, "__qualname__", type(loss).__qualname__),
        "sampler": type(getattr(whole, "sampler", None)).__qualname__,
        "validation": {
            name: _count_rows(getattr(own, "dataset", None))
            for name, own in ctx.valid_sets.items()
        },
        "groups": describe_groups(ctx.optimizers, params),
        "frozen": [n for n, p in model.named_parameters() if not p.requires_grad],
        "callbacks": describe_callbacks(ctx.callbacks),
    }


def read_description(ctx: Context) -> dict[str, Any]:
    """Return ``ctx.about``, with values that are only found out when they are needed."""
    return {
        name: value() if callable(value) else value for name, value in ctx.about.items()
    }


def describe_device(device: torch.device) -> str:
    """Name a device by its GPU model or its CPU instruction set, on which bits depend."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _digest_data(dataset: Any) -> str | None:
    """Hash about a thousand rows of a data set of tensors; None for other data sets."""
    found = unwrap_tensors(dataset)
    if found is None:
        return None
    digest = hashlib.sha256()
    for tensor in found[0]:
        some = tensor[:: max(1, len(tensor) // 1000)].cpu()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if some.numel():
            digest.update(as_bytes(some).numpy().tobytes())
    return digest.hexdigest()[:16]


def _count_rows(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except TypeError:
        return None
