"""What the loop asks of an accelerator: one protocol for one device and for many ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from harness.data.batch import Batch
from harness.pytree import StateDict

StepOpt = Callable[[Any], object]
"""Steps the optimizer that it is given; see ``Context.step_opt``."""


def default_step_opt(opt: Any) -> None:
    """Call ``opt.step()``."""
    opt.step()


class Accelerator(Protocol):
    """Placement of model and data, backward, stepping and talk between ranks.

    Attributes
    ----------
    device : torch.device
        Where this rank computes.
    rank, local_rank, world_size : int
        torch's words; 0, 0 and 1 on one device.
    is_main : bool
        True on rank 0.
    accumulate : >= 1
        Micro-batches to an optimizer step, as configured.
    window : >= 1
        Micro-batches in the present step; the loop sets a smaller number for a short last one.
    steps : dict of int
        Optimizer steps finished, by optimizer name; steps skipped on overflow do not count.
    counted : int or None
        Samples of the present batch that count on this rank: 0 where the batch only stands
        in for a rank that has none left; None where every sample counts.
    """

    device: torch.device
    rank: int
    local_rank: int
    world_size: int
    is_main: bool
    accumulate: int
    window: int
    steps: dict[str, int]

    @property
    def counted(self) -> int | None:
        """Samples of the present batch that count; None where all do."""
        ...

    def prepare(
        self,
        model: nn.Module,
        optimizers: Mapping[str, object] | None = None,
        loaders: Sequence[object] = (),
    ) -> tuple[nn.Module, dict[str, Any], list[Any]]:
        """Place the model, take over the optimizers, shard the loaders.

        The model comes back as the same object, ready to be called; the optimizers have
        ``step``, ``zero_grad``, ``param_groups``, ``state_dict`` and ``load_state_dict``.
        A loader that is None stays None.
        """
        ...

    def optimizing(self, name: str | None = None) -> AbstractContextManager[object]:
        """Hold the forward and backward of the optimizer `name` (None: the only one)."""
        ...

    def backward(self, loss: Tensor, name: str | None = None) -> None:
        """Add the gradients of ``loss / window``; `loss` is a scalar with a graph."""
        ...

    def counting_backward(
        self, name: str | None = None
    ) -> AbstractContextManager[object]:
        """Count one backward of ``loss`` made inside in the user's own way.

        One device takes any way; DeepSpeed needs ``backward`` to be called.
        """
        ...

    def is_boundary(self, name: str | None = None) -> bool:
        """True when as many backwards as the window holds have been done."""
        ...

    def step(
        self, name: str | None = None, step_opt: StepOpt = default_step_opt
    ) -> bool:
        """Step at a boundary and clear the gradients; True if the weights were changed."""
        ...

    def clip(
        self, max_norm: float, name: str | None = None, norm_type: float = 2.0
    ) -> Tensor:
        """Clip the total gradient norm, before ``step``; gives the norm found, a scalar."""
        ...

    def to_device(self, batch: Batch) -> Batch:
        """The batch with its tensors on ``device``; tuples, lists and mappings keep their form."""
        ...

    def gather(self, tensor: Tensor) -> Tensor:
        """Tensors of all ranks one after another along dim 0; their lengths may differ.

        While ``counted`` is 0 this rank gives no rows.
        """
        ...

    def reduce(
        self, tensor: Tensor, op: Literal["sum", "mean", "max"] = "sum"
    ) -> Tensor:
        """The tensor reduced over ranks; the same value on each."""
        ...

    def broadcast(self, value: object, src: int = 0) -> Any:
        """The value that rank `src` holds: numbers, strings, lists, dicts, tensors."""
        ...

    def any(self, flag: bool) -> bool:
        """True on every rank if it is on one."""
        ...

    def barrier(self) -> None:
        """Wait until every rank is here."""
        ...

    def full_state_dict(self, model: nn.Module) -> dict[str, Tensor]:
        """All weights and buffers, whole, detached, on the CPU; empty except on rank 0."""
        ...

    def state_dict(self) -> StateDict:
        """Weights, buffers, optimizers, gradients of an open window, counters: the rank's part.

        Tensors are live: copy them before the next step. The rest is what JSON can hold.
        """
        ...

    def load_state_dict(
        self,
        state: StateDict,
        parts: Sequence[str] = ("model", "optimizers"),
    ) -> None:
        """Take back what ``state_dict`` gave, all of it or one of the two parts.

        Raises
        ------
        CheckpointError
            If it is of another model, other optimizers, or another number of ranks.
        """
        ...

    def finish(self, *, failed: bool = False) -> None:
        """Release what ``prepare`` took: engines, hooks.

        Parameters
        ----------
        failed
            This rank ends alone, for the others may never come: nothing is gathered.
        """
        ...
