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


DATA = [(torch.randn(8, 4), torch.randn(8, 1)) for _ in range(3)]


def train_by_hand(model: nn.Module, loss: Any = None, epochs: int = 1) -> None:
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(epochs):
        for x, y in DATA:
            (loss or nn.functional.mse_loss)(model(x), y).backward()
            opt.step()
            opt.zero_grad()


def train(factory: Any, loss: Any = nn.functional.mse_loss) -> harness.Fitted:
    learner = harness.setup(factory, loss=loss, optimizer=torch.optim.SGD)
    loader = torch.utils.data.DataLoader(DATA, batch_size=None)
    return learner.set_opt_hparams(lr=0.1).fit(loader, 1, tracker=False)


def clamp(model: nn.Module) -> None:
    for param in model.parameters():
        param.register_hook(lambda grad: grad.clamp(-0.01, 0.01))


def decay(model: nn.Module) -> None:
    for param in model.parameters():
        param.register_hook(lambda grad, param=param: grad + 0.5 * param.detach())


def scale_after_accumulation(model: nn.Module) -> None:
    def scale(param: Any) -> None:
        param.grad.mul_(0.1 + model.fc.bias.detach() ** 2)

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(scale)


def patch_forward(model: nn.Module) -> None:
    old = model.forward
    model.forward = lambda x: old(2 * x) + model.fc.weight.sum()


@pytest.mark.parametrize(
    "change", [clamp, decay, scale_after_accumulation, patch_forward]
)
def test_copied_model_has_the_hooks_and_changes_of_the_original(change):
    held, other = Line(), Line()
    other.load_state_dict(held.state_dict())
    change(held)
    change(other)
    fitted = train(lambda: held)
    train_by_hand(other)
    assert torch.equal(fitted.model.fc.weight, other.fc.weight)
    more = fitted.fit(
        torch.utils.data.DataLoader(DATA, batch_size=None), 1, tracker=False
    )
    train_by_hand(other)
    assert torch.equal(more.model.fc.weight, other.fc.weight)
    assert not torch.equal(fitted.model.fc.weight, other.fc.weight)


def test_hooks_of_a_copied_model_share_what_those_of_the_original_share():
    held, seen = HasPart(nn.Linear(4, 4)), list[object]()
    target: nn.Module = held.part

    def choose(*_: object) -> None:
        nonlocal target
        target = held.fc

    def record(layer: object, *_: object, given: object = held.fc) -> None:
        seen.extend([target is layer, given is layer])

    def collect(store: list[object], part: object, layer: object, *_: object) -> None:
        store.append(part is layer)

    held.part.register_forward_hook(choose)
    held.fc.register_forward_hook(record)
    held.fc.register_forward_hook(functools.partial(collect, seen, held.fc))
    train(lambda: held)
    assert seen == [True] * 9


class Extractor:
    """Collects from a model that it holds."""

    def __init__(self, net: nn.Module) -> None:
        self.net, self.seen = net, list[bool]()
        net.fc.register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, *_: object) -> None:
        self.seen.append(layer is self.net.fc)


def test_what_the_holder_of_a_copied_model_collects_reaches_the_user():
    held = Line()
    extractor = Extractor(held)
    train(lambda: held)
    assert extractor.seen == [True] * 3


class Collector:
    """Keeps the output of a layer, for a loss."""

    def __init__(self, layer: nn.Module) -> None:
        layer.register_forward_hook(self.keep)

    def keep(self, layer: nn.Module, input: Any, output: Any) -> None:
        self.output = output

    def loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(pred, target) + self.output.abs().mean()


def test_what_a_hook_collects_from_a_copied_model_reaches_the_user():
    held, other = Line(), Line()
    other.load_state_dict(held.state_dict())
    seen, by_hand = Collector(held.fc), Collector(other.fc)
    fitted = train(lambda: held, lambda pred, target: seen.loss(pred, target))
    train_by_hand(other, by_hand.loss)
    assert torch.equal(fitted.model.fc.weight, other.fc.weight)


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_scripted_model_is_trained_tracked_and_trained_further(tmp_path):
    held = torch.jit.script(Line())
    other = Line()
    other.load_state_dict(held.state_dict())
    learner = harness.setup(
        lambda: nn.Sequential(held), loss=nn.MSELoss(), optimizer=torch.optim.SGD
    )
    loader = torch.utils.data.DataLoader(DATA, batch_size=None)
    tracker = {"runs_dir": tmp_path, "delivery": False}
    fitted = learner.set_opt_hparams(lr=0.1).fit(loader, 1, tracker=tracker)
    more = fitted.fit(loader, 1, tracker=False)
    train_by_hand(other, epochs=2)
    assert torch.equal(more.model.state_dict()["0.fc.weight"], other.fc.weight)
    train(lambda: held).evaluate(loader)


class KeepsState(Line):
    """Keeps tensors with their graph, by a hook that refers to the model."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[torch.Tensor] = []
        self.fc.register_forward_hook(lambda *args: self.keep(args[-1]))

    def keep(self, output: torch.Tensor) -> None:
        self.kept = [output]

    def loss(self, pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(pred, target) + self.kept[0].abs().mean()


def test_model_that_keeps_tensors_with_a_graph_trains_further():
    fitted = train(KeepsState, None)
    other = KeepsState()
    other.load_state_dict(fitted.model.state_dict())
    more = fitted.fit(
        torch.utils.data.DataLoader(DATA, batch_size=None), 1, tracker=False
    )
    train_by_hand(other, other.loss)
    assert torch.equal(more.model.fc.weight, other.fc.weight)
