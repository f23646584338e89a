"""Records what the machine does during a fit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from harness.callback import Callback
from harness.callbacks.report.machine import (
    GPUReader,
    MachineReader,
    Sample,
    Sampler,
    import_optional,
)
from harness.checks.values import check_at_least, check_more_than
from harness.context import Context
from harness.pytree import StateDict

MAX_NAMED = 16
"""GPUs, or nodes, that are recorded by name. Of a thousand, nobody looks at 4,000 curves."""


class SystemMetrics(Callback):
    """Records the use of processor, memory, disk, network and the run's own GPUs.

    A background thread reads them. Their means are recorded every `every` optimizer steps
    and at the end of each epoch. MLflow shows them on its tab *System metrics*.

    Parameters
    ----------
    every : >= 1
        Optimizer steps from one record to the next.
    every_s : > 0
        Seconds from one sample to the next.

    Raises
    ------
    ImportError
        Before the first epoch, if ``psutil`` is not installed.

    Notes
    -----
    Recorded are ``cpu_frac`` and ``memory_frac`` of the machine, ``process_cpus`` (1 is one
    core), ``process_memory_bytes``, ``disk_free_bytes`` of the run's disk, rates of disk and
    network, and ``data_wait_frac``: the share of the time between records in which training
    waited for its next batch.

    With ``nvidia-ml-py`` installed, each rank reads its own GPU: ``gpu0_frac``,
    ``gpu0_memory_bytes``, ``gpu0_power_w``, and ``gpu0_energy_j`` since the fit began. The
    number is the rank. With more than 16 GPUs, the lowest, mean and highest values are
    recorded (``gpus_min_frac``, ``gpus_mean_frac``, ``gpus_max_frac``), and the sum of
    their energy, ``gpus_energy_j``. On several machines, the values above are those of rank
    0's machine. The first rank of each other machine reads its own, such as
    ``node8_cpu_frac`` if rank 8 is the first one there; with more than 16 machines,
    ``nodes_min_cpu_frac`` and so on are recorded. Rank 0 records everything; the other
    ranks send it their values in one message per record.
    """

    # What other callbacks do at the end of a batch is no waiting for data.
    weight = math.inf

    def __init__(self, every: int = 100, *, every_s: float = 1.0) -> None:
        check_at_least("SystemMetrics(every)", every, 1, "Leave it out for 100.")
        place, advice = "SystemMetrics(every_s)", "Leave it out for 1 second."
        check_more_than(place, every_s, 0, advice)
        self.every, self.every_s = every, every_s
        self._sampler: Sampler | None = None
        self._last_step = 0

    def check(self, ctx: Context) -> None:
        """Refuse a fit without the package that reads the machine."""
        import_optional("psutil", "SystemMetrics", "psutil")

    def on_fit_begin(self) -> None:
        """Start to read."""
        self._stop()
        accelerator = self.ctx.accelerator
        readers: list[Any] = []
        if accelerator.is_main or accelerator.local_rank == 0:
            psutil = import_optional("psutil", "SystemMetrics", "psutil")
            read = MachineReader(psutil, str(self.ctx.run.path or ".")).read
            prefix = "" if accelerator.is_main else f"node{accelerator.rank}_"
            readers.append(lambda: {prefix + k: v for k, v in read().items()})
        gpu = find_gpu(accelerator.device, f"gpu{accelerator.rank}")
        if gpu is not None:
            readers.append(gpu.read)
        self._sampler = Sampler(readers, self.every_s)
        self._last_step, self._waited_s = 0, 0.0
        self._recorded_at = self._batch_ended_at = perf_counter()

    def on_train_begin(self) -> None:
        self._batch_ended_at = perf_counter()

    def on_train_batch_begin(self) -> None:
        """Count the time since the last batch as waiting."""
        self._waited_s += perf_counter() - self._batch_ended_at

    def on_train_batch_end(self) -> None:
        step = self.ctx.step
        if step != self._last_step and step % self.every == 0:
            self._record()
        self._batch_ended_at = perf_counter()

    def on_epoch_end(self) -> None:
        if self.ctx.step != self._last_step:
            self._record()

    def _record(self) -> None:
        assert self._sampler is not None
        accelerator = self.ctx.accelerator
        # At the same step on every rank. Rank 0 records for all.
        values = combine_samples(accelerator.gather_objects(dict(self._sampler.take())))
        now = perf_counter()
        passed_s, self._recorded_at = now - self._recorded_at, now
        if accelerator.is_main:
            values["data_wait_frac"] = min(self._waited_s / max(passed_s, 1e-9), 1.0)
        self._waited_s, self._last_step = 0.0, self.ctx.step
        if values and accelerator.is_main:
            ctx = self.ctx
            ctx.run.log("system", "", values, epoch=ctx.epoch, step=ctx.step)

    def _stop(self) -> None:
        if self._sampler is not None:
            self._sampler.stop()
            self._sampler = None

    def on_fit_end(self) -> None:
        self._stop()

    def on_exception(self) -> None:
        self._stop()

    def state_dict(self) -> StateDict:
        """Return the step of the last record."""
        return {"last_step": self._last_step}

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the step of the last record."""
        self._last_step = state["last_step"]


def combine_samples(samples: Sequence[Sample]) -> Sample:
    """Join what the ranks have read, in order of rank; of many of a kind, in a few numbers."""
    joined: Sample = {}
    for sample in samples:
        joined |= sample
    return _fold(_fold(joined, "gpu"), "node")


def _fold(values: Sample, family: str) -> Sample:
    """Give least, mean and greatest of what more than ``MAX_NAMED`` of a family have."""
    kinds: dict[str, list[float]] = {}
    others: Sample = {}
    for name, value in values.items():
        owner, _, kind = name.partition("_")
        if owner.removeprefix(family).isdigit():
            kinds.setdefault(kind, []).append(value)
        else:
            others[name] = value
    if max(map(len, kinds.values()), default=0) <= MAX_NAMED:
        return values
    for kind, found in kinds.items():
        if kind == "energy_j":
            others[f"{family}s_energy_j"] = sum(found)
        else:
            others[f"{family}s_min_{kind}"] = min(found)
            others[f"{family}s_mean_{kind}"] = sum(found) / len(found)
            others[f"{family}s_max_{kind}"] = max(found)
    return others


def find_gpu(device: torch.device, name: str) -> GPUReader | None:
    """Find the reader of a CUDA device; None without one, or without NVML."""
    if device.type != "cuda":
        return None
    try:
        nvml = import_optional("pynvml", "SystemMetrics", "nvidia-ml-py")
    except ImportError:
        return None
    try:
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        return GPUReader(nvml, uuid, name)
    except nvml.NVMLError:
        return None  # no driver, or a GPU that NVML does not know
