"""Whole weights where user code reads them at ZeRO 3, or an error that says where it may."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_MARK = -1
"""Stands for a layer in the set of layers that use a parameter, so that DeepSpeed keeps it."""

_METADATA = frozenset(
    {
        "dtype",
        "device",
        "layout",
        "grad",
        "grad_fn",
        "is_leaf",
        "names",
        "requires_grad",
    }
    | {"requires_grad_", "is_floating_point", "is_complex", "is_cuda", "is_sparse"}
    | {"__hash__", "__repr__", "_version", "retains_grad", "is_meta", "is_cpu"}
)
"""What a part of a parameter says as the whole does."""


class WholeWeights(TorchFunctionMode):
    """Gives operations whole weights where ZeRO 3 has divided them.

    DeepSpeed gathers the weights of a layer while the layer runs. A penalty on weights, or a
    gradient of a gradient, reads them outside. In ``gathering`` such an operation gets the
    weight from all ranks, which is kept until ``release``. Elsewhere it is refused: other
    ranks might not read the same weight.

    Parameters
    ----------
    model
        The model, after its engines were created.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._params: list[Any] = [p for p in model.parameters() if hasattr(p, "ds_id")]
        self._names = {id(p): name for name, p in model.named_parameters()}
        self._held: list[Any] = []
        self._is_gathering = False

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        for value in _flatten((*args, *kwargs.values())):
            if _is_divided(value) and _is_called_by_user():
                self._read(value, func)
        if func is torch.autograd.grad and kwargs.get("create_graph"):
            # The second backward runs no hooks of layers.
            self._hold(filter(_is_divided, self._params))
        return func(*args, **kwargs)

    def _read(self, param: Any, func: Any) -> None:
        """Gather a parameter that an operation reads, or refuse it."""
        if self._is_gathering:
            self._hold([param])
            return
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = getattr(func.__self__, "__name__", name)
        if name in _METADATA:
            return
        msg = f"ZeRO 3: expected no use of the weight {self._names.get(id(param))!r}"
        advice = "Read ctx.accelerator.full_state_dict(ctx.model) on every rank"
        raise ValueError(
            f"{msg} outside a step, got {name}: this rank has a part of it. {advice}"
            " (rank 0 gets them), or use ZeRO 2."
        )

    def _hold(self, params: Iterable[Any]) -> None:
        """Gather parameters, and keep DeepSpeed from dividing them again."""
        for param in params:
            param.ds_active_sub_modules.add(_MARK)
            param.all_gather(param_list=[param])
            self._held.append(param)

    @contextmanager
    def gathering(self) -> Iterator[None]:
        """Gather each weight that is read inside, until ``release``."""
        before, self._is_gathering = self._is_gathering, True
        try:
            with self:
                yield
        finally:
            self._is_gathering = before
            if not before:
                self.release()

    def release(self) -> None:
        """Divide the weights again that were gathered."""
        while self._held:
            param = self._held.pop()
            param.ds_active_sub_modules.discard(_MARK)
            if not (_is_divided(param) or param.ds_active_sub_modules):
                param.partition()


def _is_divided(value: Any) -> bool:
    """True for a parameter of ZeRO 3 of which this rank has only a part."""
    status = getattr(value, "ds_status", None)
    return status is not None and status.name == "NOT_AVAILABLE"


def _flatten(values: Iterable[Any]) -> Iterator[nn.Parameter]:
    """The parameters among the arguments of an operation, also those in lists."""
    for value in values:
        if type(value) is nn.Parameter:
            yield value
        elif isinstance(value, list | tuple):
            yield from _flatten(value)


def _is_called_by_user() -> bool:
    """False where DeepSpeed or this package makes the call, below torch's own code."""
    frame = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "").partition(".")[0]
        if module != "torch":
            return module not in {"deepspeed", "harness"}
        frame = frame.f_back  # type: ignore[assignment]
    return False
