"""Programs, drawn at random from all forms."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from hypothesis import strategies as st

from tests.odd.batches import BATCHES
from tests.odd.callbacks import BY_OPTIMIZER, EVENTS, KINDS, Extra
from tests.odd.data import DATA
from tests.odd.metrics import BAD_METRICS, METRICS
from tests.odd.models import BAD_LOSSES, BODIES, LOSSES, OUTPUTS, STEPS
from tests.odd.optimizers import OPTIMIZERS


@dataclass(frozen=True, kw_only=True)
class Program:
    """One program; its ``repr`` shows what is not as usual.

    Attributes
    ----------
    data, batch, body, output, loss, step, optimizer, metrics
        Names in the tables of the other modules.
    rows, size
        Rows of the training data, and of a batch.
    valid_rows
        Rows of the validation data; 0: there is none.
    valid_share
        Share of the rows that ``fit`` takes for validation; 0: none.
    predicts
        Whether the model has a ``predict`` of its own.
    is_tracked
        Whether a run records it.
    stop_at
        Which share of the batches is trained before the fit is stopped, to resume.
    """

    data: str = "tensors"
    batch: str = "list"
    rows: int = 7
    size: int = 3
    shuffle: bool = False
    valid_rows: int = 0
    valid_share: float = 0.0
    predicts: bool = False
    is_tracked: bool = False
    body: str = "plain"
    output: str = "tensor"
    loss: str = "function"
    step: str = "default"
    optimizer: str = "sgd"
    accumulate: int = 1
    epochs: int = 2
    metrics: tuple[str, ...] = ()
    extras: tuple[Extra, ...] = ()
    stop_at: float = 0.5

    def __repr__(self) -> str:
        shown = [
            f"{item.name}={getattr(self, item.name)!r}"
            for item in fields(self)
            if getattr(self, item.name) != item.default
        ]
        return f"Program({', '.join(shown)})"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Show a failing program as ``repr`` does."""
        printer.text(repr(self))

    @property
    def is_refused(self) -> bool:
        """Whether a fit may refuse it."""
        return (
            DATA[self.data].refused
            or self.loss in BAD_LOSSES
            or bool(set(self.metrics) & BAD_METRICS.keys())
        )

    @property
    def saves_batches(self) -> bool:
        """Whether checkpoints hold batches, so that some batches are refused."""
        return self.data == "resumable" and self.accumulate > 1

    @property
    def has_plain_twin(self) -> bool:
        """Whether a plain loop draws the same random numbers."""
        draws = self.body in {"dropout", "lazy"}
        draws |= any(extra.kind == "draw" for extra in self.extras)
        return not self.is_refused and not (DATA[self.data].draws_between and draws)

    @property
    def may_finish(self) -> bool:
        """Whether a stop may wait until the fit is over.

        It waits for the end of a validation that changes weights, and for a callback that
        ends the epoch or the fit at the same batch.
        """
        return any(
            extra.kind in {"skip", "stop"}
            or (extra.kind == "perturb" and extra.event.startswith("on_valid"))
            for extra in self.extras
        )


def is_whole(batch: str) -> bool:
    """Whether batches are input and target in one."""
    return BATCHES[batch].target_of(([], [])) is None


