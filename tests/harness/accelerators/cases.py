"""What every accelerator must do, as functions that run on one rank or on several alike.

Each ``case_...`` gets a ``Lab``. The reference is plain torch: replicas of the model, one
for each rank, whose gradients are averaged by hand.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from harness.accelerators.base import Accelerator
from harness.accelerators.distributed.group import PeerError
from harness.accelerators.single import SingleDevice
from harness.errors import CheckpointError
from harness.pytree import flatten, iter_tensors, restore

Batch = tuple[Tensor, Tensor]
Loss = Callable[[nn.Module, str, Batch], Tensor]


@dataclass
class Lab:
    """Where a case runs: which accelerator, which rank, a folder for all ranks."""

    stage: int | None
    folder: Path
    rank: int = 0
    world: int = 1

    def make(self, accumulate: int = 1, **config: Any) -> Accelerator:
        """A fresh accelerator; `config` goes to DeepSpeed."""
        if self.stage is None:
            return SingleDevice("cpu", accumulate=accumulate)
        from harness.accelerators.deepspeed.accelerator import DeepSpeedAccelerator  # noqa: PLC0415

        zero = {"stage": self.stage, **config.pop("zero_optimization", {})}
        return DeepSpeedAccelerator(
            {"zero_optimization": zero, **config}, device="cpu", accumulate=accumulate
        )


# --------------------------------------------------------------------- the models


class Net(nn.Module):
    """Two layers, the first one wider than a bucket's alignment."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(x)))


class Normed(nn.Module):
    """A net with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.norm(self.body(x))))


class Tied(nn.Module):
    """One matrix goes in and comes out; a second part belongs to another optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(5, 7, bias=False)
        self.out = nn.Linear(7, 5, bias=False)
        self.out.weight = nn.Parameter(torch.randn(5, 7))
        self.again = nn.Linear(7, 5, bias=False)
        self.again.weight = self.out.weight
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.wide(x)
        return self.head(self.out(hidden) + torch.tanh(self.again(hidden)))


class Gan(nn.Module):
    """Two nets that play against each other; the root is never called in training."""

    def __init__(self) -> None:
        super().__init__()
        self.gen = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.disc = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.gen(x)


def regression(model: nn.Module, name: str, batch: Batch) -> Tensor:
    """Mean squared error, whichever optimizer asks."""
    return (model(batch[0]) - batch[1]).square().mean()


def adversarial(model: nn.Module, name: str, batch: Batch) -> Tensor:
    """What each player wants."""
    gan: Any = model
    faked = gan.disc(gan.gen(batch[0]))
    if name == "gen":
        return -nn.functional.logsigmoid(faked).mean()
    real = gan.disc(batch[0])
    return (nn.functional.softplus(-real) + nn.functional.softplus(faked)).mean()


