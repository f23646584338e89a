"""Exact averages over rows: of losses, and of functions used as metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.data.batch import as_number, copy_by_value
from harness.pytree import StateDict

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


def has_nan(losses: object) -> bool | None:
    """Whether a loss on the CPU is NaN; None if one is on a device, which is not read."""
    values = losses.values() if isinstance(losses, dict) else (losses,)
    for loss in values:
        if isinstance(loss, Tensor):
            if loss.device.type != "cpu":
                return None
            if loss.numel() != 1:
                continue
            loss = loss.item()
        if loss != loss:
            return True
    return False


class LossAverage:
    """Mean loss over rows, exact for batches of any size, for each optimizer name.

    Losses stay on their device until the mean is computed; sums are float64.

    References
    ----------
    luz 0.5.0, ``luz_metric_loss_average``. Differs from luz: batches are weighted by their
    rows, sums are float64.
    """

    fold_at = 1024
    """Losses of one name that are kept before they are added to the sum."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Remove all losses."""
        self._waiting: dict[str, list[Tensor]] = {}
        self._rows: dict[str, list[int]] = {}
        self._sums: dict[str, Tensor] = {}

    def update(self, losses: object, rows: int) -> None:
        """Add copies of the losses of a batch of `rows` rows; a single tensor is ``opt``."""
        if not isinstance(losses, dict):
            losses = {"opt": losses}
        for name, loss in losses.items():
            waiting = self._waiting.setdefault(name, [])
            waiting.append(copy_by_value(as_number(loss, "ctx.loss")))
            self._rows.setdefault(name, []).append(rows)
            if len(waiting) >= self.fold_at:
                self._fold(name)

    def find_nan(self) -> int | None:
        """How many updates ago the first NaN came that still waits; None without one.

        All waiting losses are read from their device at once.
        """
        found = []
        for waiting in self._waiting.values():
            losses = [torch.as_tensor(loss).reshape(-1) for loss in waiting]
            counts = torch.tensor([len(loss) for loss in losses])
            flags = (
                torch.cat(on_one_device(losses)).isnan().cpu()
                if losses
                else torch.zeros(0)
            )
            places = torch.arange(len(losses)).repeat_interleave(counts)[flags.bool()]
            if len(places):
                found.append(len(losses) - 1 - int(places[0]))
        return max(found, default=None)

    def _fold(self, name: str) -> None:
        """Add the waiting losses to the sums: (sum of losses, rows), float64."""
        waiting, rows = self._waiting[name], self._rows[name]
        if not waiting:
            return
        values = stack_numbers(waiting)
        values = values.cpu() if values.device.type == "mps" else values  # no float64
        counts = torch.tensor(rows, dtype=torch.float64, device=values.device)
        values = torch.where(counts > 0, values.double(), 0.0)
        sums = torch.stack([(values * counts).sum(), counts.sum()])
        if name in self._sums:  # restored sums are where they were read
            sums = self._sums[name].to(sums.device) + sums
        self._sums[name] = sums
        waiting.clear()
        rows.clear()

    def get_sums(self) -> dict[str, list[float]]:
        """Sum of losses and number of rows of this rank, by name."""
        for name in self._waiting:
            self._fold(name)
        return {name: sums.tolist() for name, sums in self._sums.items()}

    def peek(self) -> dict[str, float]:
        """Mean so far on this rank, by name, without a change of what is kept."""
        found = {}
        for name, waiting in self._waiting.items():
            value, rows = self._sums[name].tolist() if name in self._sums else (0.0, 0)
            if waiting:
                losses = stack_numbers(waiting).tolist()
                for loss, count in zip(losses, self._rows[name], strict=True):
                    value += loss * count if count else 0.0
                    rows += count
            found[name] = value / rows if rows else math.nan
        return found

    def compute(self) -> Any:
        """The mean over this rank's rows as a float, or a dict of means by name."""
        return compute_means([{"": self.get_sums()}]).get("", {})

    def state_dict(self) -> StateDict:
        """Sums and waiting losses, by name."""
        return {
            name: {
                "waiting": _pack(self._waiting[name]),
                "rows": list(self._rows[name]),
                "sums": self._sums.get(name),
            }
            for name in self._waiting
        }

    def load_state_dict(self, state: StateDict) -> None:
        """Replace the losses by those of a ``state_dict``."""
        self.reset()
        for name, item in state.items():
            losses = _unpack(item["waiting"])
            if len(losses) != len(item["rows"]):
                num_rows, num_losses = len(item["rows"]), len(losses)
                msg = f"loss {name!r}: expected rows of {num_losses} losses"
                raise ValueError(f"{msg}, got those of {num_rows}.")
            if not all(type(rows) is int for rows in item["rows"]):
                msg = f"loss {name!r}: expected numbers of rows"
                raise ValueError(f"{msg}, got {item['rows']!r:.100}.")
            self._waiting[name], self._rows[name] = losses, list(item["rows"])
            if item["sums"] is not None:
                self._sums[name] = torch.as_tensor(item["sums"])

    def merge(self, state: StateDict) -> None:
        """Add the losses of another rank's ``state_dict``."""
        for name, item in state.items():
            self._waiting.setdefault(name, []).extend(_unpack(item["waiting"]))
            self._rows.setdefault(name, []).extend(item["rows"])
            if item["sums"] is not None:
                sums = self._sums.get(name)
                more = item["sums"]
                self._sums[name] = more if sums is None else sums.to(more.device) + more


