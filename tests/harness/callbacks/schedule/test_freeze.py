from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import harness
from harness.callbacks import Freeze, LRScheduler
from tests.harness.checkpoint.test_resume import check_exact
from tests.harness.exact import Case, Net, TwoParts, X, Y, adam, same_bits, sgd
from tests.harness.fakes import At, Tape

OFF: dict[str, Any] = {"tracker": False, "verbose": False}


def states(*callbacks: Any, learner: Any = None, epochs: int = 3) -> list[Any]:
    """Weights and buffers at the beginning of the fit, and after each epoch."""
    found = []

    def note(ctx):
        state = ctx.model.state_dict()
        found.append({name: value.clone() for name, value in state.items()})

    notes = [At(event, note, weight=-1) for event in ("on_fit_begin", "on_epoch_end")]
    made = learner or sgd()
    made.fit((X, Y), epochs, callbacks=[*callbacks, *notes], seed=1, **OFF)
    return found


def changed(one: Any, two: Any) -> set[str]:
    return {name for name in one if not same_bits(one[name], two[name])}


def test_freeze_leaves_frozen_weights_and_statistics_as_they_are():
    first, *_, last = states(Freeze("body"))
    assert changed(first, last) == {"head.weight", "head.bias"}
    first, *_, last = states(Freeze("body.0.weight", "head"))
    assert changed(first, last).isdisjoint(
        {"body.0.weight", "head.weight", "head.bias"}
    )
    assert {"body.1.weight", "body.1.running_mean"} <= changed(first, last)


def test_freeze_unfreezes_step_by_step():
    # The bias before BatchNorm has no gradient but rounding.
    body = {n for n in Net().state_dict() if n.startswith("body.")} - {"body.0.bias"}
    rates = [Freeze("body", until=2), Freeze("body.0", until=3)]
    for callbacks in (rates, rates[::-1]):
        zero, one, two, three = states(*callbacks)
        assert changed(zero, one) == {"head.weight", "head.bias"}
        assert changed(one, two) >= body - {"body.0.weight"}
        assert not {"body.0.weight", "body.0.bias"} & changed(one, two)
        assert changed(two, three) >= body


def test_freeze_with_a_rate_for_what_is_unfrozen():
    # Plain descent: what is unfrozen moves by its own rate times the gradient.
    moves = []

    def note(ctx):
        weight = ctx.model.body[0].weight
        if weight.grad is not None:
            moves.append((weight.clone(), weight.grad.clone()))

    learner = harness.setup(
        Net, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.SGD
    ).set_opt_hparams(lr=0.1)
    watch = At("on_train_batch_before_step", note)
    freeze = Freeze("body", until=3, lr=1e-3)
    fitted = learner.fit((X, Y), 4, callbacks=[freeze, watch], seed=1, **OFF)
    assert len(moves) == 2
    (before, grad), (after, _) = moves
    torch.testing.assert_close(after, before - 1e-3 * grad)
    assert all(param.requires_grad for param in fitted.model.parameters())


def test_freeze_gives_each_part_the_rate_of_the_longest_name():
    groups: list[Any] = []

    def note(ctx):
        names = {id(p): n for n, p in ctx.model.named_parameters()}
        for group in ctx.opt.param_groups:
            own = sorted(names[id(p)] for p in group["params"])
            groups.append((group["lr"], own, group["momentum"]))

    rates = [
        Freeze("body.0", until=3, lr=1e-4),
        Freeze("body", until=2, lr=1e-3),
        Freeze("head.bias", until=2),
    ]
    states(*rates, At("on_fit_begin", note), learner=sgd(), epochs=1)
    assert groups == [
        (0.05, ["head.bias", "head.weight"], 0.9),
        (1e-4, ["body.0.bias", "body.0.weight"], 0.9),
        (1e-3, ["body.1.bias", "body.1.weight"], 0.9),
    ]