@st.composite
def programs(draw: Any, *, slow: bool = False, refused: bool = True) -> Program:
    """Draw a program whose parts fit together."""

    def pick(names: Any) -> Any:
        return draw(st.sampled_from(sorted(names)))

    bad = draw(st.integers(0, 19)) if refused else 0
    data = pick(
        name
        for name, form in DATA.items()
        if (slow or not form.is_slow) and form.refused == (bad == 1)
    )
    batch = pick(DATA[data].batches or BATCHES)
    output = pick(set(OUTPUTS) - ({"tensor"} if is_whole(batch) else set()))
    step = pick(STEPS)
    optimizer = pick(optimizers_for(step))
    is_alone = step in {"by hand", "skips"} or optimizer == "lbfgs"
    accumulate = 1 if is_alone else draw(st.integers(1, 3))
    body = pick(bodies_for(data, optimizer))
    is_plain = BATCHES[batch].is_plain and output == "tensor"
    usable = [name for name, m in METRICS.items() if is_plain or not m.tensors_only]
    metrics = draw(st.lists(st.sampled_from(usable), max_size=3, unique=True))
    if bad == 2 and step != "skips":
        metrics.append(pick(BAD_METRICS))
    bad_losses = set(BAD_LOSSES) - ({"none"} if step == "returns" else set())
    takes_any = step in {"by hand", "skips"}
    loss = pick(bad_losses if bad == 3 and not takes_any else LOSSES)
    if step == "by hand" and loss == "parts":
        loss = "function"
    epochs = draw(st.integers(1, 3))
    extras = draw(st.lists(draw_extra(batch, body, step, epochs), max_size=3))
    if body == "late":
        extras.append(draw(draw_extra(batch, body, step, epochs, "add group")))
    rows, share = draw(st.integers(2, 11)), 0.0
    if data in SPLIT_BY_ROWS and rows >= 4 and draw(st.booleans()):
        share = draw(st.sampled_from([0.25, 0.5, 0.7]))
    if any(extra.kind == "rows" for extra in extras):  # these count rows by themselves
        metrics = [name for name in metrics if name not in {"accuracy", "listing"}]
    return Program(
        data=data,
        batch=batch,
        rows=rows,
        size=draw(st.integers(1, 4)),
        shuffle=draw(st.booleans()),
        valid_rows=0 if share else draw(st.sampled_from([0, 0, 5, 4])),
        valid_share=share,
        predicts=draw(st.booleans()),
        is_tracked=draw(st.booleans()),
        body=body,
        output=output,
        loss=loss,
        step=step,
        optimizer=optimizer,
        accumulate=accumulate,
        epochs=epochs,
        metrics=tuple(metrics),
        extras=tuple(extras),
        stop_at=draw(st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])),
    )


ONE_LOSS = {"returns", "optimizes", "by hand", "skips"}
"""Steps that serve one optimizer."""

AGAIN = {"default", "returns", "skips"}
"""Steps that can be repeated in a closure."""

SPLIT_BY_ROWS = {"tensors", "arrays", "data set", "tensor data set", "samples"}
"""Data that ``fit`` splits by a fraction."""


def optimizers_for(step: str) -> set[str]:
    """Optimizers that a step serves."""
    found = set(OPTIMIZERS)
    if step in ONE_LOSS:
        found.discard("two")
    if step not in AGAIN:
        found.discard("lbfgs")
    return found


def bodies_for(data: str, optimizer: str) -> set[str]:
    """Bodies that work with an optimizer, and do not change data that comes again."""
    found = set(BODIES)
    if optimizer == "without late":
        return {"late"}
    found.discard("late")
    if optimizer == "two":
        found.discard("frozen")  # one of them would have nothing to train
    if optimizer in {"adagrad", "lbfgs"}:
        found.discard("lazy")  # it asks for the sizes of its parameters
    if optimizer not in {"sgd", "adagrad"}:
        found.discard("sparse")
    if DATA[data].keeps_batches:
        found.discard("in place")
    return found


AT_ONCE = {"skip", "stop", "add group"}
"""Kinds that happen in one epoch."""


def kinds_for(batch: str, body: str, step: str) -> set[str]:
    """Kinds of extras that a program can have."""
    kinds = set(KINDS) - {"add group"}
    if body == "late":
        kinds.discard("unfreeze")  # gradients that nothing steps would add up
    if body == "lazy":
        kinds -= {"unfreeze", "perturb"}  # there are no weights at first
    if body == "sparse":
        kinds.discard("clip")  # torch's function for it takes no sparse gradients
    if body == "growing":
        kinds.discard("keep best")  # a plain loop cannot put the best buffer back
    if step == "skips":
        kinds -= {"early stopping", "keep best", "plateau"}  # an epoch may have no loss
    if batch not in {"pair", "list", "columns"}:
        kinds.discard("input")
    if step == "by hand":
        kinds -= {"clip", "double"}
    return kinds


@st.composite
def draw_extra(
    draw: Any, batch: str, body: str, step: str, epochs: int, kind: str = ""
) -> Extra:
    """Draw something that happens at an event of this program."""
    kinds = kinds_for(batch, body, step)
    kind = kind or draw(st.sampled_from(sorted(kinds)))
    if kind not in EVENTS:
        return Extra(kind=kind)
    events = EVENTS[kind]
    if step != "default":  # such a step makes the prediction by itself
        events = tuple(event for event in events if not event.endswith("after_pred"))
    if step == "by hand":
        events = tuple(event for event in events if event not in BY_OPTIMIZER)
    event = draw(st.sampled_from(events))
    return Extra(
        kind=kind,
        event=event,
        epoch=draw(st.integers(1 if kind in AT_ONCE else 0, epochs)),
        iter=draw(st.integers(0, 4)),
    )
