"""What only a CUDA device can show; one is enough."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchmetrics
from torch import Tensor, nn

import harness
import tracking
from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.host_copies import HostCopies
from harness.accelerators.single import SingleDevice
from harness.callbacks import ModelCheckpoint, ResumeFromCheckpoint
from harness.checkpoint.format import list_checkpoints
from harness.data.batch import move
from harness.data.loaders import get_device_options, make_train_loader
from harness.metrics.loss import LossAverage
from harness.pytree import map_tensors
from harness.rng import derive_rng_state, get_rng_state, set_rng_state
from tests.harness.accelerators.cases import (
    TRAINING,
    Batch,
    Lab,
    Net,
    check_equal,
    plain,
    regression,
    seeded,
    sgd,
    train_window,
    windows,
)
from tests.harness.accelerators.launches import ROOT, free_port, rank_environment

pytestmark = pytest.mark.gpu

STAGES = [0, 1, 2, 3]
PATHS = {"PYTHONPATH": os.pathsep.join([os.fspath(ROOT), *sys.path])}


@pytest.fixture
def make() -> Iterator[Any]:
    """Accelerators on the GPU, finished afterwards."""
    with ExitStack() as stack:

        def made(stage: int, accumulate: int = 1, **config: Any) -> Any:
            zero = {"stage": stage, **config.pop("zero_optimization", {})}
            found = DeepSpeedAccelerator(
                {"zero_optimization": zero, **config}, accumulate=accumulate
            )
            assert found.device.type == "cuda"
            stack.callback(found.finish)
            return found

        yield made


def trained(accelerator: Any, optimizers: Any, data: Any) -> dict[str, Tensor]:
    """Whole weights after a short training."""
    model = seeded(Net)
    model, opts, _ = accelerator.prepare(model, optimizers(model))
    for window in data:
        lab = Lab(0, Path())
        train_window(lab, accelerator, model, opts, regression, window)
    return accelerator.full_state_dict(model)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("config", "rtol", "atol"),
    [
        ({}, 1e-5, 1e-6),
        ({"bf16": {"enabled": True}}, 5e-2, 5e-3),
        ({"fp16": {"enabled": True, "initial_scale_power": 8}}, 2e-2, 2e-3),
        ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, 5e-2, 5e-3),
    ],
    ids=["float32", "bf16", "fp16", "autocast"],
)
def test_precision_is_near_plain_torch(
    stage: int, config: dict[str, Any], rtol: float, atol: float, make: Any
) -> None:
    data = windows(1, [1, 2, 2])
    wanted = plain(Net, sgd, regression, data, each_micro=False)
    found = trained(make(stage, 2, **config), sgd, data)
    check_equal(found, wanted, rtol=rtol, atol=atol)


HALVES = {
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 32}},
    "autocast": {"torch_autocast": {"enabled": True, "dtype": "float16"}},
}


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("stage", STAGES)
def test_fp16_overflow_is_skipped_and_counted(stage: int, half: str, make: Any) -> None:
    accelerator = make(stage, **HALVES[half])
    found = trained_until_stepped(accelerator)
    assert accelerator.overflows["opt"] > 0
    assert accelerator.steps["opt"] == 1
    assert all(bool(value.isfinite().all()) for value in found.values())


def trained_until_stepped(accelerator: Any) -> dict[str, Tensor]:
    """Weights after the first step that was no overflow."""
    model = seeded(Net)
    model, _, _ = accelerator.prepare(model, sgd(model))
    batch: Batch = accelerator.to_device(windows(1, [1])[0][0][0])
    for _ in range(64):
        with accelerator.optimizing():
            # autocast scales by 2 ** 16 at first
            accelerator.backward(regression(model, "opt", batch) * 1000)
        if accelerator.step():
            break
    return accelerator.full_state_dict(model)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="DeepSpeed builds it by nvcc")
@pytest.mark.parametrize("stage", STAGES)
def test_fused_adam_of_the_config_trains(stage: int, make: Any) -> None:
    data = windows(1, [1, 1])
    params = {"lr": 1e-2, "weight_decay": 0.0}
    accelerator = make(stage, optimizer={"type": "AdamW", "params": params})
    model = seeded(Net)
    model, opts, _ = accelerator.prepare(model, {})
    for window in data:
        train_window(Lab(0, Path()), accelerator, model, opts, regression, window)

    def adam(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
        return {"opt": torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)}

    wanted = plain(Net, adam, regression, data, each_micro=False)
    check_equal(accelerator.full_state_dict(model), wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_offload_to_the_cpu_trains(stage: int, make: Any) -> None:
    data = windows(1, [1, 2])
    zero = {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    found = trained(make(stage, 2, zero_optimization=zero), sgd, data)
    wanted = plain(Net, sgd, regression, data, each_micro=False)
    check_equal(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "saved_in_an_open_window_goes_on_bit_for_bit",
        "model_stays_the_users_object_and_is_plain_afterwards",
    ],
)
@pytest.mark.parametrize("stage", STAGES)
def test_contract_on_the_gpu(name: str, stage: int, tmp_path: Path) -> None:
    class OnGpu(Lab):
        def make(self, accumulate: int = 1, **config: Any) -> Any:
            zero = {"zero_optimization": {"stage": stage}}
            return DeepSpeedAccelerator(zero | config, accumulate=accumulate)

    TRAINING[name](OnGpu(stage=stage, folder=tmp_path))


def test_whole_weights_come_back_on_the_cpu(make: Any) -> None:
    accelerator = make(3, bf16={"enabled": True})
    model = seeded(Net)
    accelerator.prepare(model, sgd(model))
    assert next(model.parameters()).device.type == "cuda"
    found = accelerator.full_state_dict(model)
    assert {value.device.type for value in found.values()} == {"cpu"}
    accelerator.finish()
    assert {param.device.type for param in model.parameters()} == {"cpu"}


def test_group_of_one_rank_serves_both_devices(make: Any) -> None:
    make(0)
    for device in ("cuda", "cpu"):
        mine = torch.arange(3.0, device=device)
        torch.distributed.all_reduce(mine)  # by NCCL, and by gloo
        assert mine.tolist() == [0.0, 1.0, 2.0]


TRAVELS = """
import torch
from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
from harness.accelerators.distributed.group import PeerError
accelerator = DeepSpeedAccelerator({})
rank = accelerator.rank
assert accelerator.device == torch.device("cuda", rank)
rows = torch.full((rank + 1, 2), rank, device="cuda")
found = accelerator.gather(rows)
assert found.device == accelerator.device
assert found[:, 0].tolist() == [0, 1, 1]
assert accelerator.reduce(rows[0].float(), "mean").tolist() == [0.5, 0.5]
assert accelerator.any(rank == 1)
sent = accelerator.broadcast({"t": rows} if rank == 0 else None)["t"]
assert sent.device == accelerator.device
try:
    accelerator.gather(torch.zeros(1, 2 + rank, device="cuda"))