def adam(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """One optimizer, two groups with rates of their own."""
    net: Any = model
    groups = [
        {"params": net.body.parameters(), "lr": 1e-2},
        {"params": [p for n, p in net.named_parameters() if not n.startswith("body")]},
    ]
    return {"opt": torch.optim.AdamW(groups, lr=3e-3)}


def two_rates(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Two optimizers over parts of one net."""
    net: Any = model
    rest = [p for n, p in net.named_parameters() if not n.startswith("head")]
    return {
        "body": torch.optim.AdamW(rest, lr=1e-2),
        "head": torch.optim.SGD(net.head.parameters(), lr=1e-1, momentum=0.9),
    }


def players(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """The two players' optimizers."""
    gan: Any = model
    return {
        "disc": torch.optim.AdamW(gan.disc.parameters(), lr=1e-2),
        "gen": torch.optim.Adam(gan.gen.parameters(), lr=5e-3),
    }


# ------------------------------------------------------------- reference and subject


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """The same fresh model on every call."""
    torch.manual_seed(3)
    return build()


def prepared(accelerator: Any, build: Any = Net, optimizers: Any = adam) -> Any:
    """Prepare a seeded model; returns the model and the optimizers."""
    model = seeded(build)
    return accelerator.prepare(model, optimizers(model))[:2]


def windows(world: int, sizes: Sequence[int], rows: int = 4) -> list[list[list[Batch]]]:
    """Batches by window, micro-batch and rank; the same on every call."""
    torch.manual_seed(11)

    def batch() -> Batch:
        return torch.randn(rows, 5), torch.randn(rows, 3)

    return [[[batch() for _ in range(world)] for _ in range(size)] for size in sizes]


def plain(
    build: Callable[[], nn.Module],
    optimizers: Callable[[nn.Module], Mapping[str, torch.optim.Optimizer]],
    loss_of: Loss,
    data: list[list[list[Batch]]],
    *,
    each_micro: bool,
    max_norm: float | None = None,
) -> nn.Module:
    """Rank 0's model after plain training with averaged gradients.

    ``each_micro`` averages after each micro-batch, as ZeRO 2 and 3 do, else once a window:
    the same sum in another order.
    """
    world = len(data[0][0])
    models = [seeded(build) for _ in range(world)]
    opts = [optimizers(model) for model in models]
    for window in data:
        held: dict[tuple[str, int], list[Tensor]] = {}
        for place, micro in enumerate(window, start=1):
            for name in opts[0]:
                found = [
                    gradients(
                        models[r], opts[r][name], loss_of, name, micro[r], len(window)
                    )
                    for r in range(world)
                ]
                found = averaged(found) if each_micro else found
                for r in range(world):
                    before = held.get((name, r))
                    held[name, r] = added(before, found[r])
                if place < len(window):
                    continue
                sums = [held[name, r] for r in range(world)]
                sums = sums if each_micro else averaged(sums)
                for r in range(world):
                    stepped(opts[r][name], sums[r], max_norm)
                    held[name, r] = []
    return models[0]


def owned(opt: torch.optim.Optimizer) -> list[Tensor]:
    """Parameters of an optimizer."""
    return [param for group in opt.param_groups for param in group["params"]]


def gradients(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    loss_of: Loss,
    name: str,
    batch: Batch,
    size: int,
) -> list[Tensor]:
    """Gradients of one rank's micro-batch."""
    loss = (
        loss_of(model, name, batch) / size if size > 1 else loss_of(model, name, batch)
    )
    return list(torch.autograd.grad(loss, owned(opt), materialize_grads=True))


def averaged(found: list[list[Tensor]]) -> list[list[Tensor]]:
    """The mean over ranks, for each rank."""
    if len(found) == 1:
        return found
    means = [
        torch.stack(parts).sum(0) / len(parts) for parts in zip(*found, strict=True)
    ]
    return [[mean.clone() for mean in means] for _ in found]


def added(before: list[Tensor] | None, new: list[Tensor]) -> list[Tensor]:
    """Sums so far."""
    if not before:
        return new
    return [a + b for a, b in zip(before, new, strict=True)]


def stepped(
    opt: torch.optim.Optimizer, grads: list[Tensor], max_norm: float | None
) -> None:
    """One optimizer step with these gradients."""
    for param, grad in zip(owned(opt), grads, strict=True):
        param.grad = grad
    if max_norm is not None:
        nn.utils.clip_grad_norm_(owned(opt), max_norm)
    opt.step()
    opt.zero_grad()


def trained(
    lab: Lab,
    accelerator: Accelerator,
    build: Callable[[], nn.Module],
    optimizers: Callable[[nn.Module], Mapping[str, torch.optim.Optimizer]],
    loss_of: Loss,
    data: list[list[list[Batch]]],
    *,
    max_norm: float | None = None,
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The model and its whole weights after the accelerator's training."""
    model = seeded(build)
    model, opts, _ = accelerator.prepare(model, optimizers(model))
    for window in data:
        train_window(lab, accelerator, model, opts, loss_of, window, max_norm)
    return model, accelerator.full_state_dict(model)


def sgd(model: nn.Module) -> dict[str, torch.optim.Optimizer]:
    """Steps that follow the size of the gradient."""
    return {"opt": torch.optim.SGD(model.parameters(), lr=0.05)}


def train_window(
    lab: Lab,
    accelerator: Accelerator,
    model: nn.Module,
    opts: Mapping[str, Any],
    loss_of: Loss,
    window: list[list[Batch]],
    max_norm: float | None = None,
) -> None:
    """What the loop does with one window."""
    accelerator.window = len(window)
    for place, micro in enumerate(window, start=1):
        for name in opts:
            with accelerator.optimizing(name):
                loss = loss_of(model, name, accelerator.to_device(micro[lab.rank]))
                accelerator.backward(loss, name)
            assert accelerator.is_boundary(name) == (place == len(window))
            if max_norm is not None and accelerator.is_boundary(name):
                accelerator.clip(max_norm, name)
            assert accelerator.step(name) == (place == len(window))


def check_equal(
    found: Mapping[str, Tensor], wanted: nn.Module, rtol: float = 0.0, atol: float = 0.0
) -> None:
    """Same names and, unless told otherwise, the same bits; only rank 0 holds any."""
    state = wanted.state_dict()
    assert set(found) in (set(state), set())
    torch.testing.assert_close(
        dict(found), {name: state[name] for name in found}, rtol=rtol, atol=atol
    )


def run_equal(
    lab: Lab,
    build: Callable[[], nn.Module],
    optimizers: Callable[[nn.Module], Mapping[str, torch.optim.Optimizer]],
    loss_of: Loss = regression,
    sizes: Sequence[int] = (1, 1, 1),
    max_norm: float | None = None,
    rtol: float = 0.0,
    atol: float = 0.0,
) -> None:
    """Train both ways and compare."""
    data = windows(lab.world, sizes)
    each_micro = lab.stage in {2, 3}
    wanted = plain(
        build, optimizers, loss_of, data, each_micro=each_micro, max_norm=max_norm
    )
    accelerator = lab.make(accumulate=max(sizes))
    model, found = trained(
        lab, accelerator, build, optimizers, loss_of, data, max_norm=max_norm
    )
    assert bool(found) == (lab.rank == 0)
    check_equal(found, wanted, rtol, atol)
    assert accelerator.steps == dict.fromkeys(optimizers(seeded(build)), len(sizes))
    accelerator.finish()
    # Other ranks keep their own buffers.
    torch.testing.assert_close(
        dict(model.named_parameters()),
        dict(wanted.named_parameters()),
        rtol=rtol,
        atol=atol,
    )


# ------------------------------------------------------------------------ training


def case_one_optimizer_equals_plain_torch(lab: Lab) -> None:
    run_equal(lab, Net, adam)


def case_accumulation_with_a_short_last_window_equals_plain_torch(lab: Lab) -> None:
    run_equal(lab, Net, adam, sizes=(3, 3, 2))


def case_two_players_equal_plain_torch(lab: Lab) -> None:
    run_equal(lab, Gan, players, adversarial)


def case_two_players_with_accumulation_equal_plain_torch(lab: Lab) -> None:
    run_equal(lab, Gan, players, adversarial, sizes=(2, 3, 1))


def case_two_rates_on_one_net_equal_plain_torch(lab: Lab) -> None:
    run_equal(lab, Net, two_rates, sizes=(1, 2, 3))


def case_batch_norm_equals_plain_torch(lab: Lab) -> None:
    run_equal(lab, Normed, two_rates, sizes=(1, 2))


def penalized(model: nn.Module, name: str, batch: Batch) -> Tensor:
    """An error, and a penalty on all weights."""
    penalty = sum((p.square().sum() for p in model.parameters()), torch.zeros(()))
    return regression(model, name, batch) + 0.1 * penalty


def smoothed(model: nn.Module, name: str, batch: Batch) -> Tensor:
    """An error, and a penalty on the slope of another forward, as in WGAN-GP."""
    error = regression(model, name, batch)
    x = batch[0].clone().requires_grad_()
    (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return error + (slope.norm(dim=1) - 1).square().mean()


class OwnWeight(nn.Parameter):
    """A parameter of a kind of its own."""


class OwnKind(Net):
    """A net with such a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = OwnWeight(self.head.weight.data)


def case_penalty_on_weights_equals_plain_torch(lab: Lab) -> None:
    run_equal(lab, OwnKind, adam, penalized, sizes=(1, 2), rtol=1e-6, atol=1e-7)


def case_penalty_on_gradients_equals_plain_torch(lab: Lab) -> None:
    run_equal(lab, Net, adam, smoothed, sizes=(1, 2), rtol=1e-6, atol=1e-7)


class Listed(Net):
    """A net whose forward finds weights of a layer in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = [self.head.weight, self.head.bias]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + nn.functional.linear(self.body(x), *self.listed)


def case_weights_in_a_list_equal_plain_torch(lab: Lab) -> None:
    run_equal(lab, Listed, adam, sizes=(1, 2), rtol=1e-6, atol=1e-7)


class Double(Net):
    """A net in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.double())


def case_float64_equals_plain_torch(lab: Lab) -> None:
    # ZeRO keeps float32 masters.
    rtol, atol = (1e-5, 1e-6) if lab.stage else (0.0, 0.0)
    run_equal(lab, Double, adam, sizes=(1, 2), rtol=rtol, atol=atol)


def case_tied_weights_equal_plain_torch(lab: Lab) -> None:
    run_equal(lab, Tied, two_rates, sizes=(1, 2))


class Turned(Net):
    """A net with a weight whose rows are not next to each other in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.randn(7, 3).t())


def case_weights_of_any_layout_equal_plain_torch(lab: Lab) -> None:
    run_equal(lab, Turned, adam, sizes=(1, 2), rtol=1e-6, atol=1e-7)


class Experts(Net):
    """A net that runs one of two layers of one size, chosen by the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 7)])

    def forward(self, x: Tensor) -> Tensor:
        expert = self.experts[int(x[0, 0] > 0)]
        return self.head(expert(torch.tanh(self.body(x))))


def case_layers_that_one_rank_uses_equal_plain_torch(lab: Lab) -> None:
    if lab.stage != 3:  # whose ranks must run the same layers
        run_equal(lab, Experts, sgd, sizes=(1, 2, 3))


class Apart(Net):
    """A net that some batches leave out altogether."""

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] > 0:
            return x[:, :3].clone().requires_grad_()
        return super().forward(x)


def case_a_rank_that_uses_no_layer_equals_plain_torch(lab: Lab) -> None:
    if lab.stage != 3:
        run_equal(lab, Apart, sgd, sizes=(1, 2, 1))


def case_gradients_that_came_get_no_zeros(lab: Lab) -> None:
    if lab.stage != 2 or lab.world == 1:
        return
    # Buckets so small that most gradients are reduced, and freed, during the backward.
    accelerator = lab.make(zero_optimization={"reduce_bucket_size": 21})
    model, opts = prepared(accelerator, Experts, sgd)
    made = []
    zeros = torch.zeros_like

    def noted(param: Tensor, **options: Any) -> Tensor:
        made.append(id(param))
        return zeros(param, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros_like", noted)
        batch = torch.full((4, 5), 1.0), torch.zeros(4, 3)
        train_window(lab, accelerator, model, opts, regression, [[batch] * lab.world])
    net: Any = model
    assert made == [id(param) for param in [*net.experts[0].parameters()][::-1]]
    accelerator.finish()


def case_backward_after_a_failed_one_is_refused(lab: Lab) -> None:
    if lab.stage != 2 or lab.world == 1:
        return
    accelerator = lab.make()
    model, _ = prepared(accelerator, Net, sgd)

    def failing(grad: Tensor) -> None:
        raise ValueError("it fails")

    for error, told in ((ValueError, "it fails"), (RuntimeError, "none failed before")):
        hidden = torch.tanh(model.body(torch.ones(2, 5)))
        if error is ValueError:
            hidden.register_hook(failing)
        with accelerator.optimizing("opt"), pytest.raises(error, match=told):
            accelerator.backward(model.head(hidden).mean(), "opt")
    accelerator.finish()


def case_bfloat16_gradients_summed_in_float32_train(lab: Lab) -> None:
    if lab.stage not in {1, 2}:
        return
    config = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
    accelerator = lab.make(**config)
    model, opts = prepared(accelerator, Experts, sgd)
    [[micro]] = windows(lab.world, [1])
    for rank, (x, _) in enumerate(micro):
        x[0, 0] = rank - 0.5

    def loss_of(model: nn.Module, name: str, batch: Batch) -> Tensor:
        return regression(model, name, (batch[0].bfloat16(), batch[1]))

    wanted = seeded(Experts).bfloat16()
    params = list(wanted.parameters())
    sum(loss_of(wanted, "", batch) / lab.world for batch in micro).backward()  # type: ignore[union-attr]
    grads = [torch.zeros(p.shape) if p.grad is None else p.grad.float() for p in params]
    train_window(lab, accelerator, model, opts, loss_of, [micro])
    found = accelerator.full_state_dict(model)
    for (name, _), start, grad in zip(
        wanted.named_parameters(), params, grads, strict=True
    ):
        if found:
            torch.testing.assert_close(
                found[name].float(), start.float() - 0.05 * grad, rtol=1e-2, atol=2e-3
            )
    accelerator.finish()


def case_clipping_equals_plain_torch(lab: Lab) -> None:
    # DeepSpeed multiplies by the inverse of (norm + 1e-6) / max_norm, of a norm taken over
    # flat parts: the same number but for rounding. ZeRO 0 clips as torch does.
    rtol, atol = (2e-6, 1e-7) if lab.stage else (0.0, 0.0)
    run_equal(lab, Net, adam, sizes=(1, 2), max_norm=0.05, rtol=rtol, atol=atol)


def case_clip_gives_the_norm_found(lab: Lab) -> None:
    data = windows(lab.world, [1])
    wanted = seeded(Net)
    parts = [
        torch.autograd.grad(
            regression(wanted, "opt", data[0][0][r]), list(wanted.parameters())
        )
        for r in range(lab.world)
    ]
    means = averaged([list(found) for found in parts])[0]
    norm = torch.cat([mean.flatten() for mean in means]).norm()
    accelerator = lab.make()
    model = seeded(Net)
    model, _, _ = accelerator.prepare(model, adam(model))
    with accelerator.optimizing():
        accelerator.backward(regression(model, "opt", data[0][0][lab.rank]))
    found = [accelerator.clip(max_norm) for max_norm in (0.1, 0.01, 1.0)]
    assert accelerator.step()
    norms = torch.stack([norm, torch.tensor(0.1), torch.tensor(0.01)])
    found_norms = torch.stack(found).cpu().float()
    torch.testing.assert_close(found_norms, norms, rtol=1e-4, atol=0)
    accelerator.finish()


def case_scheduler_on_the_prepared_optimizer_changes_the_rate(lab: Lab) -> None:
    data = windows(lab.world, [1, 1, 1])
    rates = (1.0, 0.5, 0.1)

    def halving(opt: Any) -> Any:
        return torch.optim.lr_scheduler.LambdaLR(opt, lambda step: rates[min(step, 2)])

    models = [seeded(Net) for _ in range(lab.world)]
    opts = [adam(model)["opt"] for model in models]
    schedulers = [halving(opt) for opt in opts]
    for window in data:
        found = [
            gradients(models[r], opts[r], regression, "opt", window[0][r], 1)
            for r in range(lab.world)
        ]
        for opt, scheduler, grads in zip(
            opts, schedulers, averaged(found), strict=True
        ):
            stepped(opt, grads, None)
            scheduler.step()

    accelerator = lab.make()
    model = seeded(Net)
    model, prepared, _ = accelerator.prepare(model, adam(model))
    scheduler = halving(prepared["opt"])
    for window in data:
        train_window(lab, accelerator, model, prepared, regression, window)
        scheduler.step()
    assert prepared["opt"].param_groups[0]["lr"] == pytest.approx(1e-3)
    check_equal(accelerator.full_state_dict(model), models[0])
    accelerator.finish()


def case_step_before_the_boundary_changes_nothing(lab: Lab) -> None:
    data = windows(lab.world, [2])
    accelerator = lab.make(accumulate=2)
    model = seeded(Net)
    model, _, _ = accelerator.prepare(model, adam(model))
    assert not accelerator.step()
    with accelerator.optimizing("opt"):
        accelerator.backward(regression(model, "opt", data[0][0][lab.rank]))
    assert not accelerator.is_boundary()
    assert not accelerator.step()
    check_equal(accelerator.full_state_dict(model), seeded(Net))
    assert accelerator.steps == {"opt": 0}
    accelerator.finish()


def case_dropped_window_leaves_nothing_behind(lab: Lab) -> None:
    dropped, *data = windows(lab.world, [3, 2, 2])
    each_micro = lab.stage in {2, 3}
    wanted = plain(Net, two_rates, regression, data, each_micro=each_micro)
    accelerator = lab.make(accumulate=3)
    model = seeded(Net)
    model, opts, _ = accelerator.prepare(model, two_rates(model))
    train_part(lab, accelerator, model, dropped, (0, 1))
    accelerator.drop_window()
    accelerator.drop_window()
    assert not any(accelerator.is_boundary(name) for name in opts)
    for window in data:
        train_window(lab, accelerator, model, opts, regression, window)
    check_equal(accelerator.full_state_dict(model), wanted)
    accelerator.finish()


def case_model_stays_the_users_object_and_is_plain_afterwards(lab: Lab) -> None:
    data = windows(lab.world, [1])
    accelerator = lab.make()
    model = seeded(Normed)
    before = {module: set(vars(module)) for module in model.modules()}
    prepared, _, _ = accelerator.prepare(model, adam(model))
    assert prepared is model
    assert type(prepared) is Normed
    train_window(lab, accelerator, model, adam_names(), regression, data[0])
    accelerator.finish()
    assert {module: set(vars(module)) for module in model.modules()} == before
    assert all(type(param) is nn.Parameter for param in model.parameters())
    assert not any(hooks for hooks in hooks_of(model))
    again = copy.deepcopy(model)
    again(torch.randn(4, 5)).sum().backward()
    assert all(param.grad is not None for param in again.parameters())


def adam_names() -> dict[str, None]:
    """Names as in ``adam``."""
    return {"opt": None}


def hooks_of(model: nn.Module) -> Iterator[Any]:
    """Hooks on a model and its parts."""
    for module in model.modules():
        yield module._forward_hooks
        yield module._forward_pre_hooks
        yield module._backward_hooks
        yield module._backward_pre_hooks


def case_frozen_parameters_stay_frozen(lab: Lab) -> None:
    def frozen() -> nn.Module:
        net = Net()
        net.body.requires_grad_(False)
        return net

    accelerator = lab.make()
    model = seeded(frozen)
    start = copy.deepcopy(model.state_dict())
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, opts, _ = accelerator.prepare(model, {"opt": opt})
    for window in windows(lab.world, [1, 1]):
        train_window(lab, accelerator, model, opts, regression, window)
    found = accelerator.full_state_dict(model)
    for name, value in found.items():
        assert torch.equal(value, start[name]) == name.startswith("body"), name
    accelerator.finish()
    assert [param.requires_grad for param in model.parameters()] == [False] * 2 + [
        True
    ] * 2


def case_two_fits_in_one_process_give_the_same(lab: Lab) -> None:
    for _ in range(2):
        run_equal(lab, Net, adam, sizes=(2, 1))


def case_saved_and_loaded_goes_on_bit_for_bit(lab: Lab) -> None:
    for build, optimizers, loss_of in (
        (Normed, two_rates, regression),
        (Gan, players, adversarial),
    ):
        data = windows(lab.world, [1, 2, 1, 2])
        accelerator = lab.make(accumulate=2)
        model = seeded(build)
        model, opts, _ = accelerator.prepare(model, optimizers(model))
        state: Any = None
        for place, window in enumerate(data):
            if place == 2:
                live = accelerator.state_dict()
                assert not list(iter_tensors(live["grads"]))  # no window is open
                state = through_a_file(live, lab)
            train_window(lab, accelerator, model, opts, loss_of, window)
        wanted = copied(model_state(accelerator, model))
        accelerator.finish()

        torch.manual_seed(99)
        model = build()
        model, opts, _ = accelerator.prepare(model, optimizers(model))
        accelerator.load_state_dict(state)
        assert set(accelerator.steps.values()) == {2}
        for window in data[2:]:
            train_window(lab, accelerator, model, opts, loss_of, window)
        check_same(model_state(accelerator, model), wanted)
        accelerator.finish()


def case_saved_in_an_open_window_goes_on_bit_for_bit(lab: Lab) -> None:
    data = windows(lab.world, [3, 3])
    accelerator = lab.make(accumulate=3)
    states, found = [], []
    for resumed in (False, True):
        torch.manual_seed(99)
        model = Net() if resumed else seeded(Net)
        model, opts, _ = accelerator.prepare(model, two_rates(model))
        if not resumed:
            train_window(lab, accelerator, model, opts, regression, data[0])
            train_part(lab, accelerator, model, data[1], (0, 1))
            states.append(through_a_file(accelerator.state_dict(), lab))
        else:
            accelerator.load_state_dict(states[0])
        train_part(lab, accelerator, model, data[1], (2,))
        assert all(accelerator.step(name) for name in opts)
        found.append(copied(model_state(accelerator, model)))
        accelerator.finish()
    check_same(found[1], found[0])


def train_part(
    lab: Lab,
    accelerator: Accelerator,
    model: nn.Module,
    window: list[list[Batch]],
    places: Sequence[int],
) -> None:
    """Backwards of some micro-batches of a window."""
    accelerator.window = len(window)
    for place in places:
        for name in ("body", "head"):
            with accelerator.optimizing(name):
                batch = accelerator.to_device(window[place][lab.rank])
                loss = regression(model, name, batch)
                accelerator.backward(loss, name)


def case_weights_alone_can_be_loaded(lab: Lab) -> None:
    data = windows(lab.world, [1, 1])
    accelerator = lab.make()
    model = seeded(Normed)
    model, opts, _ = accelerator.prepare(model, two_rates(model))
    for window in data:
        train_window(lab, accelerator, model, opts, regression, window)
    state = through_a_file(accelerator.state_dict(), lab)
    wanted = copied(model_state(accelerator, model))
    accelerator.finish()
    model = seeded(Normed)
    model, opts, _ = accelerator.prepare(model, two_rates(model))
    accelerator.load_state_dict(state, ("model",))
    check_same(model_state(accelerator, model), wanted)
    assert accelerator.steps == {"body": 0, "head": 0}
    accelerator.finish()


def case_state_of_another_model_is_refused(lab: Lab) -> None:
    accelerator = lab.make()
    model = seeded(Net)
    accelerator.prepare(model, adam(model))
    state = through_a_file(accelerator.state_dict(), lab)
    accelerator.finish()
    model = seeded(Normed)
    accelerator.prepare(model, adam(model))
    with pytest.raises((CheckpointError, PeerError), match="saved"):
        accelerator.load_state_dict(state)
    accelerator.finish()
    model = seeded(Net)
    accelerator.prepare(model, two_rates(model))
    with pytest.raises((CheckpointError, PeerError), match="expected optimizers"):
        accelerator.load_state_dict(state)
    accelerator.finish()


def through_a_file(state: Any, lab: Lab) -> Any:
    """The state as a checkpoint gives it back: JSON and tensors."""
    plan, tensors = flatten(state)
    path = lab.folder / f"rank-{lab.rank}.safetensors"
    save_file(copied(tensors), path)
    return restore(json.loads(json.dumps(plan)), load_file(path))


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that no later step changes."""
    return {name: value.detach().clone() for name, value in tensors.items()}


def check_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """The same names and bits."""
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def model_state(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Whole weights on rank 0, this rank's buffers on each."""
    return {**accelerator.full_state_dict(model), **dict(model.named_buffers())}


# ---------------------------------------------------------------------------- data


class Rows(Dataset[Any]):
    """A map-style data set of numbered rows, with a target made of the number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return torch.tensor([float(row)]), row


class Stream(IterableDataset[Any]):
    """The same rows as a stream."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self) -> Iterator[Any]:
        for row in range(self.count):
            yield torch.tensor([float(row)]), row


class Divided(IterableDataset[Any]):
    """A stream that gives each rank rows of its own, rank 0 none at all."""

    sharded = True

    def __init__(self, count: int, rank: int, world: int) -> None:
        self.rows = [
            row for row in range(count) if world == 1 or row % (world - 1) + 1 == rank
        ]

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            yield torch.tensor([float(row)]), row


def prepared_loader(lab: Lab, loader: Any, place: int = 1) -> tuple[Accelerator, Any]:
    """The accelerator's form of a loader."""
    accelerator = lab.make()
    loaders = [loader] if place == 0 else [None, loader]
    return accelerator, accelerator.prepare(nn.Identity(), None, loaders)[2][place]


def rows_seen(accelerator: Accelerator, loader: Any) -> tuple[list[int], int]:
    """All ranks' rows that count, in gathered order, and this rank's number of batches."""
    seen, batches = [], 0
    for batch in loader:
        _, rows = accelerator.to_device(batch)
        seen += accelerator.gather(rows).tolist()
        batches += 1
    return seen, batches


def check_each_once(lab: Lab, loader: Any, count: int, place: int = 1) -> list[int]:
    """Every row is seen once over the ranks, in as many batches on each; gives the order."""
    accelerator, divided = prepared_loader(lab, loader, place)
    seen, batches = rows_seen(accelerator, divided)
    assert sorted(seen) == list(range(count))
    every = accelerator.gather(torch.tensor([batches])).tolist()
    assert every == [batches] * lab.world, every
    return seen


def talk_evaluation_sees_each_row_once_in_order(lab: Lab) -> None:
    for count in (1, 2, 7, 23, 24):
        for workers in (0,) if count != 23 else (0, 2):
            loader = DataLoader(Rows(count), batch_size=4, num_workers=workers)
            assert check_each_once(lab, loader, count) == list(range(count))
            accelerator, divided = prepared_loader(lab, loader)
            seen, batches = rows_seen(accelerator, divided)
            assert seen == list(range(count))
            assert batches == len(divided) == -(-count // (4 * lab.world))


def talk_tensors_are_divided_like_a_data_set(lab: Lab) -> None:
    rows = torch.arange(23)
    data = TensorDataset(rows[:, None].float(), rows)
    assert check_each_once(lab, DataLoader(data, batch_size=4), 23) == list(range(23))


def talk_shuffled_training_sees_each_row_once_in_one_process_order(lab: Lab) -> None:
    orders = []
    for _ in range(2):
        torch.manual_seed(5 + 100 * lab.rank)
        loader = DataLoader(Rows(23), batch_size=4, shuffle=True)
        orders.append(check_each_once(lab, loader, 23, place=0))
    torch.manual_seed(5)
    whole = [
        row
        for _, rows in DataLoader(Rows(23), batch_size=4, shuffle=True)
        for row in rows
    ]
    assert orders == [[int(row) for row in whole]] * 2


def talk_next_epoch_has_another_order(lab: Lab) -> None:
    torch.manual_seed(5)
    loader = DataLoader(Rows(23), batch_size=4, shuffle=True)
    accelerator, divided = prepared_loader(lab, loader, 0)
    first, second = (rows_seen(accelerator, divided)[0] for _ in range(2))
    assert first != second
    assert sorted(first) == sorted(second)


def talk_drop_last_drops_what_does_not_fill_every_rank(lab: Lab) -> None:
    loader = DataLoader(Rows(23), batch_size=4, drop_last=True)
    accelerator, divided = prepared_loader(lab, loader, 0)
    seen, batches = rows_seen(accelerator, divided)
    full = 23 // (4 * lab.world)
    assert seen == list(range(full * 4 * lab.world))
    assert batches == len(divided) == full


def talk_streams_are_divided(lab: Lab) -> None:
    for count in (1, 7, 23):
        loader = DataLoader(Stream(count), batch_size=4)
        assert check_each_once(lab, loader, count) == list(range(count))


class OwnOrder(torch.utils.data.Sampler[int]):
    """Rows backwards, counting passes, with state that differs between ranks."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.count - 1, -1, -1))


def talk_own_samplers_are_respected(lab: Lab) -> None:
    loader = DataLoader(Rows(23), batch_size=4, sampler=OwnOrder(23))
    assert check_each_once(lab, loader, 23) == list(range(22, -1, -1))
    batches = [[3, 4], [0], [1, 2, 5], [6], [7, 8]]
    own: Any = DataLoader(Rows(9), batch_sampler=batches)
    assert check_each_once(lab, own, 9) == [row for rows in batches for row in rows]
    sampler = torch.utils.data.BatchSampler(OwnOrder(9), 2, drop_last=False)
    listed: Any = DataLoader(Lists(9), batch_size=None, sampler=sampler)
    assert check_each_once(lab, listed, 9) == list(range(8, -1, -1))
    ready: Any = DataLoader(
        Lists(9), batch_size=None, sampler=[[5], [0, 1, 2], [8], [6, 7]]
    )
    assert sorted(seen_in(lab, ready)) == [0, 1, 2, 5, 6, 7, 8]


class Lists(Rows):
    """The same rows, asked for by lists."""

    def __getitem__(self, rows: Any) -> Any:
        return torch.tensor(rows)[:, None].float(), torch.tensor(rows)


def seen_in(lab: Lab, loader: Any) -> list[int]:
    """All ranks' rows that count."""
    return rows_seen(*prepared_loader(lab, loader))[0]


def talk_a_distributed_sampler_repeats_nothing(lab: Lab) -> None:
    sampler: Any = torch.utils.data.DistributedSampler(
        Rows(23), num_replicas=lab.world, rank=lab.rank, shuffle=True, seed=1
    )
    loader = DataLoader(Rows(23), batch_size=4, sampler=sampler)
    if lab.world > 1:
        check_each_once(lab, loader, 23)


def talk_ranks_that_run_dry_do_not_hang(lab: Lab) -> None:
    loader = DataLoader(Divided(10, lab.rank, lab.world), batch_size=4)
    check_each_once(lab, loader, 10)


def talk_validation_sees_the_buffers_of_rank_0(lab: Lab) -> None:
    accelerator = lab.make()
    model = seeded(Normed)
    loaders = [DataLoader(Rows(8), batch_size=1) for _ in range(2)]
    _, _, (train, valid) = accelerator.prepare(model, adam(model), loaders)
    model(torch.full((4, 5), float(lab.rank)))
    means = model.get_buffer("norm.running_mean")
    before = accelerator.broadcast(means.clone())
    next(iter(train))
    assert torch.equal(means, before) == (lab.rank == 0)
    next(iter(valid))
    assert torch.equal(means, before)
    accelerator.finish()


class Growing(Net):
    """A net with a buffer that may grow."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))


def talk_buffers_that_differ_in_shape_are_those_of_rank_0(lab: Lab) -> None:
    accelerator = lab.make()
    model: Any = seeded(Growing)
    loaders = [DataLoader(Rows(8), batch_size=1) for _ in range(2)]
    _, _, (_, valid) = accelerator.prepare(model, adam(model), loaders)
    model.seen = torch.full((1 + lab.rank,), 7.0)
    next(iter(valid))
    assert model.seen.tolist() == [7.0]
    accelerator.finish()


def talk_batches_fetched_ahead_keep_their_share(lab: Lab) -> None:
    accelerator, divided = prepared_loader(lab, DataLoader(Rows(9), batch_size=4))
    ahead = list(divided)
    rows = [accelerator.gather(accelerator.to_device(batch)[1]) for batch in ahead]
    assert torch.cat(rows).tolist() == list(range(9))


def talk_uneven_last_step_weighs_by_samples(lab: Lab) -> None:
    # Two ranks of 4 rows are one process of 8, the short last step included.
    torch.manual_seed(2)
    x, y = torch.randn(21, 5), torch.randn(21, 3)
    reference = seeded(Net)
    opt = torch.optim.SGD(reference.parameters(), lr=0.1)
    for rows in torch.arange(21).split(4 * lab.world):
        opt.zero_grad()
        regression(reference, "opt", (x[rows], y[rows])).backward()
        opt.step()
    accelerator = lab.make()
    model = seeded(Net)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    model, _, (loader,) = accelerator.prepare(model, {"opt": sgd}, [loader])
    for batch in loader:
        with accelerator.optimizing("opt"):
            accelerator.backward(regression(model, "opt", accelerator.to_device(batch)))
        assert accelerator.step("opt")
    found = accelerator.full_state_dict(model)
    check_equal(found, reference, rtol=1e-5, atol=1e-6)
    accelerator.finish()


# ---------------------------------------------------------------------------- talk


def talk_gather_joins_uneven_tensors_in_order_of_rank(lab: Lab) -> None:
    accelerator = lab.make()
    for dtype in (torch.float32, torch.int64, torch.bool, torch.bfloat16):
        mine = torch.full((lab.rank + 1, 2), lab.rank % 2, dtype=dtype)
        found = accelerator.gather(mine)
        wanted = [r % 2 for r in range(lab.world) for _ in range(r + 1)]
        assert found.dtype == dtype
        assert found[:, 1].tolist() == wanted
    empty = torch.empty(0 if lab.rank else 2, 3)
    assert accelerator.gather(empty).shape == (2, 3)
    assert accelerator.gather(torch.empty(0, 3)).shape == (0, 3)


def talk_gather_refuses_rows_that_differ(lab: Lab) -> None:
    accelerator = lab.make()
    is_last = lab.world > 1 and lab.rank == lab.world - 1
    for mine, got in (
        (torch.zeros(2, 4 if is_last else 3), r"float32 \(3,\)' on rank 0"),
        (torch.zeros(2, dtype=torch.int64 if is_last else None), r"float32 \(\)"),
        (torch.zeros(3, *[1] * is_last), r"float32 \(\)' on rank 0 and '.*\(1,\)'"),
    ):
        if lab.world == 1:
            assert accelerator.gather(mine) is not None
            continue
        error: Any = PeerError if lab.rank else ValueError
        with pytest.raises(error, match=f"gather: expected the same rows.*{got}"):
            accelerator.gather(mine)
    # A rank without rows takes the form of the others.
    mine = torch.zeros(0, dtype=torch.int64) if is_last else torch.ones(2, 3)
    found = accelerator.gather(mine)
    assert (found.dtype, found.shape[1:]) == (torch.float32, (3,))
    assert len(found) == 2 * max(1, lab.world - 1)


def talk_reduce_leaves_the_input_alone(lab: Lab) -> None:
    accelerator = lab.make()
    mine = torch.tensor([1.0, float(lab.rank)])
    last, pairs = lab.world - 1, lab.world * (lab.world - 1) / 2
    assert accelerator.reduce(mine, "sum").tolist() == [lab.world, pairs]
    assert accelerator.reduce(mine, "mean").tolist() == [1.0, pairs / lab.world]
    assert accelerator.reduce(mine, "max").tolist() == [1.0, last]
    assert mine.tolist() == [1.0, lab.rank]


def talk_broadcast_any_and_barrier_agree(lab: Lab) -> None:
    accelerator = lab.make()
    value = {"a": [1, 2.5, "b"], "t": torch.arange(3)} if lab.rank == 0 else None
    found = accelerator.broadcast(value)
    assert found["a"] == [1, 2.5, "b"]
    assert found["t"].tolist() == [0, 1, 2]
    assert accelerator.broadcast(lab.rank, src=lab.world - 1) == lab.world - 1
    assert accelerator.any(lab.rank == lab.world - 1)
    assert not accelerator.any(False)
    accelerator.barrier()
    assert accelerator.is_main == (lab.rank == 0)
    assert (accelerator.rank, accelerator.world_size) == (lab.rank, lab.world)


def talk_one_rank_is_chosen_by_name_or_refused(lab: Lab) -> None:
    accelerator = lab.make()
    model = seeded(Gan)
    accelerator.prepare(model, players(model))
    with pytest.raises(ValueError, match=r"disc.*gen"):
        accelerator.step(None)
    accelerator.finish()


def _found(prefix: str) -> dict[str, Callable[[Lab], None]]:
    """Cases by name."""
    found = {n: case for n, case in list(globals().items()) if n.startswith(prefix)}
    return {name.removeprefix(prefix): case for name, case in found.items()}


TRAINING = _found("case_")
"""Cases that depend on the ZeRO stage."""

TALKING = _found("talk_")
"""Cases of data and talk between ranks, which do not."""

CASES = {**TRAINING, **TALKING}
