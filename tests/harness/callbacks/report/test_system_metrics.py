from __future__ import annotations

import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tracking
from harness.callbacks import SystemMetrics
from harness.callbacks.report.machine import GPUReader, Sampler, import_optional
from harness.callbacks.report.system_metrics import combine_samples, find_gpu
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import Case, adam
from tests.harness.fakes import At, line_learner, slope
from tracking.mlflow_store.keys import SeriesId, plain_key

OFF: dict[str, Any] = {"tracker": False, "verbose": False}
MACHINE = {
    *("cpu_frac", "process_cpus", "memory_frac", "process_memory_bytes"),
    *("disk_free_bytes", "network_received_bytes_per_s", "network_sent_bytes_per_s"),
    "data_wait_frac",
}


def recorded(tmp_path, *callbacks, **options):
    """Values by name and step that a fit of five steps an epoch records."""
    fitted = line_learner().fit(
        slope(10),
        callbacks=callbacks,
        dataloader_options={"batch_size": 2},
        tracker={"runs_dir": tmp_path, "delivery": False},
        verbose=False,
        **{"epochs": 2} | options,
    )
    rows = tracking.open(fitted.run_path).records(what="system").to_pylist()
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        series = SeriesId(row["what"], row["set"], row["name"])
        assert plain_key(series).startswith("system/")
        found.setdefault(row["name"], {})[row["step"]] = row["value"]
    assert "system" not in fitted.records
    return found


def test_system_metrics_are_recorded_by_step_and_at_the_ends_of_epochs(tmp_path):
    found = recorded(tmp_path, SystemMetrics(2, every_s=0.01))
    assert set(found) >= MACHINE
    for name in MACHINE:
        assert list(found[name]) == [2, 4, 5, 6, 8, 10]
        assert all(value >= 0 for value in found[name].values())
    for name in ("cpu_frac", "memory_frac", "data_wait_frac"):
        assert all(value <= 1 for value in found[name].values())
    assert found["process_memory_bytes"][10] > 1e7
    assert not any(t.name == "sampler" for t in threading.enumerate())


def test_time_spent_waiting_for_data_is_counted(tmp_path):
    class Slow(torch.utils.data.Dataset):
        def __len__(self):
            return 10

        def __getitem__(self, row):
            time.sleep(0.01)
            return torch.ones(()), torch.ones(())

    fitted = line_learner().fit(
        Slow(),
        1,
        callbacks=[SystemMetrics()],
        dataloader_options={"batch_size": 5},
        tracker={"runs_dir": tmp_path, "delivery": False},
        verbose=False,
    )
    run = tracking.open(fitted.run_path)
    rows = run.records(what="system").to_pylist()
    (share,) = [row["value"] for row in rows if row["name"] == "data_wait_frac"]
    took_s = fitted.records["profile"]["train"][0]["epoch_s"]
    assert (
        share * (took_s + 5) >= 0.1
    )  # ten times 10 ms, and some time before the epoch
    assert share <= 1


def test_system_metrics_resume_exactly(tmp_path):
    case = Case(learner=adam, accumulate=2, callbacks=lambda folder: [SystemMetrics(2)])
    check_exact(case, tmp_path, [("on_train_batch_end", 5)])


def test_sampler_ends_with_the_fit_that_fails():
    def fail(ctx):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        line_learner().fit(
            slope(4), 1, callbacks=[SystemMetrics(), At("on_epoch_end", fail)], **OFF
        )
    assert not any(t.name == "sampler" for t in threading.enumerate())


def test_sampler_gives_means_and_the_last_energy():
    numbers, taken = iter([1.0, 3.0, 5.0]), threading.Event()

    def read():
        value = next(numbers)
        if value == 5.0:
            taken.set()
            raise StopIteration
        return {"gpu0_frac": value, "gpu0_energy_j": value}

    def run():
        sampler = Sampler([read], 0.001)
        assert taken.wait(10)
        sampler.stop()
        return sampler

    with pytest.warns(UserWarning, match="expected to read the machine, got StopIter"):
        sampler = run()
    assert sampler.take() == {"gpu0_frac": 2.0, "gpu0_energy_j": 3.0}
    assert sampler.take() == {"gpu0_frac": 2.0, "gpu0_energy_j": 3.0}


