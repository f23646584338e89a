"""Read what a process and its machine use: processor, memory, disk, network, GPUs."""

from __future__ import annotations

import importlib
import threading
import warnings
from collections.abc import Callable
from time import monotonic
from typing import Any

Sample = dict[str, float]
"""Values by name. Names end in their unit: ``_frac``, ``_bytes``, ``_w``, ``_j``."""


def import_optional(name: str, place: str, package: str) -> Any:
    """Import a package that only some callbacks need."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        msg = f"{place}: expected the package {package!r}, got none."
        raise ImportError(f"{msg} Install it: pip install {package}.") from error


class MachineReader:
    """Reads processor, memory, disk and network of the machine and of this process.

    Rates are means since the last call of ``read``.

    Parameters
    ----------
    folder
        Folder whose disk is looked at.
    """

    def __init__(self, psutil: Any, folder: str = ".") -> None:
        self._psutil, self._folder = psutil, folder
        self._process = psutil.Process()
        self._at, self._counts = monotonic(), self._count_bytes()
        psutil.cpu_percent()  # the first call only begins to measure
        self._process.cpu_percent()

    def _count_bytes(self) -> Sample:
        disk, network = self._psutil.disk_io_counters(), self._psutil.net_io_counters()
        found: Sample = {}
        if disk is not None:
            found |= {"disk_read": disk.read_bytes, "disk_write": disk.write_bytes}
        if network is not None:
            found["network_received"] = network.bytes_recv
            found["network_sent"] = network.bytes_sent
        return found

    def read(self) -> Sample:
        """Read all values now."""
        now, counts = monotonic(), self._count_bytes()
        passed_s = max(now - self._at, 1e-3)
        rates = {
            f"{name}_bytes_per_s": max(count - self._counts.get(name, count), 0)
            / passed_s
            for name, count in counts.items()
        }
        self._at, self._counts = now, counts
        return rates | {
            "cpu_frac": self._psutil.cpu_percent() / 100,
            "process_cpus": self._process.cpu_percent() / 100,
            "memory_frac": self._psutil.virtual_memory().percent / 100,
            "process_memory_bytes": float(self._process.memory_info().rss),
            "disk_free_bytes": float(self._psutil.disk_usage(self._folder).free),
        }


class GPUReader:
    """Reads one GPU by NVML. What the driver does not tell is left out.

    Parameters
    ----------
    name
        First word of the names of its values.
    """

    def __init__(self, nvml: Any, uuid: str, name: str) -> None:
        nvml.nvmlInit()
        self._nvml, self._name = nvml, name
        uuid = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
        self._handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
        self._energy_at_start = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption)

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        try:
            return question(self._handle)
        except self._nvml.NVMLError:
            return None

    def read(self) -> Sample:
        """Read utilisation, memory, power, and the energy used since the start."""
        nvml = self._nvml
        usage = self._ask(nvml.nvmlDeviceGetUtilizationRates)
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo)
        power_mw = self._ask(nvml.nvmlDeviceGetPowerUsage)
        energy_mj = self._ask(nvml.nvmlDeviceGetTotalEnergyConsumption)
        found = {
            "frac": None if usage is None else usage.gpu / 100,
            "memory_bytes": None if memory is None else float(memory.used),
            "power_w": None if power_mw is None else power_mw / 1000,
        }
        if energy_mj is not None and self._energy_at_start is not None:
            found["energy_j"] = (energy_mj - self._energy_at_start) / 1000
        return {f"{self._name}_{n}": v for n, v in found.items() if v is not None}


class Sampler:
    """Reads values again and again in a thread of its own; gives their means.

    Parameters
    ----------
    readers
        Called in the thread, one after another.
    every_s
        Seconds from one sample to the next.

    Notes
    -----
    A reader that fails ends the thread with a warning; training continues.
    """

    def __init__(self, readers: list[Callable[[], Sample]], every_s: float) -> None:
        self._readers, self._every_s = readers, every_s
        self._lock, self._end = threading.Lock(), threading.Event()
        self._waiting: list[Sample] = []
        self._last: Sample = {}
        self._thread = threading.Thread(target=self._run, daemon=True, name="sampler")
        self._thread.start()

    def _run(self) -> None:
        while not self._end.wait(self._every_s):
            if not self._sample():
                return

    def _sample(self) -> bool:
        """Take a sample; False if that failed."""
        try:
            with self._lock:
                found: Sample = {}
                for read in self._readers:
                    found |= read()
                self._waiting.append(found)
        except Exception as error:  # noqa: BLE001  a display must not end a training
            self._readers = []
            msg = f"SystemMetrics: expected to read the machine, got {error!r}."
            warnings.warn(f"{msg} It stops; training continues.", stacklevel=2)
            return False
        return True

    def take(self) -> Sample:
        """Return the means of the samples since the last call; without one, take one now."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        if not waiting:
            if not self._last and self._readers:
                self._sample()
                waiting, self._waiting = self._waiting, []
            else:
                return self._last
        self._last = _average(waiting)
        return self._last

    def stop(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join(timeout=5)


def _average(samples: list[Sample]) -> Sample:
    """Mean of each value; of energy, which only grows, the last one."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for name, value in sample.items():
            values.setdefault(name, []).append(value)
    return {
        name: found[-1] if name.endswith("_j") else sum(found) / len(found)
        for name, found in values.items()
    }
