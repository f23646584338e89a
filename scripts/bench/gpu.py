#!/usr/bin/env python3
"""Tokens per second of a small GPT: plain torch, bare DeepSpeed and harness, in one run.

    python scripts/bench/gpu.py                       one GPU, bf16, ZeRO 0 to 3
    deepspeed --num_gpus 4 scripts/bench/gpu.py       the same on four GPUs
    python scripts/bench/gpu.py --tiny                a small run on the CPU, to test the script

Plain torch and harness on one device train under bf16 autocast; bare DeepSpeed and harness with
it use bf16 weights with float32 masters. All read by the same loader, and both with DeepSpeed
have the same config. Bare DeepSpeed runs without its throughput timer, which waits for the device
in each step and is on by default; ``--timer`` measures it with the timer, too. harness runs with
a torchmetrics accuracy and with tracking. Rounds are interleaved. The figures are medians: tokens
a second; the ratio to bare DeepSpeed at the same stage, or to plain torch; and the peak of device
memory of rank 0. Targets: 0.98 of bare DeepSpeed and 0.99 of plain torch.
"""

from __future__ import annotations

# ruff: noqa: E402
import sys

# The logging.py in this folder must not hide the standard library's.
sys.path = [path for path in sys.path if not path.endswith("scripts/bench")]

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import harness
from harness.accelerators.deepspeed.library import (
    import_deepspeed,
    silence_deepspeed_warnings,
)
from harness.accelerators.devices import choose_rank_device
from harness.accelerators.distributed.environment import read_launch, set_environment
from harness.accelerators.distributed.group import RankGroup
from harness.data.loaders import get_device_options, make_train_loader


@dataclass(frozen=True, kw_only=True)
class Size:
    layers: int = 12
    heads: int = 12
    width: int = 768
    vocabulary: int = 32_000
    length: int = 1024
    batch: int = 8
    warmup: int = 10
    steps: int = 60


TINY = Size(
    layers=2, heads=2, width=32, vocabulary=64, length=16, batch=4, warmup=2, steps=6
)


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.before = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.after = nn.LayerNorm(size.width)
        self.mlp = nn.Sequential(
            nn.Linear(size.width, 4 * size.width),
            nn.GELU(),
            nn.Linear(4 * size.width, size.width),
        )

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.before(x)).split(width, dim=2)
        form = (batch, length, self.heads, width // self.heads)
        q, k, v = (part.view(form).transpose(1, 2) for part in parts)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.after(x))