except (PeerError, ValueError):
    print("travelled")
"""


def start_two(text: str) -> list[subprocess.Popen[str]]:
    """A program on two ranks of this machine."""
    port = free_port()
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", text],
            env=rank_environment(rank, 2, port) | PATHS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]


def test_values_travel_between_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for rank in start_two(TRAVELS):
        said, errors = rank.communicate(timeout=120)
        assert "travelled" in said, errors


DIES = """
import os, torch
from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator
accelerator = DeepSpeedAccelerator({})
if accelerator.rank == 1:
    os._exit(9)
accelerator.reduce(torch.ones(3, device="cuda"))
torch.cuda.synchronize()
"""


def test_death_of_a_rank_ends_another_one_that_waits_in_a_collective() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    for rank in start_two(DIES):
        rank.communicate(timeout=120)
        assert rank.returncode != 0


def test_two_ranks_on_one_device_are_refused(tmp_path: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("there are several devices")
    text = "from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator as A; A({})"
    ranks = start_two(text)
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks)
    assert "".join(said).count("expected a device for each of 2 ranks, got 1") == 1


def test_one_device_needs_no_engine() -> None:
    found = trained(SingleDevice("cuda"), sgd, windows(1, [1, 2]))
    wanted = plain(Net, sgd, regression, windows(1, [1, 2]), each_micro=False)
    check_equal(found, wanted, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------- nothing waits in a step


def test_steady_step_on_one_device_reads_nothing_from_it() -> None:
    accelerator, losses = SingleDevice("cuda"), LossAverage()
    model = seeded(Net)
    opt = torch.optim.AdamW(model.parameters(), fused=True)
    accelerator.prepare(model, {"opt": opt})
    batch = accelerator.to_device(windows(1, [1])[0][0][0])
    try:
        for number in range(6):
            if number == 3:  # what allocates and chooses kernels is done
                torch.cuda.set_sync_debug_mode("error")
            with accelerator.optimizing():
                loss = regression(model, "opt", batch)
                accelerator.backward(loss)
            accelerator.clip(1.0)
            assert accelerator.step()
            losses.update(loss, 4)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("stage", STAGES)
def test_deepspeed_waits_for_the_device_in_no_step(
    stage: int, make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator, model = make(stage), seeded(Net)
    accelerator.prepare(model, sgd(model))
    batch = accelerator.to_device(windows(1, [1])[0][0][0])
    waits: list[int] = []
    for number in range(6):
        if number == 3:
            monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(1))
        with accelerator.optimizing():
            accelerator.backward(regression(model, "opt", batch))
        assert accelerator.step()
    assert waits == []


def test_batch_is_complete_after_it_moved_to_the_cpu() -> None:
    big = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        big = big @ big / 64.0  # keeps the device busy
    found = move(big, torch.device("cpu"))
    wanted = big.cpu()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_batches_of_tensors_are_pinned_and_right() -> None:
    data = torch.arange(4e6).reshape(1000, 4000)
    loader = make_train_loader(
        (data, data[:, 0]),
        {"batch_size": 50},
        like=get_device_options(torch.device("cuda")),
    )
    moved = []
    for rows, few in loader:
        assert rows.is_pinned()
        assert not few.is_pinned()  # which would take longer
        moved.append(move(rows, torch.device("cuda")))
    found = torch.cat(moved).cpu()
    assert torch.equal(found[found[:, 0].argsort()], data)


# ------------------------------------------------------------------------- resumes


class Dropped(nn.Module):
    """A net that draws random numbers on its device."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 64), nn.Dropout(0.5), nn.Linear(64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({}, "fp32"),
        ({"fused": True}, "fp32"),
        ({"capturable": True}, "fp32"),
        ({"fused": True}, "fp16"),
    ],
    ids=str,
)
def test_resume_of_a_fit_with_dropout_is_exact(
    options: dict[str, bool], precision: Any, tmp_path: Path
) -> None:
    data = torch.randn(64, 5), torch.randn(64, 1)
    learner = harness.setup(Dropped, loss=nn.MSELoss(), optimizer=torch.optim.AdamW)
    learner = learner.set_opt_hparams(lr=1e-2, **options)

    def fit(epochs: int, *own: Any) -> dict[str, Tensor]:
        fitted = learner.fit(
            data,
            epochs,
            callbacks=own,
            seed=1,
            tracker=False,
            accelerator=SingleDevice("cuda", precision=precision),
        )
        found: dict[str, Tensor] = fitted.model.state_dict()
        return found

    torch.use_deterministic_algorithms(True)
    try:
        whole = fit(4)
        fit(2, ModelCheckpoint(tmp_path))
        resumed = fit(4, ResumeFromCheckpoint(tmp_path, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, wanted in whole.items():
        torch.testing.assert_close(resumed[name], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("stage", [None, 0])
@pytest.mark.parametrize("how", [{}, {"fused": True}, {"capturable": True}], ids=str)
def test_restored_counters_are_where_the_kernels_read_them(
    how: dict[str, bool], stage: int | None, make: Any
) -> None:
    accelerator = SingleDevice("cuda") if stage is None else make(stage)
    model = seeded(Net)
    opt = torch.optim.AdamW(model.parameters(), **how)
    accelerator.prepare(model, {"opt": opt})
    batch = accelerator.to_device(windows(1, [1])[0][0][0])
    with accelerator.optimizing():
        accelerator.backward(regression(model, "opt", batch))
    assert accelerator.step()
    on_cpu = map_tensors(accelerator.state_dict(), lambda t: t.to("cpu", copy=True))
    accelerator.load_state_dict(on_cpu)
    kinds = {opt.state[param]["step"].device.type for param in model.parameters()}
    assert kinds == {"cuda" if how else "cpu"}


def test_resume_holds_no_second_copy_of_weights_and_moments(make: Any) -> None:
    def build() -> nn.Module:
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(6)))

    accelerator, model = make(0), build()
    accelerator.prepare(model, {"opt": torch.optim.AdamW(model.parameters())})
    with accelerator.optimizing():
        accelerator.backward(model(torch.ones(2, 2048, device="cuda")).square().mean())
    assert accelerator.step()
    on_cpu = map_tensors(accelerator.state_dict(), lambda t: t.to("cpu", copy=True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    accelerator.load_state_dict(on_cpu)
    one = 2048 * 2048 * 4
    assert torch.cuda.max_memory_allocated() - before < 4 * one  # of 18


def test_random_state_of_the_device_is_restored_and_new_ranks_draw_others() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    state = get_rng_state(device=device)
    drawn = torch.rand(4, device=device)
    assert set_rng_state(state, device=device) == []
    assert torch.equal(torch.rand(4, device=device), drawn)
    set_rng_state(derive_rng_state(state, 1), device=device)
    assert not torch.equal(torch.rand(4, device=device), drawn)


def test_host_copies_are_those_of_the_moment_and_nothing_waits_for_the_device() -> None:
    copies = HostCopies()
    live = {f"{n}": torch.full((1 << 20,), float(n), device="cuda") for n in range(4)}
    live["column"] = torch.arange(512.0, device="cuda").reshape(16, 32)[:, 3]
    for turn in range(3):
        for value in live.values():
            value.mul_(2.0)
        wanted = {name: value.clone() for name, value in live.items()}
        busy = torch.randn(2048, 2048, device="cuda")
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            for _ in range(50):
                busy = busy @ busy / 64.0
            found, wait = copies.copy(live)
            for value in live.values():
                value.fill_(-1.0)  # as the next step does
        finally:
            torch.cuda.set_sync_debug_mode("default")
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join()
        for name, value in wanted.items():
            assert found[name].is_pinned()
            assert torch.equal(found[name], value.cpu()), (turn, name)
        for name, value in wanted.items():
            live[name].copy_(value)


def test_saves_wait_for_no_device_and_hold_no_second_copy_on_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: waits.append(1))
    save = ModelCheckpoint(tmp_path, every_n_steps=1, keep_last=3)
    model = nn.Linear(1024, 1024)
    learner = harness.setup(
        lambda: model, loss=nn.MSELoss(), optimizer=torch.optim.SGD
    ).set_opt_hparams(lr=0.1)
    data = torch.randn(64, 1024), torch.randn(64, 1024)
    torch.cuda.reset_peak_memory_stats()
    learner.fit(
        data,
        epochs=1,
        callbacks=[save],
        accelerator=SingleDevice("cuda"),
        dataloader_options={"batch_size": 16},
        tracker=False,
        verbose=False,
    )
    assert waits == []
    weights = sum(p.numel() * 4 for p in model.parameters())
    assert torch.cuda.max_memory_allocated() < 6 * weights + (64 << 20)
    assert len(list(tmp_path.iterdir())) == 3


# ------------------------------------------------------------------- a device that fails

FAILS = """
import torch, harness
from torch import nn
target = torch.randint(4, (640,))
target[-20:] = 9
learner = harness.setup(
    lambda: nn.Linear(16, 4), loss=nn.CrossEntropyLoss(), optimizer=torch.optim.AdamW
)
class Log(harness.Callback):
    def on_train_batch_end(self):
        self.ctx.log_step({"norm": self.ctx.pred.norm()})
learner.fit(
    (torch.randn(640, 16), target), 3,
    accelerator=harness.accelerator(CONFIG, device="cuda"),
    tracker={"runs_dir": "runs", "delivery": False},
    callbacks=[Log(), harness.callbacks.ModelCheckpoint("saved", every_n_steps=2)],
    dataloader_options={"batch_size": 16, "shuffle": False, "pin_memory": PINNED},
)
"""


@pytest.mark.parametrize("config", [None, {"zero_optimization": {"stage": 1}}], ids=str)
@pytest.mark.parametrize("is_pinned", [True, False])
def test_failed_assertion_on_the_device_is_an_error_that_is_seen_and_recorded(
    config: dict[str, Any] | None, is_pinned: bool, tmp_path: Path
) -> None:
    text = FAILS.replace("CONFIG", repr(config)).replace("PINNED", repr(is_pinned))
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text],
        cwd=tmp_path,
        env=os.environ | PATHS,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert found.returncode == 1, found.stderr
    assert "CUDA error: device-side assert triggered" in found.stderr
    assert "such as a label or a row of an Embedding" in found.stderr
    (run,) = tracking.list_runs(tmp_path / "runs")
    assert run.status == "failed"
    assert len(run.records(name="norm")) > 2
    assert list_checkpoints(tmp_path / "saved")


def test_fit_works_after_one_that_was_out_of_memory() -> None:
    class Eater(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 8:
                torch.empty(10**13, device=x.device)
            return super().forward(x)

    def fit(rows: int) -> object:
        return harness.setup(
            lambda: Eater(4, 1), loss=nn.MSELoss(), optimizer=torch.optim.SGD
        ).fit(
            (torch.randn(32, 4), torch.randn(32, 1)),
            1,
            accelerator=SingleDevice("cuda"),
            dataloader_options={"batch_size": rows},
            tracker=False,
        )

    with pytest.raises(torch.OutOfMemoryError) as caught:
        fit(16)
    assert "half as many rows" in caught.value.__notes__[-1]
    fit(8)


@pytest.mark.filterwarnings("ignore")  # of the compiler
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_graphs_change_no_value(precision: Any) -> None:
    data = torch.randn(64, 5), torch.randn(64, 1)

    def fit(compile: Any) -> tuple[dict[str, Tensor], Any]:
        fitted = harness.setup(
            lambda: nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 1)),
            loss=nn.MSELoss(),
            optimizer=torch.optim.AdamW,
            metrics={"error": torchmetrics.MeanAbsoluteError()},
            compile=compile,
        ).fit(
            data,
            3,
            valid_data=data,
            seed=1,
            accelerator=SingleDevice("cuda", precision=precision),
            tracker=False,
        )
        return fitted.model.state_dict(), fitted.get_metrics()["value"].to_numpy()

    (wanted, values), (found, compiled) = fit(False), fit({"mode": "reduce-overhead"})
    rtol = 1e-4 if precision == "fp32" else 3e-2
    numpy.testing.assert_allclose(compiled, values, rtol=rtol)
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=rtol)
