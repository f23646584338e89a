"""The exact average of losses over rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


class LossAverage:
    """Mean loss over samples, exact over uneven batches, for each optimizer name.

    Losses stay on their device until the mean is asked for; sums are float64.

    References
    ----------
    luz 0.5.0, ``luz_metric_loss_average``. Differs from luz: batches count by their
    samples, sums are float64.
    """

    fold_at = 1024

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._waiting: dict[str, list[Tensor]] = {}
        self._rows: dict[str, list[int]] = {}
        self._sums: dict[str, Tensor] = {}

    def update(self, losses: Any, rows: int) -> None:
        """Take in the losses of a batch of `rows` samples; a lone tensor is named ``opt``."""
        if not isinstance(losses, dict):
            losses = {"opt": losses}
        for name, loss in losses.items():
            waiting = self._waiting.setdefault(name, [])
            waiting.append(loss.detach() if isinstance(loss, Tensor) else loss)
            self._rows.setdefault(name, []).append(rows)
            if len(waiting) >= self.fold_at:
                self._fold(name)

    def _fold(self, name: str) -> None:
        """Add what waits to the sums: (sum of losses, samples), float64 on the CPU or GPU."""
        waiting, rows = self._waiting[name], self._rows[name]
        if not waiting:
            return
        values = torch.stack([torch.as_tensor(loss).detach() for loss in waiting])
        values = values.cpu() if values.device.type == "mps" else values
        counts = torch.tensor(rows, dtype=torch.float64, device=values.device)
        values = torch.where(counts > 0, values.double(), 0.0)
        sums = torch.stack([(values * counts).sum(), counts.sum()])
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        waiting.clear()
        rows.clear()

    def compute(self, accelerator: Accelerator | None = None) -> Any:
        """The mean as a float, or a dict of means where there are several names."""
        for name in self._waiting:
            self._fold(name)
        means = {}
        for name, sums in self._sums.items():
            if accelerator is not None and accelerator.world_size > 1:
                sums = accelerator.reduce(sums, "sum")
            total, count = sums.tolist()
            means[name] = total / count if count else float("nan")
        return next(iter(means.values())) if len(means) == 1 else means

    def state_dict(self) -> dict[str, Any]:
        """Sums and what waits, by name."""
        return {
            name: {
                "waiting": [torch.as_tensor(loss) for loss in self._waiting[name]],
                "rows": list(self._rows[name]),
                "sums": self._sums.get(name),
            }
            for name in self._waiting
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.reset()
        for name, item in state.items():
            self._waiting[name] = list(item["waiting"])
            self._rows[name] = list(item["rows"])
            if item["sums"] is not None:
                self._sums[name] = item["sums"]

    def join(self, state: Mapping[str, Any]) -> None:
        """Take in what another rank's ``state_dict`` gave."""
        for name, item in state.items():
            self._waiting.setdefault(name, []).extend(item["waiting"])
            self._rows.setdefault(name, []).extend(item["rows"])
            if item["sums"] is not None:
                sums = self._sums.get(name)
                self._sums[name] = item["sums"] if sums is None else sums + item["sums"]
