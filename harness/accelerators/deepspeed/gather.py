"""Gather whole weights from all ranks, and turn the model into a plain module again."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from harness.reshard.skeleton import replace_parameters

ReadParameter = Callable[[nn.Parameter], Tensor]
"""Returns the whole parameter, in full precision, on this rank's device."""


def gather_parameters(
    model: nn.Module,
    read_whole: ReadParameter,
    dtypes: Mapping[str, torch.dtype],
    *,
    keep: bool,
) -> dict[int, Tensor]:
    """Gather whole parameters by their ids, on the CPU, in the dtypes of the user's model.

    Parameters
    ----------
    model
        The model; with ZeRO 3 its parameters are empty.
    read_whole
        Called once for each parameter, on all ranks in the same order.
    dtypes
        Dtypes of the parameters by name, before an engine changed them.
    keep
        False: take part in the gathering, one parameter at a time, but keep no values. The
        tensors are on the ``meta`` device.
    """
    found = {}
    for name, param in model.named_parameters():
        full = read_whole(param).detach()
        dtype = dtypes.get(name, full.dtype)
        if keep:
            found[id(param)] = full.to("cpu", dtype, copy=True)
        else:
            found[id(param)] = torch.empty(full.shape, dtype=dtype, device="meta")
    return found


def gather_state_dict(
    model: nn.Module,
    read_whole: ReadParameter,
    dtypes: Mapping[str, torch.dtype],
    *,
    keep: bool,
) -> dict[str, Tensor]:
    """State dict with whole weights; see ``gather_parameters``. It is empty without `keep`."""
    gathered = gather_parameters(model, read_whole, dtypes, keep=keep)
    state: dict[str, Tensor] = {}
    for name, value in model.state_dict(keep_vars=True).items() if keep else ():
        if id(value) in gathered:
            state[name] = gathered[id(value)]
        else:
            is_tensor = isinstance(value, Tensor)
            state[name] = value.detach().cpu().clone() if is_tensor else value
    return state


def list_attributes(model: nn.Module) -> dict[nn.Module, frozenset[str]]:
    """Names of the attributes of each module, to find new ones later."""
    return {module: frozenset(vars(module)) for module in model.modules()}


def gather_plain_parameters(
    model: nn.Module,
    read_whole: ReadParameter,
    dtypes: Mapping[str, torch.dtype],
    before: Mapping[nn.Module, frozenset[str]],
    *,
    keep: bool,
) -> Callable[[], None]:
    """Gather whole weights; the returned function installs them as plain parameters.

    There are two steps because gathering needs the engines, and replacing the parameters
    needs them destroyed.

    Parameters
    ----------
    before
        What ``list_attributes`` returned before the engines were created.
    keep
        As in ``gather_parameters``.
    """
    gathered = gather_parameters(model, read_whole, dtypes, keep=keep)

    def install() -> None:
        for module in model.modules():
            # ZeRO 3 puts its own dict here, and adds attributes to modules.
            module._parameters = dict(module._parameters.items())
            new = vars(module).keys() - before.get(module, frozenset())
            for name in _LEFTOVERS & new:
                delattr(module, name)
        replace_parameters(model, lambda param: gathered[id(param)])

    return install


def read_no_values(param: nn.Parameter) -> Tensor:
    """A tensor with the shape of the whole parameter, and no values."""
    shape = getattr(param, "ds_shape", param.shape)
    return torch.empty(shape, dtype=param.dtype, device="meta")


_LEFTOVERS = frozenset(
    {"_external_params", "_original_parameters", "all_parameters"}
    | {"applied_pre_backward_ref_cnt", "ds_external_parameters", "ds_grads_remaining"}
    | {"ds_id", "ds_inflight_param_registry", "ds_recompute_parameters"}
    | {"post_bwd_fn", "pre_bwd_fn"}
)
"""Attributes that ZeRO 3 of DeepSpeed 0.19.8 leaves on modules."""