def _pack(losses: Sequence[Any]) -> list[Tensor]:
    """Losses in few tensors with one dim, so that a save copies them at once, and not each."""
    tensors = [torch.as_tensor(loss) for loss in losses]
    alike = groupby(tensors, key=lambda own: (own.device, own.dtype, own.shape))
    return [torch.stack([*group]).reshape(-1) for _, group in alike]


def _unpack(packed: Sequence[Any]) -> list[Tensor]:
    """What ``_pack`` was given; earlier checkpoints have a tensor for each loss."""
    return [
        loss for own in packed for loss in torch.as_tensor(own).reshape(-1).unbind()
    ]


def on_one_device(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on the device of the last, where they are on several.

    A resume brings numbers from the CPU, and a step may log numbers of Python.
    """
    device = tensors[-1].device
    if all(tensor.device == device for tensor in tensors):
        return tensors
    devices = [tensor.device for tensor in tensors if tensor.device.type != "cpu"]
    return [tensor.to(devices[-1]) for tensor in tensors]


def stack_numbers(numbers: Sequence[Any]) -> Tensor:
    """Numbers and scalar tensors, on any devices, as one tensor without a graph."""
    return torch.stack(on_one_device([torch.as_tensor(n).detach() for n in numbers]))


def mean_over_ranks(loss: object, accelerator: Accelerator) -> float:
    """A loss of the present batch as a number: the mean over the rows of all ranks.

    Every rank must call it.
    """
    if accelerator.world_size == 1:
        return float(loss)  # type: ignore[arg-type]
    rows = 1 if accelerator.counted is None else accelerator.counted
    total = float(loss) * rows if rows else 0.0  # type: ignore[arg-type]
    sums = torch.tensor([total, rows], dtype=torch.float64)
    total, rows = accelerator.reduce(sums, "sum").tolist()
    return total / rows if rows else math.nan


Sums = dict[str, dict[str, list[float]]]
"""What ``LossAverage.get_sums`` returns, by the name of the average."""


def compute_means(of_ranks: Sequence[Sums]) -> dict[str, Any]:
    """Means over the rows of all ranks, of every name that a rank has.

    Returns
    -------
    By name, a float, or a dict of floats if there are several names below it.
    """
    total: Sums = {}
    for sums in of_ranks:
        for name, inner in sums.items():
            for key, (value, rows) in inner.items():
                before = total.setdefault(name, {}).setdefault(key, [0.0, 0.0])
                before[0] += value
                before[1] += rows
    means = {
        name: {
            key: value / rows if rows else math.nan
            for key, (value, rows) in inner.items()
        }
        for name, inner in total.items()
    }
    return {
        name: next(iter(inner.values())) if len(inner) == 1 else inner
        for name, inner in means.items()
    }
