"""Exact averages over rows: of losses, and of functions used as metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from harness.data.batch import keep_number
from harness.pytree import StateDict

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator


class LossAverage:
    """Mean loss over rows, exact for batches of any size, for each optimizer name.

    Losses on a device stay there until the mean is computed; those on the CPU are kept as
    numbers. Sums are float64.

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
        self._waiting: dict[str, list[float | Tensor]] = {}
        self._rows: dict[str, list[int]] = {}
        self._sums: dict[str, Tensor] = {}

    def update(self, losses: object, rows: int) -> bool | None:
        """Add copies of the losses of a batch of `rows` rows; a single tensor is ``opt``.

        Returns
        -------
        Whether a loss is NaN; None if that is not known, because one is on a device.
        """
        if not isinstance(losses, dict):
            losses = {"opt": losses}
        is_nan: bool | None = False
        for name, loss in losses.items():
            kept = keep_number(loss, "ctx.loss")
            if type(kept) is not float:
                is_nan = None
            elif kept != kept and is_nan is False:
                is_nan = True
            if name not in self._waiting:
                self._waiting[name], self._rows[name] = [], []
            self._waiting[name].append(kept)
            self._rows[name].append(rows)
            if len(self._rows[name]) >= self.fold_at:
                self._fold(name)
        return is_nan

    @property
    def is_on_device(self) -> bool:
        """Whether losses wait on a device, unread."""
        return any(
            isinstance(loss, Tensor) and not loss.is_cpu
            for waiting in self._waiting.values()
            for loss in waiting[-1:]
        )

    def find_nan(self) -> int | None:
        """How many updates ago the first NaN came that still waits; None without one.

        All waiting losses are read from their device at once.
        """
        found = []
        for waiting in filter(None, self._waiting.values()):
            flags = stack_numbers(waiting).isnan().tolist()
            if True in flags:
                found.append(len(flags) - 1 - flags.index(True))
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


def _pack(losses: Sequence[float | Tensor]) -> list[Tensor]:
    """Losses in few tensors with one dim, so that a save copies them at once, and not each."""
    alike = groupby(losses, key=_kind_of)
    return [stack_numbers([*group]) for _, group in alike]


def _kind_of(loss: float | Tensor) -> object:
    return (loss.device, loss.dtype) if isinstance(loss, Tensor) else float


def _unpack(packed: Sequence[Any]) -> list[float | Tensor]:
    """What ``_pack`` was given; earlier checkpoints have a tensor for each loss."""
    losses: list[float | Tensor] = []
    for own in map(torch.as_tensor, packed):
        is_read = own.is_cpu and own.dtype == torch.float64
        losses += own.reshape(-1).tolist() if is_read else own.reshape(-1).unbind()
    return losses


def on_one_device(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors on the device of the last, where they are on several.

    A resume brings numbers from the CPU, and a step may log numbers of Python.
    """
    device = tensors[-1].device
    if all(tensor.device == device for tensor in tensors):
        return tensors
    *_, device = (tensor.device for tensor in tensors if not tensor.is_cpu)
    if device.type == "mps":  # which has no float64
        device = torch.device("cpu")
    return [tensor.to(device) for tensor in tensors]


def stack_numbers(numbers: Sequence[float | Tensor]) -> Tensor:
    """Numbers, in float64, and scalar tensors on any devices, as one tensor."""
    if all(type(number) is float for number in numbers):
        return torch.tensor(numbers, dtype=torch.float64)
    tensors = [
        number
        if isinstance(number, Tensor)
        else torch.tensor(number, dtype=torch.float64)
        for number in numbers
    ]
    return torch.stack(on_one_device(tensors))


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
