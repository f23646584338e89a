"""Models, optimizers and devices that are refused before training."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import harness
from harness.accelerators.deepspeed.config import ConfigFacts
from harness.accelerators.deepspeed.validation import (
    check_devices,
    check_dtypes,
    check_layers,
    check_packages,
    describe_loaders,
)
from harness.accelerators.single import SingleDevice
from tests.harness.accelerators.cases import Net, adam, prepared, two_rates

STAGES = [0, 1, 2, 3]


def test_two_ranks_with_one_device_are_refused() -> None:
    check_devices(["gpu 0", "gpu 1"])
    with pytest.raises(ValueError, match=r"a device for each of 2 ranks, got 1\."):
        check_devices(["gpu 0", "gpu 0"])


def test_rows_of_a_split_are_compared_between_ranks() -> None:
    data = torch.utils.data.TensorDataset(torch.arange(9))

    def describe(rows: list[int]) -> dict[str, object]:
        subset = torch.utils.data.Subset(data, rows)
        return describe_loaders([torch.utils.data.DataLoader(subset), None])

    assert describe([1, 5]) == describe([1, 5])
    assert describe([1, 5]) != describe([2, 5])


@pytest.mark.parametrize("stage", STAGES)
def test_lbfgs_is_refused(stage: int, make: Any) -> None:
    model = Net()
    opt = torch.optim.LBFGS(model.parameters())
    with pytest.raises(
        ValueError, match=r"prepare\('opt'\): expected an optimizer without"
    ):
        make(stage).prepare(model, {"opt": opt})


def in_parts(first: nn.Module, second: nn.Module) -> nn.Module:
    return nn.ModuleDict({"first": first, "second": second})


REAL = nn.Linear(2, 2)
MIXED = in_parts(nn.Linear(2, 2, dtype=torch.float64), REAL)


@pytest.mark.parametrize(
    ("stage", "model", "match"),
    [
        (
            0,
            in_parts(nn.Linear(2, 2, dtype=torch.complex64), REAL),
            "got 'first.*compl",
        ),
        (1, MIXED, r"one dtype at ZeRO 1, got torch.float64 'first.*float32 'second"),
        (3, MIXED, "one dtype at ZeRO 3"),
        (1, in_parts(nn.Embedding(3, 2, max_norm=1.0), REAL), "'first' with max_norm"),
    ],
)
def test_weights_that_engines_would_change_otherwise_are_refused(
    stage: int, model: nn.Module, match: str, make: Any
) -> None:
    opt = torch.optim.SGD(model.parameters(), lr=1)
    with pytest.raises(ValueError, match=f"prepare: expected .*{match}"):
        make(stage).prepare(model, {"opt": opt})


def test_weights_of_other_dtypes_that_engines_step_as_they_are_may_be_trained() -> None:
    config = {"zero_optimization": {"stage": 2}}
    groups = [{"params": part.parameters()} for part in MIXED.children()]
    check_dtypes(MIXED, {"opt": torch.optim.SGD(groups, lr=1)}, config)
    whole = {"opt": torch.optim.SGD(MIXED.parameters(), lr=1)}
    check_dtypes(MIXED, whole, {})
    check_dtypes(MIXED, whole, config | {"bf16": {"enabled": True}})
    of_parts = {n: torch.optim.SGD(p.parameters(), lr=1) for n, p in MIXED.items()}
    check_dtypes(MIXED, of_parts, {"zero_optimization": {"stage": 3}})


def test_layers_that_need_one_device_or_a_gpu_are_refused_on_ranks() -> None:
    facts = ConfigFacts(world_size=2, device="cpu")
    model = in_parts(nn.SyncBatchNorm(2), nn.EmbeddingBag(3, 2, max_norm=1.0))
    with pytest.raises(
        ValueError, match="a GPU for SyncBatchNorm 'first', got the CPU"
    ):
        check_layers(model, 0, facts)
    with pytest.raises(ValueError, match="got 'second' with max_norm"):
        check_layers(model, 0, replace(facts, device="cuda"))
    check_layers(model, 0, replace(facts, world_size=1))
    check_layers(model.requires_grad_(False), 3, facts)


@pytest.mark.filterwarnings("ignore")  # both are deprecated in some versions
def test_layers_that_zero_3_cannot_divide_are_refused() -> None:
    facts = ConfigFacts(world_size=1, device="cpu")
    scripted = in_parts(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"without torch.jit at ZeRO 3, got 'second'"):
        check_layers(scripted, 3, facts)
    check_layers(scripted, 2, facts)
    empty = in_parts(nn.Linear(2, 2), nn.ParameterList([torch.empty(0)]))
    with pytest.raises(ValueError, match=r"elements at ZeRO 3, got 'second.0' without"):
        check_layers(empty, 3, facts)
    normed = in_parts(nn.Linear(2, 2), torch.nn.utils.weight_norm(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"parametrizations.weight_norm of 'second'"):
        check_layers(normed, 3, replace(facts, world_size=2))
    check_layers(normed, 3, facts)


def test_parameters_with_two_owners_are_refused(make: Any) -> None:
    model = Net()
    opts = {
        "a": torch.optim.SGD(model.parameters(), lr=1),
        "b": torch.optim.SGD(model.head.parameters(), lr=1),
    }
    with pytest.raises(
        ValueError, match=r"one optimizer for 'head.weight', got 'a' and 'b'"
    ):
        make().prepare(model, opts)


def test_parameters_of_another_model_are_refused(make: Any) -> None:
    opt = torch.optim.SGD(Net().parameters(), lr=1)
    with pytest.raises(
        ValueError, match=r"expected parameters of the model, got one of shape"
    ):
        make().prepare(Net(), {"opt": opt})


def test_optimizer_in_two_places_is_refused(make: Any) -> None:
    config = {"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    with pytest.raises(ValueError, match=r"one place for the optimizer, got \['opt'\]"):
        prepared(make(1, **config))


def test_no_optimizer_is_refused(make: Any) -> None:
    with pytest.raises(
        ValueError, match="an optimizer in the learner or in the config, got none"
    ):
        make().prepare(Net(), {})


def test_optimizer_of_frozen_parameters_is_refused(make: Any) -> None:
    model = Net()
    opts = two_rates(model)
    model.head.requires_grad_(False)
    with pytest.raises(
        ValueError, match=r"prepare\('head'\): expected parameters to train"
    ):
        make(1).prepare(model, opts)


@pytest.mark.parametrize("stage", STAGES)
def test_parameter_without_dims_is_refused(stage: int, make: Any) -> None:
    model = Net()
    model.scale = nn.Parameter(torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"got 'scale' of shape \(\).*shape \(1,\)"):
        make(stage).prepare(model, adam(model))


class Lazy(Net):
    """A net whose first layer takes its width from the data."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.LazyLinear(7)