class FakeNVML:
    """A GPU that does not tell its power, as in some containers."""

    class NVMLError(Exception):
        pass

    def __init__(self) -> None:
        self.energy_mj, self.asked = 5000, []

    def nvmlInit(self) -> None:
        self.asked.append("init")

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        self.energy_mj += 1500
        return self.energy_mj

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        return SimpleNamespace(gpu=40, memory=10)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=2**30, total=2**33)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        raise self.NVMLError


def test_gpu_is_found_by_its_uuid_and_read():
    nvml = FakeNVML()
    reader = GPUReader(nvml, "1234-ab", "gpu1")
    assert nvml.asked == ["init", "GPU-1234-ab"]
    assert reader.read() == {
        "gpu1_frac": 0.4,
        "gpu1_memory_bytes": 2.0**30,
        "gpu1_energy_j": 1.5,
    }
    assert find_gpu(torch.device("cpu"), "gpu0") is None


@pytest.mark.gpu
def test_gpu_of_the_machine_is_read():
    reader = find_gpu(torch.device("cuda"), "gpu0")
    assert reader is None or reader.read()["gpu0_memory_bytes"] > 0


def test_missing_package_is_named():
    with pytest.raises(
        ImportError, match=r"SystemMetrics: expected the package 'no-such'.*pip install"
    ):
        import_optional("no_such_package", "SystemMetrics", "no-such")


@pytest.mark.parametrize("options", [{"every": 0}, {"every_s": 0}, {"every_s": "a"}])
def test_system_metrics_options_are_checked(options):
    with pytest.raises((ValueError, TypeError), match=r"SystemMetrics\(every"):
        SystemMetrics(**options)


def test_gpus_of_ranks_are_joined_and_many_are_summed_up():
    def read(rank):
        return {f"gpu{rank}_frac": rank / 100, f"gpu{rank}_energy_j": 2.0}

    first = {"cpu_frac": 0.5} | read(0)
    assert combine_samples([first, read(1), {}]) == first | read(1)
    many = combine_samples([first, *map(read, range(1, 21))])
    assert many == {
        "cpu_frac": 0.5,
        "gpus_min_frac": 0.0,
        "gpus_mean_frac": pytest.approx(0.1),
        "gpus_max_frac": 0.2,
        "gpus_energy_j": 42.0,
    }
    assert combine_samples([{}, {}]) == {}


@pytest.mark.parametrize(
    ("rank", "local_rank", "name"),
    [(0, 0, "cpu_frac"), (8, 0, "node8_cpu_frac"), (9, 1, None)],
)
def test_first_rank_of_each_machine_reads_it(rank, local_rank, name):
    callback, found = SystemMetrics(every_s=0.01), set()
    accelerator = SimpleNamespace(
        rank=rank, local_rank=local_rank, is_main=rank == 0, device=torch.device("cpu")
    )
    callback.ctx = SimpleNamespace(  # type: ignore[assignment]
        accelerator=accelerator, run=SimpleNamespace(path=None)
    )
    callback.on_fit_begin()
    try:
        for _ in range(500 if name else 5):
            assert callback._sampler is not None
            found |= callback._sampler.take().keys()
            if name in found:
                break
            time.sleep(0.01)
    finally:
        callback.on_fit_end()
    assert (name in found) == (name is not None)
    assert {each.startswith("node8_") for each in found} == (
        {rank == 8} if name else set()
    )


def test_many_machines_are_told_in_a_few_numbers():
    nodes = [{f"node{8 * n}_cpu_frac": n / 16} for n in range(1, 17)]
    assert combine_samples([{"cpu_frac": 0.5}, *nodes])["node128_cpu_frac"] == 1.0
    many = combine_samples([{"cpu_frac": 0.5}, {"node136_cpu_frac": 0.0}, *nodes])
    assert many == {
        "cpu_frac": 0.5,
        "nodes_min_cpu_frac": 0.0,
        "nodes_mean_cpu_frac": pytest.approx(0.5),
        "nodes_max_cpu_frac": 1.0,
    }
