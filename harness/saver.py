"""Saves checkpoints beside a training that goes on: copy at once, write in the background."""

from __future__ import annotations

import platform
import shutil
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.checkpoint import Position, begin, checkpoints, commit, write_part
from harness.context import Context, Phase
from harness.tree import flatten


def about_fit(ctx: Context) -> dict[str, Any]:
    """What a resume compares with the fit that it goes on from."""
    model, data = ctx.model, ctx.train_data
    assert ctx.accelerator is not None
    return {
        "model": f"{type(model).__module__}:{type(model).__qualname__}",
        "hparams": str(ctx.hparams),
        "opt_hparams": str(ctx.opt_hparams),
        "rows": _length(getattr(data, "dataset", None)),
        "batch_size": getattr(data, "batch_size", None),
        "num_workers": getattr(data, "num_workers", None),
        "accumulate": ctx.accelerator.accumulate,
        "device": ctx.accelerator.device.type,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def _length(dataset: Any) -> int | None:
    """Rows of a data set, where it knows."""
    try:
        return len(dataset)
    except TypeError:
        return None


class Saver:
    """Writes the checkpoints of one fit into a folder, one at a time.

    Parameters
    ----------
    folder
        Where they go; made if it is not there.
    ctx
        Context of the fit.

    Notes
    -----
    ``save`` copies the tensors to the CPU, into memory that it keeps for the next time, and
    gives them to a thread that writes. It waits only for an earlier write still under way.
    A failed write is told once; the training goes on and the next save tries again.
    """

    def __init__(self, folder: Path, ctx: Context) -> None:
        self.folder, self._ctx = folder, ctx
        self._copies: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._fault: Exception | None = None
        self.saved: list[str] = []

    def save(self, phase: Phase) -> str:
        """Take a checkpoint of the present moment; gives its name.

        Parameters
        ----------
        phase
            As in ``Position``.
        """
        self.wait()
        ctx = self._ctx
        accelerator = ctx.accelerator
        assert accelerator is not None
        state = ctx.state_dict(phase)
        del state["model"]
        position = Position(**state["position"])
        plan, live = flatten(state)
        tensors = self._copied(live)
        manifest = {
            "position": state["position"],
            "run": {"id": getattr(ctx.recorder, "id", None), "path": self._run_path()},
            "about": ctx.about,
        }
        temporary = self.folder / f".{position.name}.tmp"
        if accelerator.is_main:
            begin(self.folder, position.name)
        accelerator.barrier()
        self._thread = threading.Thread(
            target=self._write,
            args=(temporary, position.name, plan, tensors, manifest),
            name="checkpoint",
        )
        self._thread.start()
        return position.name

    def _run_path(self) -> str | None:
        """Folder of the run, so that a resume finds it again."""
        path = getattr(self._ctx.recorder, "path", None)
        return None if path is None else str(Path(path).absolute())

    def _copied(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies on the CPU, into the memory of the last save where it fits."""
        copies = {}
        for name, tensor in live.items():
            old = self._copies.get(name)
            fits = old is not None and old.shape == tensor.shape
            if old is None or not fits or old.dtype != tensor.dtype:
                old = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            copies[name] = old.copy_(tensor, non_blocking=True)
        if any(tensor.device.type == "cuda" for tensor in live.values()):
            torch.cuda.synchronize()
        self._copies = copies
        return copies

    def _write(
        self,
        temporary: Path,
        name: str,
        plan: Any,
        tensors: Mapping[str, Tensor],
        manifest: Mapping[str, Any],
    ) -> None:
        """Write and put in place; runs in the background."""
        accelerator = self._ctx.accelerator
        assert accelerator is not None
        try:
            write_part(temporary, accelerator.rank, plan, tensors)
            if accelerator.is_main:
                commit(temporary, self.folder / name, accelerator.world_size, manifest)
        except Exception as error:  # noqa: BLE001  told by wait(), in the training thread
            self._fault = error
        else:
            self.saved.append(name)

    def wait(self) -> Exception | None:
        """Wait for the write under way; gives what went wrong with it, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        fault, self._fault = self._fault, None
        return fault

    def prune(self, keep_last: int, keep: set[str]) -> None:
        """Remove all but the newest `keep_last` checkpoints and those named; on rank 0."""
        assert self._ctx.accelerator is not None
        if not self._ctx.accelerator.is_main:
            return
        for place in checkpoints(self.folder)[keep_last:]:
            if place.name not in keep:
                remove(place)


def remove(place: Path) -> None:
    """Remove a checkpoint; its name goes first, so that a half removed one is not found."""
    away = place.with_name(f".{place.name}.removed")
    shutil.rmtree(away, ignore_errors=True)
    place.rename(away)
    shutil.rmtree(away, ignore_errors=True)
