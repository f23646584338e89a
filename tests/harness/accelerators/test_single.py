"""One device beyond the contract suite of all accelerators: choice, placing, mistakes."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import harness
from harness.accelerators.devices import choose_device
from harness.accelerators.optimizer_step import default_step_opt
from harness.accelerators.single import SingleDevice, load_optimizer_state
from tests.harness.fakes import Line


def prepared(**optimizers: Any) -> tuple[SingleDevice, Line]:
    accelerator, model = SingleDevice("cpu"), Line()
    named = {name: make(model) for name, make in optimizers.items()}
    accelerator.prepare(model, named or {"opt": sgd(model)})
    return accelerator, model


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def test_accelerator_of_a_process_started_alone_is_one_device():
    found = harness.accelerator(device="cpu", accumulate=3)
    assert type(found) is SingleDevice
    assert (found.device, found.accumulate) == (torch.device("cpu"), 3)
    assert (found.rank, found.local_rank, found.world_size) == (0, 0, 1)
    assert found.is_main


def test_accelerator_takes_the_best_device_by_default():
    assert harness.accelerator().device.type == choose_device().type


def test_accelerator_is_a_function_beside_its_package():
    assert harness.accelerators.SingleDevice is SingleDevice
    assert isinstance(harness.accelerator(device="cpu"), SingleDevice)


@pytest.mark.parametrize("accumulate", [0, -1])
def test_accumulate_below_one_is_refused(accumulate):
    with pytest.raises(
        ValueError, match=r"accelerator\(accumulate\): .*at least 1, got"
    ):
        SingleDevice("cpu", accumulate=accumulate)


def test_to_device_leaves_a_batch_that_is_there():
    x = torch.ones(2)
    assert SingleDevice("cpu").to_device([x])[0] is x


class Cleared(torch.optim.SGD):
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none=False)


@pytest.mark.parametrize("is_profiled", [False, True])
def test_step_clears_gradients_as_the_optimizer_does(is_profiled):
    accelerator, model = prepared(opt=sgd)
    other, kept = prepared(opt=lambda model: Cleared(model.parameters(), lr=0.1))
    with torch.profiler.profile() if is_profiled else nullcontext() as profiler:
        for one, own in ((accelerator, model), (other, kept)):
            one.backward(own(torch.ones(2)).sum())
            assert one.step()
    assert model.w.grad is None
    assert kept.w.grad == 0.0  # by its own way
    if is_profiled:
        names = {event.key for event in profiler.key_averages()}
        assert "Optimizer.zero_grad#SGD.zero_grad" in names


class Decayed(torch.optim.SGD):
    """An own step around torch's."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def test_step_around_the_one_of_the_class_above_counts_once():
    sgd(Line())  # since there is one, torch runs the hooks of both steps
    accelerator, model = prepared(opt=lambda model: Decayed(model.parameters(), 0.1))
    opt = accelerator._optimizers["opt"]
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    for _ in range(2):
        accelerator.backward(model(torch.ones(1)).sum())
        assert accelerator.step()
        schedule.step()
    assert accelerator.steps == {"opt": 2}
    accelerator.finish()
    opt.step()
    assert accelerator.steps == {"opt": 2}


