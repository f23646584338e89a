"""Functions as metrics: their mean over rows. Imports torchmetrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric


class FunctionAverage(Metric):
    """Mean of ``f(pred, target)`` over rows: each batch is weighted by its rows."""

    full_state_update = False
    averages_function = True
    total: Tensor
    rows: Tensor

    def __init__(self, function: Callable[[Any, Any], object]) -> None:
        super().__init__()
        self.function = function
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero.clone(), dist_reduce_fx="sum")
        self.add_state("rows", zero.clone(), dist_reduce_fx="sum")

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Move the states; to float32 for a device without float64, which MPS is."""
        try:
            fn(self.total)
        except TypeError:
            self.set_dtype(torch.float32)
        return super()._apply(fn, *args, **kwargs)

    def update(self, pred: object, target: object, rows: int) -> None:
        """Add the value of one batch of `rows` rows."""
        found = self.function(pred, target)
        if isinstance(found, Tensor) and found.numel() == 1:
            found = found.detach().reshape(())
        elif not isinstance(found, int | float) and getattr(found, "shape", None) != ():
            shape = f" of shape {tuple(found.shape)}" if hasattr(found, "shape") else ""
            msg = f"a number, got {type(found).__name__}{shape}."
            raise TypeError(
                f"metric function: expected {msg} Return its mean, or write a metric for"
                " each part."
            )
        value = torch.as_tensor(found, device=self.total.device)
        self.total += value.to(self.total.dtype) * rows
        self.rows += rows

    def compute(self) -> Tensor:
        """The mean; NaN without rows."""
        return self.total / self.rows
