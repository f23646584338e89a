from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import harness
from tests.harness.stops import Line, fit, sgd

NET, PART = Line(), nn.Linear(4, 4)


class HasPart(nn.Module):
    """Contains a module that somebody else holds."""

    def __init__(self, part: Any = PART) -> None:
        super().__init__()
        self.part, self.fc = part, nn.Linear(4, 1)

    def forward(self, x):
        return self.fc(self.part(x))


@functools.cache
def remembered() -> Line:
    return Line()


FACTORIES: dict[str, tuple[Any, Any]] = {
    "a global": (lambda: NET, NET),
    "cached": (remembered, remembered()),
    "in a sequence": (lambda: nn.Sequential(PART, nn.Linear(4, 1)), PART),
    "in a class": (HasPart, PART),
    "an iterator": (functools.partial(next, iter([NET, NET, NET, NET])), NET),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_fit_leaves_a_model_alone_that_somebody_holds(name):
    factory, held = FACTORIES[name]
    before = [param.clone() for param in held.parameters()]
    learner = sgd(factory)
    one = fit(learner)
    for old, param in zip(before, held.parameters(), strict=True):
        assert torch.equal(old, param)
        assert param.grad is None
    assert one.model is not held


def test_fits_with_a_module_as_hparam_start_alike():
    learner = sgd(HasPart).set_hparams(part=nn.Linear(4, 4))
    one, two = fit(learner), fit(learner)
    assert torch.equal(one.model.part.weight, two.model.part.weight)


class RefersToItself(Line):
    """Hooks refer to the model, which is new each time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.fc.register_forward_hook(lambda *_: self.seen.append(1))
        self.again = [self.fc]


@pytest.mark.parametrize("factory", [RefersToItself, lambda: RefersToItself()])
def test_new_model_that_refers_to_itself_is_not_copied(factory):
    torch.manual_seed(1)
    expected = torch.rand(3), Line().fc.weight
    fitted = harness.setup(factory, loss=nn.MSELoss(), optimizer=torch.optim.SGD)
    torch.manual_seed(1)
    torch.rand(3)
    model = fitted.build_model()
    assert torch.equal(model.fc.weight, expected[1])
    model(torch.zeros(2, 4))
    assert model.seen == [1]


def test_held_model_that_cannot_be_copied_is_refused():
    class Odd(Line):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copy")

    net = Odd()
    with pytest.raises(TypeError, match="a new model for each fit"):
        fit(sgd(lambda: net))
