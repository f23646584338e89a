"""Metrics of every kind, and what a batch adds to each mean over rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from tests.odd.batches import CLASSES, as_pair


class Listing(Metric):
    """Keeps what it gets, and returns a dict."""

    full_state_update = False
    hits: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", [], dist_reduce_fx="cat")

    def update(self, pred: Any, target: Any) -> None:
        self.hits.append(hits(pred, target))

    def compute(self) -> dict[str, Tensor]:
        return {"share": torch.cat(list(self.hits)).double().mean()}


def hits(pred: Any, target: Any) -> Tensor:
    scores, target = as_pair(pred, target)
    return scores.argmax(1) == target


def share(pred: Any, target: Any) -> Tensor:
    return hits(pred, target).double().mean()


def size(pred: Any, target: Any) -> Tensor:
    return as_pair(pred, target)[0].detach().double().abs().mean()


@dataclass(frozen=True, kw_only=True)
class MetricForm:
    """One metric.

    Attributes
    ----------
    make
        What ``setup(metrics=...)`` gets.
    plain
        Its value of one batch.
    logged
        Name under which it is logged; "" is its own.
    tensors_only
        Whether it takes only tensors.
    """

    make: Callable[[], Any]
    plain: Callable[[Any, Any], Any]
    logged: str = ""
    tensors_only: bool = False


METRICS = {
    "tensor": MetricForm(make=lambda: size, plain=size),
    "graph": MetricForm(
        make=lambda: (
            lambda pred, target: as_pair(pred, target)[0].double().abs().mean()
        ),
        plain=size,
    ),
    "element": MetricForm(
        make=lambda: lambda pred, target: size(pred, target).reshape(1), plain=size
    ),
    "float": MetricForm(
        make=lambda: lambda pred, target: float(size(pred, target)), plain=size
    ),
    "numpy": MetricForm(
        make=lambda: lambda pred, target: np.float64(size(pred, target)), plain=size
    ),
    "array": MetricForm(
        make=lambda: lambda pred, target: size(pred, target).numpy(), plain=size
    ),
    "int": MetricForm(
        make=lambda: lambda pred, target: int(hits(pred, target).sum()),
        plain=lambda pred, target: hits(pred, target).sum(),
    ),
    "bool": MetricForm(
        make=lambda: lambda pred, target: bool(hits(pred, target).any()),
        plain=lambda pred, target: hits(pred, target).any(),
    ),
    "accuracy": MetricForm(
        make=lambda: MulticlassAccuracy(CLASSES, average="micro"),
        plain=share,
        tensors_only=True,
    ),
    "listing": MetricForm(make=Listing, plain=share, logged="listing/share"),
}
"""Metrics by name."""

BAD_METRICS: dict[str, Callable[[], Any]] = {
    "vector": lambda: lambda pred, target: as_pair(pred, target)[0].flatten(),
    "text": lambda: lambda pred, target: "good",
    "nothing": lambda: lambda pred, target: None,
}
"""Metrics that are refused at the first batch."""