class Gpt(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(size.length, size.width)
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.last = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, size.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.places(
            torch.arange(ids.shape[1], device=ids.device)
        )
        # Classes come second, where losses and metrics look for them.
        return self.head(self.last(self.blocks(x))).transpose(1, 2)


class Clock:
    """Time of the steps after the warm-up, including the work on the device."""

    def __init__(self, size: Size, device: torch.device) -> None:
        self.size, self.device = size, device
        self.done, self.begun, self.seconds, self.peak = 0, 0.0, float("nan"), 0
        self.before = 0  # bytes; a DeepSpeed engine leaves some when it is destroyed
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def tick(self) -> bool:
        """Count one step; True if it was the last."""
        self.done += 1
        if self.done == self.size.warmup:
            self.begun = self.now()
        if self.done == self.size.warmup + self.size.steps:
            self.seconds = self.now() - self.begun
            if self.device.type == "cuda":
                peak = torch.cuda.max_memory_allocated(self.device)
                self.peak = peak - self.before
            return True
        return False

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def loss_fn(pred: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(pred.float(), target)


def data(size: Size, world_size: int) -> TensorDataset:
    drawn = torch.Generator().manual_seed(0)
    rows = (size.warmup + size.steps + 1) * size.batch * world_size
    ids = torch.randint(size.vocabulary, (rows, size.length + 1), generator=drawn)
    return TensorDataset(ids[:, :-1], ids[:, 1:])


def config(stage: int, size: Size, *, has_timer: bool = False) -> dict:
    return {
        "train_micro_batch_size_per_gpu": size.batch,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "timers": {"throughput": {"enabled": has_timer}},
    }


def build(size: Size) -> Gpt:
    torch.manual_seed(0)
    return Gpt(size)


def batches(size: Size, device: torch.device, ranks: RankGroup):
    """The rows of this rank, read as harness reads them."""
    options = {"batch_size": size.batch, "shuffle": False}
    rows, like = data(size, ranks.world_size), get_device_options(device)
    loader = make_train_loader(rows, options, like=like)
    for place, batch in enumerate(loader):
        if place % ranks.world_size == ranks.rank:
            yield [part.to(device, non_blocking=True) for part in batch]


def plain(size: Size, device: torch.device, ranks: RankGroup) -> Clock:
    model: nn.Module = build(size).to(device)
    if ranks.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
    clock = Clock(size, device)
    for ids, target in batches(size, device, ranks):
        with torch.autocast(device.type, torch.bfloat16):
            loss = loss_fn(model(ids), target)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if clock.tick():
            break
    return clock


Contender = Callable[[Size, torch.device, RankGroup], Clock]


def bare(stage: int, *, has_timer: bool) -> Contender:
    def run(size: Size, device: torch.device, ranks: RankGroup) -> Clock:
        model = build(size)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4)
        clock = Clock(size, device)
        with set_environment(LOCAL_RANK=str(read_launch().local_rank)):
            engine, *_ = import_deepspeed().initialize(
                model=model,
                optimizer=opt,
                config=config(stage, size, has_timer=has_timer),
            )
            for ids, target in batches(size, device, ranks):
                engine.backward(loss_fn(engine(ids), target))
                engine.step()
                if clock.tick():
                    break
            engine.destroy()
        return clock

    return run


class Timer(harness.Callback):
    weight = 10_000

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def on_train_batch_end(self) -> None:
        if self.clock.tick():
            raise harness.EarlyStop


def ours(stage: int | None) -> Contender:
    """harness with DeepSpeed at a stage; None: on one device, under autocast."""

    def run(size: Size, device: torch.device, ranks: RankGroup) -> Clock:
        clock = Clock(size, device)
        metrics = {"accuracy": MulticlassAccuracy(size.vocabulary, average="micro")}
        learner = harness.setup(
            Gpt, loss=loss_fn, optimizer=torch.optim.AdamW, metrics=metrics
        )
        if stage is None:
            accelerator = harness.accelerator(device=device.type, precision="bf16")
        else:
            accelerator = harness.accelerator(config(stage, size), device=device.type)
        with tempfile.TemporaryDirectory() as folder:
            learner.set_hparams(size=size).set_opt_hparams(lr=1e-4).fit(
                data(size, ranks.world_size),
                epochs=1,
                callbacks=[Timer(clock)],
                accelerator=accelerator,
                dataloader_options={"batch_size": size.batch, "shuffle": False},
                seed=0,
                tracker={"runs_dir": Path(folder) / "runs", "delivery": False},
                verbose=False,
            )
        return clock

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a trial on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stages", default="0,1,2,3")
    parser.add_argument("--timer", action="store_true", help="DeepSpeed's too")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = TINY if options.tiny else Size()
    launch = read_launch()
    device = choose_rank_device("cpu" if options.tiny else "cuda", launch.local_rank)
    import_deepspeed()
    silence_deepspeed_warnings()
    ranks = RankGroup(launch, device)
    stages = [int(stage) for stage in options.stages.split(",")]
    contenders: dict[str, Contender] = {"torch": plain}
    of: dict[str, str] = {}
    if ranks.world_size == 1:
        contenders["harness"], of["harness"] = ours(None), "torch"
    for stage in stages:
        base, mine = f"DeepSpeed, ZeRO {stage}", f"harness, ZeRO {stage}"
        contenders[base] = bare(stage, has_timer=False)
        if options.timer:
            contenders[f"{base}, timer"] = bare(stage, has_timer=True)
        contenders[mine], of[mine] = ours(stage), base
    tokens = size.steps * size.batch * size.length * ranks.world_size
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    peaks: dict[str, int] = {}
    for _ in range(options.rounds):
        for name, run in contenders.items():
            begun = time.perf_counter()
            clock = run(size, device, ranks)
            rates[name].append(tokens / clock.seconds)
            if not ranks.rank:
                took_s = time.perf_counter() - begun
                print(
                    f"{name}: {rates[name][-1]:,.0f} tokens/s in {took_s:.0f} s",
                    flush=True,
                )
            peaks[name] = max(peaks.get(name, 0), clock.peak)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    if ranks.rank:
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{ranks.world_size} rank(s), {name}, torch {torch.__version__}, {size}")
    print(f"{'':28} {'tokens/s':>12} {'ratio':>8} {'peak MB':>8}")
    for name, found in rates.items():
        pairs = zip(found, rates[of.get(name, name)], strict=True)
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        shown = f"{ratio:8.3f}" if name in of else " " * 8
        peak = f"{peaks[name] / 1e6:8,.0f}"
        print(f"{name:28} {statistics.median(found):12,.0f} {shown} {peak}")


if __name__ == "__main__":
    main()
