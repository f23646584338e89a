"""Where the weights of a fitted model are: in this process, on rank 0, or in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.accelerators.distributed.watchdog import Watchdog
from harness.checkpoint.held.objects import set_extra_states
from harness.checkpoint.ranks.errors import raise_together
from harness.checkpoint.ranks.merge import MergedWeights
from harness.checkpoint.weights import NO_TENSORS, ReadTensor
from harness.errors import CheckpointError
from harness.export.summary import format_size
from harness.reshard.meta_parameters import (
    allocate_parameters,
    count_bytes,
    has_meta_parameters,
    release_parameters,
    replace_parameters,
)

if TYPE_CHECKING:
    from harness.accelerators.base import Accelerator

EVERY_RANK_BYTES = 1 << 24
"""A model up to this size stays on every rank after a fit, a larger one on rank 0."""


@dataclass(kw_only=True, eq=False)
class ModelPlacement:
    """A fitted model, and where its weights are."""

    #: the model; its parameters are on the ``meta`` device where this process does not
    #: hold them
    module: nn.Module
    #: ``each``: every rank holds the weights. ``main``: rank 0. ``checkpoint``: no
    #: rank, unless it has read them.
    holder: Literal["each", "main", "checkpoint"] = "each"
    checkpoint: Path | None = None  #: the checkpoint of the weights, if they are in one
    rank: int = 0

    @property
    def is_here(self) -> bool:
        """Whether this process holds the weights."""
        return not has_meta_parameters(self.module)

    def get(self) -> nn.Module:
        """Return the model with its weights.

        Raises
        ------
        RuntimeError
            If this process does not hold them; the message says what that would need.
        """
        if self.is_here:
            return self.module
        size = format_size(count_bytes(self.module))
        msg = (
            f"Fitted.model: expected the weights in memory, got them in {self._place()}"
        )
        if self.checkpoint is not None:
            advice = (
                f"reads them, which needs {size}; 'harness export-weights' needs less"
            )
            raise RuntimeError(f"{msg}. fitted.gather() {advice}.")
        advice = f"called on every rank, sends them, which needs {size} on each"
        work = "evaluate, predict, fit and save work without"
        raise RuntimeError(f"{msg}. fitted.gather(), {advice}; {work}.")

    def _place(self) -> str:
        if self.checkpoint is not None:
            return f"the checkpoint {str(self.checkpoint)!r}"
        return f"rank 0, not on rank {self.rank}"

    # ------------------------------------------------------------------ on demand

    def gather(self, accelerator: Accelerator) -> nn.Module:
        """Take the weights into the memory of this process, to stay.

        If rank 0 holds them, every rank must call it.
        """
        cpu = torch.device("cpu")
        if self.holder == "main":
            accelerator.meet("Fitted.gather")
            allocate_parameters(self.module, cpu)
            accelerator.share_weights(self.module)
            self.holder = "each"
        elif not self.is_here:
            self._fill(cpu)
        return self.module

    @contextmanager
    def allocate(self, accelerator: Accelerator) -> Iterator[nn.Module]:
        """Give the model inside, with memory for its weights on every rank.

        Every rank must call it. The values are those of rank 0: ``share_weights`` sends
        them, and so does ``prepare`` of an accelerator. Afterwards the weights are where
        they were.
        """
        was_here = self.is_here
        self._allocate(accelerator)
        try:
            yield self.module
        finally:
            if was_here:
                self.module.cpu()
            else:
                release_parameters(self.module)

    @contextmanager
    def full_on_each_rank(self, accelerator: Accelerator) -> Iterator[nn.Module]:
        """Give the model with its values on every rank inside; every rank must call it."""
        if self.holder == "each":
            yield self.get()
        else:
            with self.allocate(accelerator) as model:
                accelerator.share_weights(model)
                yield model

    def _allocate(self, accelerator: Accelerator) -> None:
        msg = "Fitted: expected weights that rank 0 can read, got an error there."
        kinds = (CheckpointError, RuntimeError)
        with raise_together(accelerator, f"{msg} See its message.", kinds):
            if accelerator.is_main and not self.is_here:
                self._fill(accelerator.device)
        if not self.is_here:
            allocate_parameters(self.module, accelerator.device)

    def _fill(self, device: torch.device) -> None:
        """Read the weights from the checkpoint, one after another."""
        if self.checkpoint is None:
            self.get()  # raises
        merged = self._open()
        read = self._reader(merged)
        replace_parameters(
            self.module,
            lambda param: read(param).to(device) if param.is_meta else param.data,
        )
        set_extra_states(self.module, merged.extra)

    def _open(self) -> MergedWeights:
        assert self.checkpoint is not None
        merged = MergedWeights(self.checkpoint)
        for name, param in self.module.named_parameters():
            got = merged.specs[name].shape if name in merged else None
            if got != param.shape:
                msg = f"checkpoint {str(self.checkpoint)!r}: expected {name!r} of shape"
                wanted = f"{tuple(param.shape)}, got {got and tuple(got)}"
                raise CheckpointError(f"{msg} {wanted}. It is of another model.")
        return merged

    def _reader(self, merged: MergedWeights) -> Callable[[nn.Parameter], Tensor]:
        names = {id(param): name for name, param in self.module.named_parameters()}
        return lambda param: merged[names[id(param)]].to(param.dtype)

    # -------------------------------------------------------------------- writing

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the weights: one that holds them, or else rank 0."""
        return self.is_here or (self.holder == "checkpoint" and self.rank == 0)

    def open_parameters(self) -> ReadTensor:
        """Return what reads a parameter that has no memory here, by its name."""
        if self.is_here:
            return NO_TENSORS.__getitem__
        read = self._reader(self._open())
        params = self.module.state_dict(keep_vars=True)
        return lambda name: read(params[name])

    @contextmanager
    def write_on_one_rank(self, what: str) -> Iterator[bool]:
        """Write inside if the value is True; otherwise rank 0 does, and it is waited for.

        Parameters
        ----------
        what
            What is written, the same on every rank.
        """
        watchdog = Watchdog.find()
        if self.is_writer:
            yield True
            if watchdog is not None and self.holder != "each" and self.rank == 0:
                watchdog.barrier.announce(what)
        elif watchdog is None:
            self.get()  # raises: rank 0 is in another process, of which nothing is known
        else:
            yield False
            watchdog.barrier.await_main(what)