def test_freeze_of_a_whole_group_and_of_named_parameters():
    class Named(Net):
        def set_optimizers(self):
            body = list(self.body.named_parameters(prefix="body"))
            groups = [{"params": body}, {"params": list(self.head.named_parameters())}]
            return torch.optim.SGD(groups, lr=0.1)

    found = []
    rates = [Freeze("body.0", until=2, lr=0.2), Freeze("head", until=2, lr=0.3)]
    note = At(
        "on_fit_begin",
        lambda ctx: found.extend(
            (group["lr"], group["param_names"]) for group in ctx.opt.param_groups
        ),
    )
    states(*rates, note, learner=harness.setup(Named, loss=nn.CrossEntropyLoss()))
    assert found == [
        (0.1, ["body.1.weight", "body.1.bias"]),
        (0.3, ["weight", "bias"]),
        (0.2, ["body.0.weight", "body.0.bias"]),
    ]


CASES = {
    "one": Case(
        learner=adam,
        epochs=3,
        callbacks=lambda folder: [Freeze("body.0", until=2), Freeze("body.1", until=3)],
    ),
    "rates": Case(
        learner=adam,
        epochs=3,
        callbacks=lambda folder: [
            Freeze("body.0", until=2, lr=0.002),
            Freeze("body.1", until=3, lr=0.005),
            LRScheduler(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5),
        ],
    ),
    "two-optimizers": Case(
        learner=lambda: harness.setup(TwoParts, loss=nn.CrossEntropyLoss()),
        accumulate=2,
        callbacks=lambda folder: [Freeze("body.0", until=2)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_freeze_resumes_exactly(name, tmp_path):
    check_exact(CASES[name], tmp_path, [("on_train_batch_end", k) for k in (5, 8)])


class OnlyHead(Net):
    def set_optimizers(self):
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("callbacks", "module", "match"),
    [
        ([Freeze("boby")], Net, r"Freeze\('boby'\): .* of Net.*Did you mean 'body'"),
        ([Freeze("bod")], Net, r"Freeze\('bod'\): expected a module or parameter"),
        ([Freeze("body.2")], Net, r"Freeze\('body.2'\): expected .* with weights"),
        (
            [Freeze("body", until=2), Freeze("head")],
            Net,
            "something to train with 'opt' in epoch 1, got only frozen weights",
        ),
        ([Freeze("body")], TwoParts, "something to train with 'body' in epoch 1"),
        (
            [Freeze("body", until=2)],
            OnlyHead,
            r"Freeze\(until=2\): expected 'body.0.weight' in an optimizer",
        ),
    ],
)
def test_freeze_that_cannot_work_is_refused_before_training(callbacks, module, match):
    tape = Tape()
    optimizer = torch.optim.SGD if module is Net else None
    learner = harness.setup(module, loss=nn.CrossEntropyLoss(), optimizer=optimizer)
    with pytest.raises(ValueError, match=match):
        learner.fit((X, Y), 3, callbacks=[*callbacks, tape], **OFF)
    assert tape.events == []


def test_freeze_with_a_rate_needs_an_optimizer_with_groups():
    learner = harness.setup(
        Net, loss=nn.CrossEntropyLoss(), optimizer=torch.optim.LBFGS
    )
    with pytest.raises(ValueError, match=r"a rate for each group at 'opt', got LBFGS"):
        learner.fit((X, Y), 3, callbacks=[Freeze("body", until=2, lr=0.1)], **OFF)


def test_freeze_options_are_checked():
    with pytest.raises(TypeError, match=r"Freeze\(names\): expected names of modules"):
        Freeze()
    with pytest.raises(
        ValueError, match=r"Freeze\(until\): expected at least 2, got 1"
    ):
        Freeze("body", until=1)
    with pytest.raises(
        ValueError, match=r"Freeze\(lr\): expected until=\.\.\. with it"
    ):
        Freeze("body", lr=0.1)
    with pytest.raises(ValueError, match=r"Freeze\(lr\): expected more than 0, got 0"):
        Freeze("body", until=2, lr=0)
