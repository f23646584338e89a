"""Fits at ZeRO 3 of models that are divided while they are built, on one rank and on several."""

from __future__ import annotations

import contextlib
import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import harness
from harness.accelerators.deepspeed.library import import_deepspeed
from harness.callbacks import AutoResume, ModelCheckpoint
from harness.checkpoint.format import list_checkpoints
from harness.checkpoint.full_weights.export import export_weights
from harness.reshard.meta_parameters import count_elements
from tests.harness.accelerators.cases import Gan, Lab, adversarial, players
from tests.harness.accelerators.resumes import BreakOff, BrokenOff
from tests.harness.accelerators.whole import (
    begin_peak,
    read_peak,
    same_metrics,
    same_weights,
)

LAYERS, WIDTH = 8, 3072
"""Matrices of the deep model. Each has 36 MiB, for which malloc asks the system each time."""


class Block(nn.Module):
    """Sets weights of layers that it has made, as many models do."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, width)
        self.scale: Tensor
        self.register_buffer("scale", torch.randn(width))
        nn.init.normal_(self.linear.weight, std=0.2)
        self.attention.out_proj.weight.data.mul_(2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.attention(x, x, x, need_weights=False)[0])
        found: Tensor = x + self.linear(hidden) * self.scale.to(x.dtype)
        return found


class Net(nn.Module):
    """With tied weights, buffers, frozen parameters, and rules for initial weights."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.blocks = nn.ModuleList([Block(width) for _ in range(2)])
        self.again = nn.Linear(width, width, bias=False)
        self.again.weight = self.first.weight
        self.last = nn.Linear(width, 3)
        self.apply(self._set)
        for name, param in self.named_parameters():
            if name.endswith("linear.weight"):
                nn.init.normal_(param, std=0.02)
            elif param.dim() < 2 and "bias" in name:
                param.data.fill_(0.01)
        self.blocks[0].attention.requires_grad_(False)

    def _set(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.data.normal_(0, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.last(self.again(x)).mean(1)
        return found


def decay_matrices(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    """Weight decay by the shapes of the parameters."""
    params = [param for param in model.parameters() if param.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": 0.5},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    assert all(group["params"] for group in groups)
    return torch.optim.AdamW(groups, lr=lr)


def make(zero_init: bool = True, **config: Any) -> Any:
    """An accelerator at ZeRO 3."""
    zero = {"stage": 3, **config.pop("zero_optimization", {})}
    return harness.accelerator(
        {"zero_optimization": zero, **config}, device="cpu", zero_init=zero_init
    )


def rows(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    made = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4, 8, generator=made)
    return inputs, torch.randint(3, (count,), generator=made)


def fit(accelerator: Any, *callbacks: Any, module: Any = Net, **options: Any) -> Any:
    """Two short epochs with validation."""
    learner = harness.setup(
        module, loss=nn.CrossEntropyLoss(), optimizer=decay_matrices
    )
    given: dict[str, Any] = {"epochs": 2, "valid_data": rows(6, 1), "seed": 5}
    return learner.fit(
        rows(14),
        **(given | options),
        callbacks=callbacks,
        accelerator=accelerator,
        dataloader_options={"batch_size": 4, "shuffle": True},
        tracker=False,
        verbose=False,
    )


def check_same(found: Any, wanted: Any) -> None:
    assert same_weights(found.model, wanted.model)
    assert same_metrics(found, wanted)


def case_numbers_are_those_of_a_model_that_is_built_whole(lab: Lab) -> None:
    for config in ({}, {"bf16": {"enabled": True}}):
        wanted = fit(make(False, **config))
        linear = nn.functional.linear
        found = fit(make(**config))
        assert nn.functional.linear is linear
        check_same(found, wanted)
        assert str(found.summary()) == str(wanted.summary())
        inputs = rows(7, 3)[0]
        one, two = (f.predict(inputs, accelerator=make()) for f in (found, wanted))
        assert torch.equal(one, two)


class Odd(nn.Module):
    """Layers whose weights are computed, cast, copied, loaded, or replaced after they were made."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = weight_norm(nn.Linear(8, 8))
        self.cast = nn.Linear(8, 8).double()
        self.copied = copy.deepcopy(self.cast).float()
        self.cast.float()
        self.loaded = nn.Linear(8, 8)
        self.loaded.load_state_dict(self.copied.state_dict())
        self.last = nn.Linear(8, 3)
        first, second = self.last.weight.data[:1], self.loaded.weight.data[:1]
        self.last.weight.data[1:2] = first + second
        self.last.bias = nn.Parameter(self.last.bias * 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.cast(self.computed(x))
        found: Tensor = self.last(self.loaded(self.copied(hidden).tanh())).mean(1)
        return found


def case_layers_may_be_changed_after_they_were_made(lab: Lab) -> None:
    check_same(fit(make(), module=Odd), fit(make(False), module=Odd))


def case_model_that_somebody_holds_is_copied(lab: Lab) -> None:
    found = []
    for zero_init in (True, False):
        torch.manual_seed(5)
        with make(zero_init).building():
            held = Net()
        found.append(fit(make(zero_init), module=lambda net=held: net))
        assert all(hasattr(p, "ds_id") == zero_init for p in held.parameters())
    check_same(*found)


def case_two_optimizers_train_it(lab: Lab) -> None:
    def fit_gan(accelerator: Any) -> Any:
        learner = harness.setup(Players)
        data = torch.randn(8, 5, generator=torch.Generator().manual_seed(2))
        options: Any = {"accelerator": accelerator, "tracker": False, "verbose": False}
        return learner.fit((data, data), 2, seed=1, **options)

    check_same(fit_gan(make()), fit_gan(make(False)))


class Players(Gan):
    """A generator and its opponent, each with an optimizer of its own."""

    def set_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return players(self)

    def step(self) -> None:
        ctx = self.ctx  # type: ignore[attr-defined]
        for name in ("disc", "gen"):
            with ctx.optimizing(name):
                ctx.optimize(adversarial(self, name, (ctx.input, ctx.target)))


def go_on(folder: Path, after: int = 0, *, zero_init: bool) -> Any:
    """Fit, or resume from the folder, and break off after so many batches."""
    resume = AutoResume(folder, every_n_steps=1, keep_last=1)
    accelerator = make(zero_init, gradient_accumulation_steps=2)
    return fit(accelerator, resume, BreakOff(after))


def case_resume_is_exact(lab: Lab) -> None:
    def go(place: str, after: int = 0, zero_init: bool = True) -> Any:
        return go_on(lab.folder / place, after, zero_init=zero_init)

    wanted = go("unbroken")
    for place, zero_init in (("same", True), ("built-whole", False)):
        with contextlib.suppress(BrokenOff):
            go(place, 3, zero_init=zero_init)
        torch.manual_seed(99)
        check_same(go(place), wanted)
    with contextlib.suppress(BrokenOff):
        go("left", 3)


def own_init(lab: Lab, **options: Any) -> Any:
    """DeepSpeed's own context."""
    config = {"zero_optimization": {"stage": 3}, "train_batch_size": lab.world}
    return import_deepspeed().zero.Init(config_dict_or_path=config, **options)


def case_model_may_divide_itself(lab: Lab) -> None:
    wanted = fit(make(False))
    for options in ({}, {"remote_device": "cpu"}):

        def build(options: Any = options) -> nn.Module:
            with own_init(lab, **options):
                net = Net()
            assert all(hasattr(param, "ds_id") for param in net.parameters())
            return net

        check_same(fit(make(False), module=build), wanted)


def case_part_of_a_model_may_be_divided(lab: Lab) -> None:
    def build(context: Any) -> nn.Module:
        net = Net()
        with context:
            net.blocks[1] = Block(8)
        return net

    for config in ({}, {"bf16": {"enabled": True}}):
        found, wanted = (
            fit(make(False, **config), module=lambda c=context: build(c()))
            for context in (lambda: own_init(lab), contextlib.nullcontext)
        )
        check_same(found, wanted)


def case_weights_may_be_read_while_the_model_is_built(lab: Lab) -> None:
    start = Net().state_dict() if lab.rank == 0 else {}
    shared = make().broadcast(start)

    def load() -> nn.Module:
        net = Net()
        for name, param in net.named_parameters():
            with import_deepspeed().zero.GatheredParameters([param], modifier_rank=0):
                if lab.rank == 0:
                    param.data.copy_(start[name])
        return net

    def load_whole() -> nn.Module:
        net = Net()
        with torch.no_grad():
            for name, param in net.named_parameters():
                param.copy_(shared[name])
        return net

    check_same(fit(make(), module=load), fit(make(False), module=load_whole))
    check_same(fit(make(), module=load_whole), fit(make(False), module=load_whole))


def case_weights_to_start_from(lab: Lab) -> None:
    saves = ModelCheckpoint(lab.folder / "saves", keep_last=1)
    first = fit(make(), saves, gather=False)
    assert first.checkpoint is not None
    whole = first.gather(accelerator=make())
    exported = lab.folder / "weights.safetensors"
    if lab.rank == 0:
        export_weights(first.checkpoint, exported)
    make().barrier()
    path = list_checkpoints(lab.folder / "saves")[-1]
    for start in (whole, whole.state_dict(), exported, path, first.checkpoint, first):
        found, wanted = (fit(make(z), start=start, epochs=1) for z in (True, False))
        check_same(found, wanted)
        assert found.start.is_complete


class Deep(nn.Sequential):
    """A model of 302 MB."""

    def __init__(self) -> None:
        super().__init__(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS - 1)))
        self.append(copy.deepcopy(self[-1]))
        for param in self.parameters():
            param.data.mul_(2)


def case_memory_of_a_rank_while_the_model_is_built(lab: Lab) -> None:
    layer = 4 * WIDTH * WIDTH
    accelerator = make()
    before = begin_peak()
    with accelerator.building():
        model = Deep()
    assert all(hasattr(param, "ds_id") for param in model.parameters())
    peak = read_peak(before)
    sys.stdout.write(f"rank {lab.rank} of {lab.world}: {peak / 1e6:.0f} MB\n")
    assert count_elements(model) == LAYERS * (WIDTH + 1) * WIDTH
    if lab.world > 1:  # one rank holds everything anyway
        assert peak < (LAYERS / lab.world + 3) * layer, peak


CASES: dict[str, Callable[[Lab], None]] = {
    name.removeprefix("case_"): case
    for name, case in list(globals().items())
    if name.startswith("case_")
}
"""Every case, by name."""