@pytest.mark.parametrize("has_optimizer", [True, False])
def test_lazy_layer_is_refused(has_optimizer: bool, make: Any) -> None:
    model = Lazy()
    with pytest.raises(ValueError, match=r"with shapes, got the lazy 'body.weight'"):
        make(2).prepare(model, adam(model) if has_optimizer else None)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("stage", STAGES)
def test_sparse_gradients_are_refused_where_zero_divides_them(
    stage: int, kind: Any, make: Any
) -> None:
    model = Net()
    model.table = kind(5, 7, sparse=True)
    if not stage:
        make(stage).prepare(model, adam(model))
        return
    match = rf"dense gradients at ZeRO {stage}, got sparse ones of 'table'"
    with pytest.raises(ValueError, match=match):
        make(stage).prepare(model, adam(model))
    model.table.requires_grad_(False)
    make(stage).prepare(model, adam(model))


class Rowwise(torch.optim.SGD):
    """An optimizer of the user's own."""


def test_unknown_optimizer_is_refused_where_zero_divides_it(make: Any) -> None:
    def own(model: nn.Module) -> Any:
        return {"opt": Rowwise(model.parameters(), lr=0.1)}

    with pytest.raises(
        ValueError, match=r"each element separately at ZeRO 2, got Rowwise"
    ):
        prepared(make(2), Net, own)
    prepared(make(0), Net, own)
    prepared(make(2, zero_allow_untested_optimizer=True), Net, own)


@pytest.mark.parametrize(
    ("section", "package"),
    [("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet", "comet_ml")],
)
def test_missing_package_of_a_monitor_is_named(
    section: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"expected the package '{package}' for '{section}'"
    ):
        check_packages({section: {"enabled": True}})
    check_packages({section: {"enabled": False}})


