"""Steps of torch's optimizers without its mark for a profiler: the same in every other way."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from harness.accelerators.optimizer_step import clear_gradients, default_step_opt

KINDS = [
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.NAdam,
]


def make(kind: type = torch.optim.AdamW) -> tuple[nn.Linear, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = nn.Linear(3, 2)
    return net, kind(net.parameters(), lr=0.1)


def backward(net: nn.Linear) -> None:
    net(torch.ones(4, 3)).square().sum().backward()


def is_marked(opt: torch.optim.Optimizer) -> bool:
    """Whether a step runs torch's wrapper, which calls this method of the optimizer."""
    seen = []
    opt._optimizer_step_code = lambda: seen.append(True)  # type: ignore[method-assign]
    default_step_opt(opt)
    return bool(seen)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_states_are_those_of_a_plain_step(kind: type) -> None:
    ours, opt = make(kind)
    theirs, plain = make(kind)
    for _ in range(3):
        backward(ours)
        backward(theirs)
        default_step_opt(opt)
        plain.step()
        clear_gradients(opt)
        plain.zero_grad()
    assert torch.equal(ours.weight, theirs.weight)
    assert ours.weight.requires_grad
    assert ours.weight.grad is None
    found, expected = opt.state_dict()["state"], plain.state_dict()["state"]
    for number, state in expected.items():
        for name, value in state.items():
            assert torch.equal(
                torch.as_tensor(found[number][name]), torch.as_tensor(value)
            )


def test_it_is_short_with_this_version_of_torch() -> None:
    net, opt = make()
    backward(net)
    assert not is_marked(opt)


def test_hooks_after_a_step_see_what_torch_shows_them() -> None:
    net, opt = make()
    seen: list[Any] = []
    opt.register_step_post_hook(lambda *given: seen.append(given))
    backward(net)
    default_step_opt(opt)
    assert not is_marked(opt)
    assert seen == [(opt, (opt,), {})] * 2


def test_hooks_before_a_step_and_of_all_optimizers_are_torchs_own() -> None:
    net, opt = make()
    backward(net)
    handle = opt.register_step_pre_hook(lambda *_: None)
    assert is_marked(opt)
    handle.remove()
    handle = register_optimizer_step_post_hook(lambda *_: None)
    try:
        assert is_marked(opt)
    finally:
        handle.remove()
    assert not is_marked(opt)


def test_a_schedule_and_a_profiler_see_each_step() -> None:
    net, opt = make()
    backward(net)
    with torch.profiler.profile() as profile:
        default_step_opt(opt)
    assert "Optimizer.step#AdamW.step" in {
        event.key for event in profile.key_averages()
    }
    schedule = torch.optim.lr_scheduler.StepLR(opt, 1)
    assert is_marked(opt)
    schedule.step()  # would warn if no step had been seen


class Own(torch.optim.SGD):
    """An optimizer whose step does more."""

    steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        super().step(closure)


class NotTorchs:
    """What only looks like an optimizer."""

    steps = 0

    def step(self) -> None:
        self.steps += 1


def test_own_steps_are_called() -> None:
    net = nn.Linear(3, 2)
    opt, other = Own(net.parameters(), lr=0.1), NotTorchs()
    backward(net)
    before = copy.deepcopy(net.weight)
    default_step_opt(opt)
    default_step_opt(other)
    assert opt.steps == other.steps == 1
    assert not torch.equal(net.weight, before)


def test_a_method_put_on_the_class_later_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net, opt = make()
    backward(net)
    default_step_opt(opt)
    seen: list[Any] = []
    monkeypatch.setattr(type(opt), "step", lambda self: seen.append(self))
    default_step_opt(opt)
    assert seen == [opt]
