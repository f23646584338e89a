"""Models, their outputs, losses and steps, as people write them."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.odd.batches import CLASSES, WIDTH, BatchForm, Out, Record, Sample, as_pair

HIDDEN = 5


# ----------------------------------------------------------------------- bodies


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, HIDDEN)
        self.last = nn.Linear(HIDDEN, CLASSES)

    def hidden(self, x: Tensor) -> Tensor:
        return self.first(x).tanh()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x)
        return self.last(hidden), hidden


class Tied(Plain):
    """One weight under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.two.weight = self.one.weight

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(self.two(self.one(x).tanh()))


class Frozen(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.first.requires_grad_(False)


class Lazy(Plain):
    """Layers that find out their sizes, and keep running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LazyLinear(HIDDEN)
        self.last = nn.LazyLinear(CLASSES)


class Growing(Plain):
    """A buffer that gets longer, and one that is None at first."""

    seen: Tensor
    largest: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))
        self.register_buffer("largest", None)

    def hidden(self, x: Tensor) -> Tensor:
        hidden = super().hidden(x)
        if self.training:
            self.seen = torch.cat([self.seen, hidden.detach().mean().reshape(1)])
            self.largest = hidden.detach().amax(0)
        return hidden if self.largest is None else hidden + 0.1 * self.largest


class Norm(Plain):
    """Statistics of batches; one row has none, so it is passed on."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(HIDDEN)

    def hidden(self, x: Tensor) -> Tensor:
        hidden = super().hidden(x)
        return self.norm(hidden) if len(x) > 1 else hidden


class Dropout(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.4)

    def hidden(self, x: Tensor) -> Tensor:
        return self.drop(super().hidden(x))


class Noise(Plain):
    """A generator of its own, and a number that no tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = torch.Generator().manual_seed(3)
        self.calls = 0

    def hidden(self, x: Tensor) -> Tensor:
        hidden = super().hidden(x)
        if not self.training:
            return hidden
        self.calls += 1
        drawn = torch.randn(hidden.shape, generator=self.noise)
        return hidden + 0.01 * self.calls * drawn

    def get_extra_state(self) -> dict[str, int]:
        return {"calls": self.calls}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.calls = state["calls"]


class Spectral(Plain):
    """A parametrized weight, whose buffers change in training."""

    def __init__(self) -> None:
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.first)


class Conv(Plain):
    """Weights in channels-last order."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 2)
        self.to(memory_format=torch.channels_last)

    def hidden(self, x: Tensor) -> Tensor:
        image = x.view(-1, 1, 2, 2).expand(-1, 2, -1, -1)
        return super().hidden(self.conv(image).flatten(1))


class Sparse(Plain):
    """Sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, WIDTH, sparse=True)

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x + self.table((x[:, 0] * 3).long().abs() % 8))


class Late(Plain):
    """A layer that is frozen until a callback gives it to the optimizer."""

    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(HIDDEN, HIDDEN).requires_grad_(False)

    def hidden(self, x: Tensor) -> Tensor:
        return self.late(super().hidden(x))


class Double(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.double()

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x.double())


class InPlace(Plain):
    """Changes its input and reuses one tensor for its output in evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers_by_rows: dict[int, Tensor] = {}

    def hidden(self, x: Tensor) -> Tensor:
        return super().hidden(x.mul_(0.5) if x.is_contiguous() else x * 0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, hidden = super().forward(x)
        if self.training:
            return scores, hidden
        reused = self.buffers_by_rows.setdefault(len(x), torch.zeros(len(x), CLASSES))
        return reused.copy_(scores), hidden


BODIES: dict[str, type[Plain]] = {
    "plain": Plain,
    "tied": Tied,
    "frozen": Frozen,
    "lazy": Lazy,
    "growing": Growing,
    "norm": Norm,
    "dropout": Dropout,
    "noise": Noise,
    "spectral": Spectral,
    "conv": Conv,
    "sparse": Sparse,
    "double": Double,
    "in place": InPlace,
    "late": Late,
}


# ---------------------------------------------------------------------- outputs

OUTPUTS: dict[str, Callable[[Tensor, Any], Any]] = {
    "tensor": lambda scores, other: scores,
    "tuple": lambda scores, other: (scores, other),
    "mapping": lambda scores, other: {"scores": scores, "y": other},
    "model output": lambda scores, other: Out(scores=scores, y=other),
    "dataclass": lambda scores, other: Record([], scores, other),
    "named tuple": lambda scores, other: Sample(scores, other),
}
"""What ``forward`` makes of scores, and of the classes if the input has them."""


# ----------------------------------------------------------------------- losses


def cross_entropy(pred: Any, target: Any) -> Tensor:
    return functional.cross_entropy(*as_pair(pred, target))


class Weighted(nn.Module):
    """A loss with weights of classes, which are a buffer."""

    weights: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weights", torch.tensor([1.0, 2.0, 0.5]))

    def forward(self, pred: Any, target: Any) -> Tensor:
        scores, target = as_pair(pred, target)
        return functional.cross_entropy(scores, target, self.weights.to(scores.dtype))


class Counting(Weighted):
    """A loss whose buffer changes with each call in training."""

    def forward(self, pred: Any, target: Any) -> Tensor:
        loss = super().forward(pred, target)
        if torch.is_grad_enabled():
            self.weights = self.weights * 1.01
        return loss


def parts(pred: Any, target: Any) -> dict[str, Any]:
    scores, target = as_pair(pred, target)
    entropy = functional.cross_entropy(scores, target)
    return {"entropy": entropy, "size": 0.1 * scores.square().mean().reshape(1)}


LOSSES: dict[str, Callable[[], Any]] = {
    "function": lambda: cross_entropy,
    "module": Weighted,
    "counting": Counting,
    "parts": lambda: parts,
    "one element": lambda: lambda pred, target: cross_entropy(pred, target).reshape(1),
    "matrix": lambda: lambda pred, target: cross_entropy(pred, target).reshape(1, 1),
    "method": lambda: cross_entropy,
    "submodule": Weighted,
}
"""Losses by name; each fit gets a new one. The last two belong to the model."""

BAD_LOSSES: dict[str, Callable[[], Any]] = {
    "vector": lambda: lambda pred, target: as_pair(pred, target)[0].flatten(),
    "number": lambda: lambda pred, target: 1.0,
    "none": lambda: lambda pred, target: None,
    "list": lambda: lambda pred, target: [cross_entropy(pred, target)],
    "no graph": lambda: lambda pred, target: cross_entropy(pred, target).detach(),
    "no parts": lambda: lambda pred, target: {},
}
"""Losses that are refused at the first batch."""


# ------------------------------------------------------------------------ steps


def compute_loss(model: Any) -> Any:
    ctx = model.ctx
    ctx.pred = call(model, ctx.batch)
    return ctx.loss_fn(ctx.pred, ctx.target)


def call(model: Any, batch: Any) -> Any:
    return model.form.call(model, batch)


def step_that_returns(self: Any) -> Any:
    return compute_loss(self)


def step_that_optimizes(self: Any) -> None:
    self.ctx.optimize(compute_loss(self))


def step_by_name(self: Any) -> None:
    for name in self.ctx.optimizers:
        with self.ctx.optimizing(name):
            self.ctx.optimize(compute_loss(self))


def step_by_hand(self: Any) -> None:
    ctx = self.ctx
    loss = compute_loss(self).reshape(())
    ctx.loss = {ctx.opt_name: loss.detach()}
    if ctx.training:
        loss.backward()
        ctx.opt.step()
        ctx.opt.zero_grad()


def step_that_skips(self: Any) -> Any:
    return None if is_left_out(self.ctx.batch) else compute_loss(self)


def is_left_out(batch: Any) -> bool:
    """Whether the step above leaves a batch out: where the first feature is large."""
    first = batch[0] if isinstance(batch, tuple | list) else batch
    return isinstance(first, Tensor) and float(first.flatten()[0]) > 0.5


STEPS: dict[str, Any] = {
    "default": None,
    "returns": step_that_returns,
    "optimizes": step_that_optimizes,
    "by name": step_by_name,
    "by hand": step_by_hand,
    "skips": step_that_skips,
}


def build(
    body: str,
    form: BatchForm,
    output: str,
    step: str = "default",
    methods: dict[str, Any] | None = None,
) -> nn.Module:
    """Build a model with a body, for a form of batches, with methods of its own."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = form.read(*args, **kwargs)
        x, y = found if isinstance(found, tuple) else (found, None)
        scores, hidden = BODIES[body].forward(self, x)
        if y is None and output == "tuple":
            y = hidden
        return OUTPUTS[output](scores, y)

    own = {"forward": forward, **(methods or {})}
    if STEPS[step] is not None:
        own["step"] = STEPS[step]
    model = type("Net", (BODIES[body],), own)()
    model.form = form
    return model


def bind(model: nn.Module, function: Callable[..., Any]) -> Any:
    """The function as a method of the model."""
    return MethodType(function, model)
