"""Saves checkpoints beside a training that goes on: copy at once, write in the background."""

from __future__ import annotations

import _thread
import hashlib
import platform
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.checkpoint.format import (
    Phase,
    begin,
    checkpoints,
    commit,
    give_up,
    place_of,
    remove,
    write_part,
)
from harness.checkpoint.state import capture_state, get_position
from harness.context import Context
from harness.data.loaders import unwrap_tensors
from harness.pytree import flatten
from harness.reshard.consolidated import weights_dtype


def about_fit(ctx: Context) -> dict[str, Any]:
    """What a resume compares with the fit that it goes on from."""
    model, data = ctx.model, ctx.train_data
    assert ctx.accelerator is not None
    return {
        "model": f"{type(model).__module__}:{type(model).__qualname__}",
        "hparams": str(ctx.hparams),
        "opt_hparams": str(ctx.opt_hparams),
        "rows": _length(getattr(data, "dataset", None)),
        "data": _digest(getattr(data, "dataset", None)),
        "batch_size": getattr(data, "batch_size", None),
        "num_workers": getattr(data, "num_workers", None),
        "accumulate": ctx.accelerator.accumulate,
        "accelerator": type(ctx.accelerator).__name__,
        "dtype": weights_dtype(model),
        "device": device_name(ctx.accelerator.device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def device_name(device: torch.device) -> str:
    """What the device is, with the model of a GPU and the code a CPU can run."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"cpu {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def _digest(dataset: Any) -> str | None:
    """Digest of a thousand rows, where they are at hand in tensors."""
    found = unwrap_tensors(dataset)
    if found is None:
        return None
    digest = hashlib.sha256()
    for tensor in found[0]:
        some = tensor[:: max(1, len(tensor) // 1000)].detach().cpu().contiguous()
        digest.update(f"{tuple(tensor.shape)} {tensor.dtype}".encode())
        if some.numel():
            digest.update(some.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


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
    What goes wrong with a write is given by ``wait``, once; the next save tries again.
    """

    def __init__(self, folder: Path, ctx: Context) -> None:
        self.folder, self._ctx = folder, ctx
        self._copies: dict[str, Tensor] = {}
        self._temporary: Path | None = None
        self._under_way: threading.Event | None = None
        self._fault: Exception | None = None

    def begin(self, phase: Phase) -> str | None:
        """Make room for a checkpoint of the present moment.

        Parameters
        ----------
        phase
            As in ``Position``.

        Returns
        -------
        name of the checkpoint; None on all ranks if there is no room, see ``wait``
        """
        self.wait()
        ctx, accelerator = self._ctx, self._ctx.accelerator
        assert accelerator is not None
        path = None
        if accelerator.is_main:
            try:
                path = str(begin(self.folder, get_position(ctx, phase)))
            except OSError as error:
                self._fault = error
        path = accelerator.broadcast(path)
        self._temporary = Path(path) if path is not None else None
        return place_of(self._temporary).name if self._temporary else None

    def save(self, phase: Phase) -> None:
        """Take the checkpoint that ``begin`` made room for.

        Raises
        ------
        TypeError
            If a callback's state holds what cannot be written; its path is named.
        """
        assert self._temporary is not None
        state = capture_state(self._ctx, phase)
        run = {"id": state.pop("run"), "path": self._run_path()}
        manifest = {"position": state["position"], "run": run, "about": self._ctx.about}
        plan, live = flatten(state)
        self._start(self._write, plan, self._copied(live), manifest)

    def warm(self) -> None:
        """Get the memory for copies beside the training: the first save finds it there."""
        assert self._ctx.accelerator is not None
        if self._copies or self._under_way is not None:
            return
        _, live = flatten(self._ctx.accelerator.state_dict(), "state/accelerator")
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in live.items()}

        def touch() -> None:
            for name, (shape, dtype) in shapes.items():
                self._copies[name] = torch.empty(shape, dtype=dtype).zero_()

        self._start(touch)

    def _start(self, work: Callable[..., None], *args: Any) -> None:
        """Do it in the background, where a second Ctrl-C does not wait for it."""
        assert self._under_way is None
        is_done = self._under_way = threading.Event()

        def do() -> None:
            try:
                work(*args)
            finally:
                is_done.set()

        # Thread.start() would wait until the thread runs, on busy cores for long.
        _thread.start_new_thread(do, ())

    def _run_path(self) -> str | None:
        """Folder of the run, so that a resume finds it again."""
        path = self._ctx.run.path
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
        self, plan: Any, tensors: Mapping[str, Tensor], manifest: Mapping[str, Any]
    ) -> None:
        """Write and put in place; runs in the background."""
        accelerator, temporary = self._ctx.accelerator, self._temporary
        assert accelerator is not None and temporary is not None
        try:
            write_part(temporary, accelerator.rank, plan, tensors)
            if accelerator.is_main:
                commit(temporary, accelerator.world_size, manifest)
        except Exception as error:  # noqa: BLE001  told by wait(), in the training thread
            give_up(temporary, accelerator.rank)
            self._fault = error

    def wait(self) -> Exception | None:
        """Wait for what is under way; gives what went wrong with it, once."""
        if self._under_way is not None:
            self._under_way.wait()
            self._under_way = None
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
