"""Parts of a fit's state: callbacks by name, modules' extra state, what validation changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from harness.callback import Callback

IN_VALIDATION = (
    "on_valid_begin",
    "on_valid_batch_begin",
    "on_valid_batch_after_pred",
    "on_valid_batch_after_loss",
    "on_valid_batch_end",
)
"""Events that fire again when a fit stopped in validation goes on."""


@dataclass(frozen=True, kw_only=True)
class BeforeValid:
    """What validation changes, as it was before.

    Attributes
    ----------
    random
        State of all random generators.
    journal
        Position of the recorder.
    lengths
        Of each series of records.
    callbacks
        States of those that listen to validation.
    """

    random: dict[str, Any]
    journal: int
    lengths: dict[str, dict[str, int]]
    callbacks: dict[str, dict[str, Any]]

    def put_in(self, state: dict[str, Any]) -> None:
        """Take a state in the middle of validation back to its beginning."""
        state["random"], state["journal"] = self.random, self.journal
        state["callbacks"] = state["callbacks"] | self.callbacks
        state["records"] = {
            what: {
                split: series[: sets[split]]
                for split, series in found.items()
                if split in sets
            }
            for what, found in state["records"].items()
            if (sets := self.lengths.get(what)) is not None
        }


def by_name(callbacks: Iterable[Callback]) -> Iterator[tuple[str, Callback]]:
    """Callbacks with the names they have in a state: class, and number from the second on."""
    counts: dict[str, int] = {}
    for callback in callbacks:
        name = type(callback).__name__
        counts[name] = counts.get(name, 0) + 1
        yield (name if counts[name] == 1 else f"{name}.{counts[name]}"), callback


def extra_state(model: nn.Module | None) -> dict[str, Any]:
    """What modules hold beside tensors, by module name: their ``get_extra_state``."""
    return {name: module.get_extra_state() for name, module in _with_extra(model)}


def put_extra_state(model: nn.Module | None, state: Mapping[str, Any]) -> None:
    """Take back what ``extra_state`` gave."""
    for name, module in _with_extra(model):
        if name in state:
            module.set_extra_state(state[name])


def _with_extra(model: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Modules that have more state than tensors."""
    for name, module in model.named_modules() if model is not None else ():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield name, module
