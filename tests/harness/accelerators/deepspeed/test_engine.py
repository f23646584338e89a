"""What one engine and its optimizer refuse."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from torch import nn

from tests.harness.accelerators.cases import Net, prepared


@pytest.mark.parametrize("stage", [1, 3])
def test_parameters_unfrozen_later_are_refused(stage: int, make: Any) -> None:
    def frozen() -> nn.Module:
        net = Net()
        net.body.requires_grad_(False)
        return net

    accelerator = make(stage)
    model, _ = prepared(accelerator, frozen)
    model.body.requires_grad_(True)
    with (
        pytest.raises(RuntimeError, match=rf"at ZeRO {stage}, got some unfrozen later"),
        accelerator.optimizing(),
    ):
        raise AssertionError("not reached")
    model.body.requires_grad_(False)
    model.head.requires_grad_(False)
    with (
        pytest.raises(RuntimeError, match="got some frozen later"),
        accelerator.optimizing(),
    ):
        raise AssertionError("not reached")


def test_step_of_the_optimizer_itself_without_backward_is_refused(make: Any) -> None:
    _, opts = prepared(make(1))
    with pytest.raises(
        RuntimeError, match=r"expected accelerator.backward\(loss\) first"
    ):
        opts["opt"].step()


def test_closure_is_refused(make: Any) -> None:
    _, opts = prepared(make(1))
    with pytest.raises(
        TypeError, match=r"step\(closure\): expected None under DeepSpeed"
    ):
        opts["opt"].step(lambda: 1.0)


def test_parameter_group_added_later_is_refused(make: Any) -> None:
    model, opts = prepared(make(1))
    with pytest.raises(
        RuntimeError, match=r"add_param_group: expected all .* in prepare"
    ):
        opts["opt"].add_param_group({"params": [*model.head.parameters()]})


def test_optimizer_is_not_pickled(make: Any) -> None:
    _, opts = prepared(make(1))
    with pytest.raises(TypeError, match="got pickle or deepcopy"):
        pickle.dumps(opts["opt"])