class Above(torch.optim.Optimizer):
    """An optimizer as AdamW's base: the class below has no step of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                param.data.sub_(param.grad)


class Below(Above):
    pass


def test_step_of_the_class_above_counts_once_by_torchs_own_hook():
    accelerator, model = prepared(opt=lambda model: Below(model.parameters()))
    opt = accelerator._optimizers["opt"]
    assert "step" in vars(Below)  # torch puts its wrapper there
    assert "step" not in vars(opt)
    accelerator.backward(model(torch.ones(1)).sum())
    assert accelerator.step()
    assert accelerator.steps == {"opt": 1}


def test_name_of_one_of_several_optimizers_must_be_told():
    accelerator, model = prepared(a=sgd, b=sgd)
    with pytest.raises(ValueError, match=r"one of several .*Choose from \['a', 'b'\]"):
        accelerator.backward(model(torch.ones(1)).sum())


def test_step_before_the_window_is_full_does_nothing():
    accelerator, model = prepared()
    accelerator.window = 2
    accelerator.backward(model(torch.ones(1)).sum())
    assert not accelerator.is_boundary()
    assert not accelerator.step()
    assert model.w.item() == 0.0


def test_step_of_ones_own_that_does_not_step_is_told():
    accelerator, model = prepared()
    accelerator.backward(model(torch.ones(1)).sum())
    assert not accelerator.step(step_opt=lambda opt: None)
    assert accelerator.steps == {"opt": 0}
    assert model.w.grad is None


def test_step_default_calls_the_optimizer():
    accelerator, model = prepared()
    accelerator.backward(model(torch.ones(1)).sum())
    assert accelerator.step(step_opt=default_step_opt)
    assert model.w.item() == pytest.approx(-0.1)
    assert accelerator.steps == {"opt": 1}


def test_optimizing_without_gradients_freezes_nothing():
    accelerator, model = prepared(a=sgd, b=sgd)
    with torch.no_grad(), accelerator.optimizing("a"):
        assert model.w.requires_grad


def test_optimizing_gives_gradients_back_after_an_error():
    model = Line()
    halves = {
        "w": torch.optim.SGD([model.w], lr=0.1),
        "b": torch.optim.SGD([model.b], lr=0.1),
    }
    accelerator = SingleDevice("cpu")
    accelerator.prepare(model, halves)

    def fail() -> None:
        with accelerator.optimizing("w"):
            assert (model.w.requires_grad, model.b.requires_grad) == (True, False)
            raise ArithmeticError

    with pytest.raises(ArithmeticError):
        fail()
    assert (model.w.requires_grad, model.b.requires_grad) == (True, True)


def test_optimizers_that_share_a_parameter_both_train_it():
    accelerator, model = prepared(a=sgd, b=sgd)
    for name in ("a", "b"):
        with accelerator.optimizing(name):
            accelerator.backward(model(torch.ones(1)).sum(), name)
        assert accelerator.step(name)
    assert model.w.item() == pytest.approx(-0.2)


def test_counting_counts_one_backward_whoever_makes_it():
    accelerator, model = prepared()
    for own in (True, False):
        with accelerator.counting_backward():
            loss = model(torch.ones(1)).sum()
            loss.backward() if own else accelerator.backward(loss)
        assert accelerator.is_boundary()
        assert accelerator.step()
        assert not accelerator.is_boundary()


def test_finish_takes_the_counters_off():
    model, accelerator = Line(), SingleDevice("cpu")
    opt = sgd(model)
    accelerator.prepare(model, {"opt": opt})
    opt.step()
    accelerator.finish()
    opt.step()
    assert accelerator.steps == {"opt": 1}


@pytest.mark.parametrize("norm_type", [1.0, 2.0, float("inf")])
def test_clip_of_sparse_gradients_equals_that_of_dense_ones(norm_type):
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = torch.nn.EmbeddingBag(9, 2, sparse=sparse, mode="sum")
        accelerator = SingleDevice("cpu")
        opt = torch.optim.SGD(model.parameters(), lr=1.0)
        accelerator.prepare(model, {"opt": opt})
        model(torch.tensor([[1, 1, 3], [3, 4, 8]])).pow(2).sum().backward()
        norm = accelerator.clip(0.5, "opt", norm_type)
        found.append((norm, model.weight.grad.to_dense()))
        accelerator.finish()
    (norm, grad), (dense_norm, dense_grad) = found
    torch.testing.assert_close(norm, dense_norm)
    torch.testing.assert_close(grad, dense_grad)


@pytest.mark.parametrize("saved", [{"fused": True}, {"foreach": True}], ids=str)
def test_restored_optimizer_steps_as_the_code_says_now(saved: dict[str, bool]) -> None:
    model, batch = nn.Linear(2, 1), torch.ones(3, 2)

    def stepped(**how: Any) -> torch.optim.Optimizer:
        opt = torch.optim.AdamW(model.parameters(), **how)
        model(batch).sum().backward()
        opt.step()
        return opt

    then, now = stepped(lr=0.5, **saved), stepped(lr=0.1)
    load_optimizer_state(now, then.state_dict(), "opt")
    (group,) = now.param_groups
    assert (group["lr"], group["fused"], group["foreach"]) == (0.5, None, None)
    for param in model.parameters():
        assert torch.equal(now.state[param]["exp_avg"], then.state[param]["exp_avg"])