@pytest.mark.parametrize(
    ("section", "recipe", "match"),
    [
        ("optimizer", {"type": "AdamX", "params": {}}, "an optimizer that DeepSpeed"),
        ("optimizer", {"type": "SGD", "params": {"rate": 1}}, "argument 'rate'"),
        ("optimizer", {"type": "SGD", "params": {"lr": "x"}}, "an optimizer that"),
        ("scheduler", {"type": "WarmUp"}, "a scheduler that DeepSpeed builds"),
        ("scheduler", {"type": "WarmupLR", "params": {"a": 1}}, "argument 'a'"),
        (
            "scheduler",
            {"type": "WarmupLR", "params": {"warmup_num_steps": "auto"}},
            "a value for scheduler.params.warmup_num_steps, got 'auto'",
        ),
    ],
)
def test_recipe_that_deepspeed_cannot_build_is_named(
    section: str, recipe: dict[str, Any], match: str, make: Any
) -> None:
    model = Net()
    opts = {} if section == "optimizer" else adam(model)
    with pytest.raises(ValueError, match=rf"accelerator\(config\): .*{match}"):
        make(1, **{section: recipe}).prepare(model, opts)


def test_other_failures_of_deepspeed_name_the_config(make: Any) -> None:
    # Quantized collectives have no kernel on the CPU.
    zero = {"stage": 3, "zero_quantized_weights": True}
    model = Net()
    opt = torch.optim.SGD(model.parameters(), lr=1)
    with pytest.raises(ValueError, match="not been implemented on CPU") as caught:
        make(3, zero_optimization=zero).prepare(model, {"opt": opt})
    assert "zero_optimization has " in caught.value.__notes__[0]
    assert "zero_quantized_weights" in caught.value.__notes__[0]


def test_warm_up_takes_its_rate_from_the_optimizer(make: Any) -> None:
    model = Net()
    params = {"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": 2}
    scheduler = {"type": "WarmupLR", "params": params}
    _, opts, _ = make(1, scheduler=scheduler).prepare(model, adam(model))
    assert opts["opt"].param_groups[0]["lr"] == 0.0


def test_optimizer_with_modes_is_refused(make: Any) -> None:
    class HasModes(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    model = Net()
    opt = HasModes(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"expected an optimizer without train\(\) and eval\(\)"
    ):
        make(0).prepare(model, {"opt": opt})


@pytest.mark.parametrize(
    ("config", "zero_init", "kind", "match"),
    [
        (None, True, ValueError, r"zero_init\): expected ZeRO 3, got 0. Set"),
        ({"zero_optimization": 2}, True, ValueError, "expected ZeRO 3, got 2"),
        ({"zero_optimization": 3}, "yes", TypeError, "True or False, got 'yes'"),
    ],
)
def test_zero_init_is_checked(
    config: Any, zero_init: Any, kind: type[Exception], match: str
) -> None:
    with pytest.raises(kind, match=match):
        harness.accelerator(config, device="cpu", zero_init=zero_init)


def test_model_that_is_divided_already_is_refused_where_it_cannot_be_trained(
    make: Any,
) -> None:
    with harness.accelerator(
        {"zero_optimization": 3}, device="cpu", zero_init=True
    ).building():
        model = Net()
    opt = {"opt": torch.optim.SGD(model.parameters(), lr=0.1)}
    advice = (
        r'got a part of .body.*Train with "zero_optimization": .*outside of deepspeed'
    )
    with pytest.raises(ValueError, match=f"whole parameters at ZeRO 2, {advice}"):
        make(2).prepare(model, opt)
    with pytest.raises(ValueError, match="parameters without an optimizer, got a part"):
        make(3).prepare(model)
    with pytest.raises(ValueError, match="whole parameters on one device, got a part"):
        SingleDevice("cpu").prepare(model, opt)
    learner = harness.setup(lambda: model, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    with pytest.raises(TypeError, match=r"held elsewhere and divided by .*zero.Init"):
        learner.build_model()  # outside of a fit
    params: list[Any] = [*model.parameters()]
    for param in params:
        param.ds_zero_partition_world_size = 2
    with pytest.raises(
        ValueError, match=r"divided over 1 ranks, got 2. Leave data_par"
    ):
        make(3).prepare(model, opt)


def test_parameters_without_values_are_refused(make: Any) -> None:
    with torch.device("meta"):
        model = Net()
    opt = {"opt": torch.optim.SGD(model.parameters(), lr=0.1)}
    with pytest.raises(
        ValueError, match=r"on 'meta'. Build it on the CPU; harness.acc"
    ):
        make(3).prepare(model, opt)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: nn.LazyLinear(2), r"got the lazy 'LazyLinear\.weight'"),
        (lambda: Scaled(), r"got 'Scaled\.scale' of shape \(\)"),
    ],
)
def test_layer_that_cannot_be_divided_is_refused(build: Any, match: str) -> None:
    accelerator = harness.accelerator(
        {"zero_optimization": 3}, device="cpu", zero_init=True
    )
    with pytest.raises(ValueError, match=match), accelerator.building():
        build()


class Scaled(nn.Module):
    """Has a parameter without dims."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))
