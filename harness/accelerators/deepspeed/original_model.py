"""Gather whole weights from all ranks, and turn the model into a plain module again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from harness.reshard.consolidated import parameter_shapes
from harness.reshard.meta_parameters import replace_parameters

ReadParameter = Callable[[nn.Parameter], Tensor]
"""Returns the whole parameter, in full precision, on this rank's device."""

LEFTOVERS = frozenset(
    {"_external_params", "_original_parameters", "all_parameters"}
    | {"applied_pre_backward_ref_cnt", "ds_external_parameters", "ds_grads_remaining"}
    | {"ds_id", "ds_inflight_param_registry", "ds_recompute_parameters"}
    | {"post_bwd_fn", "pre_bwd_fn"}
)
"""Attributes that ZeRO 3 of DeepSpeed 0.19.8 leaves on modules."""


_OF_ZERO_INIT = frozenset(
    {"aligned_size", "all_gather", "all_gather_coalesced", "is_external_param", "item"}
    | {"convert_to_zero_parameters", "nvme_swapper", "padding_size", "partition"}
    | {"partition_gradients", "partition_numel", "reduce_gradients_at_owner"}
)
"""Attributes of divided parameters in DeepSpeed 0.19.8, besides those with ``ds_``."""


def _own_attributes(param: nn.Parameter) -> dict[str, object]:
    """The user's attributes of a parameter, such as ``no_decay``."""
    is_divided = hasattr(param, "ds_id")
    return {
        name: value
        for name, value in vars(param).items()
        if not (is_divided and (name in _OF_ZERO_INIT or name.startswith("ds_")))
    }


class OriginalModel:
    """What a model was before engines changed it, and its weights as they are now.

    Parameters
    ----------
    model
        The model; with ZeRO 3 its parameters will be empty.

    Attributes
    ----------
    dtypes, shapes
        Those of the parameters, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.dtypes = {name: value.dtype for name, value in model.named_parameters()}
        shapes = parameter_shapes(model)
        self.shapes = {name: list(shape) for name, shape in shapes.items()}
        self._attributes = {
            module: frozenset(vars(module)) for module in model.modules()
        }
        self._parameters = [(p, _own_attributes(p)) for p in model.parameters()]

    def gather(self, read_whole: ReadParameter, *, keep: bool) -> dict[int, Tensor]:
        """Gather whole parameters by their ids, on the CPU, in their original dtypes.

        Parameters
        ----------
        read_whole
            Called once for each parameter, on all ranks in the same order.
        keep
            False: take part in the gathering, one parameter at a time, but keep no values.
            The tensors are on the ``meta`` device.
        """
        found = {}
        for name, param in self._model.named_parameters():
            full = read_whole(param).detach()
            dtype = self.dtypes.get(name, full.dtype)
            if keep:
                found[id(param)] = full.to("cpu", dtype, copy=True)
            else:
                found[id(param)] = torch.empty(full.shape, dtype=dtype, device="meta")
        return found

    def gather_state_dict(
        self, read_whole: ReadParameter, *, keep: bool
    ) -> dict[str, Tensor]:
        """State dict with whole weights; see ``gather``. It is empty without `keep`."""
        gathered = self.gather(read_whole, keep=keep)
        state: dict[str, Tensor] = {}
        values = self._model.state_dict(keep_vars=True) if keep else {}
        for name, value in values.items():
            if id(value) in gathered:
                state[name] = gathered[id(value)]
            else:
                is_tensor = isinstance(value, Tensor)
                state[name] = value.detach().cpu().clone() if is_tensor else value
        return state

    def gather_plain(
        self, read_whole: ReadParameter, *, keep: bool
    ) -> Callable[[], None]:
        """Gather whole weights; the returned function makes the parameters plain ones with them.

        There are two steps because gathering needs the engines, and the second one needs
        them destroyed.
        """
        gathered = self.gather(read_whole, keep=keep)

        def install() -> None:
            for module in self._model.modules():
                # ZeRO 3 puts its own dict here, and adds attributes to modules.
                module._parameters = dict(module._parameters.items())
                new = vars(module).keys() - self._attributes.get(module, frozenset())
                for name in LEFTOVERS & new:
                    delattr(module, name)
            for param, own in self._parameters:
                # ZeRO 3 adds functions that refer to the parameter. Its memory would be free
                # only when Python looks for such cycles.
                vars(param).clear()
                vars(param).update(own)
                if gathered[id(param)].is_meta:
                    param.data = param.data.new_empty(0)
            replace_parameters(self._model, lambda param: gathered[id(param)])

        return install


def read_no_values(param: nn.Parameter) -> Tensor:
    """A tensor with the shape of the whole parameter, and no values."""
    shape = getattr(param, "ds_shape", param.shape)
    return torch.empty(shape, dtype=param.dtype, device="meta")
