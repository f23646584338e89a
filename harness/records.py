"""Records: what is logged in memory, and whom the context tells of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch import Tensor

from harness.pytree import named_leaves

if TYPE_CHECKING:
    import pandas as pd

Records = dict[str, dict[str, list[Any]]]

ARRAYS = (Tensor, np.ndarray, np.generic)
"""What is logged as it is and becomes plain numbers when somebody reads the records."""


class Recorder(Protocol):
    """What the context tells of every logged value; ``tracking.Run`` is one."""

    def log(
        self,
        what: str,
        set: str,
        value: Any,
        index: int | None = None,
        append: bool = True,
        *,
        epoch: int | None = None,
        step: int | None = None,
    ) -> None:
        """Record one value."""

    def log_step(
        self,
        values: Mapping[str, Any],
        step: int,
        *,
        set: str = "train",
        epoch: int | None = None,
    ) -> None:
        """Record values of a per-step series."""

    def position(self) -> int:
        """Number of the last row; later ones are higher."""
        ...

    def rewind(self, seq: int, rank: int | None = None) -> None:
        """Take back what was recorded after a position, by this rank or another one."""


class Nobody:
    """The recorder of a context that nobody listens to."""

    def log(self, *args: Any, **kwargs: Any) -> None:
        """Forget."""

    def log_step(self, *args: Any, **kwargs: Any) -> None:
        """Forget."""

    def position(self) -> int:
        """Before the first row."""
        return -1

    def rewind(self, seq: int, rank: int | None = None) -> None:
        """Nothing to take back."""


NOBODY: Recorder = Nobody()


def metrics_frame(records: Records) -> pd.DataFrame:
    """Metric records as a DataFrame with the columns set, metric, epoch, value."""
    import pandas as pd  # noqa: PLC0415  slow to import, seldom used

    rows = [
        (split, name, epoch, value)
        for split, series in records.get("metrics", {}).items()
        for epoch, metrics in enumerate(series, start=1)
        if isinstance(metrics, Mapping)
        for name, value in named_leaves(metrics)
    ]
    return pd.DataFrame(rows, columns=["set", "metric", "epoch", "value"])


def copy_logged(value: Any) -> Any:
    """The value as it is now: tensors detached, on their device; tuples become lists."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray | np.generic):
        return value.copy()
    if isinstance(value, dict):
        return {name: copy_logged(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [copy_logged(item) for item in value]
    return value


def append_logged(current: Any, value: Any) -> Any:
    """What ``log`` keeps where something was logged before."""
    if current is None:
        return value
    if isinstance(current, dict) and isinstance(value, dict):
        return {**current, **value}
    old = current if isinstance(current, list) else [current]
    return old + (value if isinstance(value, list) else [value])
