"""A model without memory for its parameters: shapes and dtypes stay, the values are elsewhere.

The parameters are on torch's ``meta`` device, where an operation on them fails or computes
nothing. Buffers stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from harness.reshard.consolidated import whole_shape


def has_meta_parameters(model: nn.Module) -> bool:
    """Whether a parameter of the model has no memory."""
    return any(param.is_meta for param in model.parameters())


def release_parameters(model: nn.Module) -> None:
    """Take the memory of the parameters away."""
    replace_parameters(model, lambda param: torch.empty_like(param.data, device="meta"))


def allocate_parameters(model: nn.Module, device: torch.device) -> None:
    """Give parameters without memory some on a device; their values are not set."""
    replace_parameters(
        model,
        lambda param: (
            torch.empty_like(param.data, device=device) if param.is_meta else param.data
        ),
    )


def replace_parameters(
    model: nn.Module, make: Callable[[nn.Parameter], Tensor]
) -> None:
    """Give each parameter other values; tied ones stay tied.

    A parameter stays the same object, which the user may keep elsewhere too. Between ``meta``
    and memory that is impossible: a new one takes its place, with its attributes.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is None:
                continue
            if id(param) not in made:
                made[id(param)] = _replace(param, make(param))
            module._parameters[name] = made[id(param)]


def _replace(param: nn.Parameter, value: Tensor) -> nn.Parameter:
    """A parameter with another value: the same one, if it can have it."""
    if value.is_meta == param.is_meta:
        param.grad, param.data = None, value
        return param
    made = nn.Parameter(value, param.requires_grad)
    vars(made).update(vars(param))
    return made


def move_real_tensors(model: nn.Module, device: torch.device) -> None:
    """Move the tensors that have memory to a device."""
    # ``Module.to`` fails on ``meta``.
    model._apply(lambda tensor: tensor if tensor.is_meta else tensor.to(device))  # type: ignore[no-untyped-call]


def count_bytes(model: nn.Module) -> int:
    """Bytes of the whole parameters, also where ranks or nobody holds them; tied ones once."""
    return sum(param.element_size() * n for param, n in _count_each(model))


def count_elements(model: nn.Module) -> int:
    """Elements of the whole parameters; see ``count_bytes``."""
    return sum(n for _, n in _count_each(model))


def _count_each(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    for param in model.parameters():
        if not isinstance(param, nn.parameter.UninitializedParameter):
            yield param, whole_shape(param).numel()
