"""An index of a checkpoint: which rank's part has which piece of each parameter.

It is written when a checkpoint is complete. A rank of another number of ranks, or at another
ZeRO stage, then opens only the parts that have pieces of its own.

Pieces of one length that follow each other on successive ranks are one run. So the index has
about as many runs as the model has parameters and the checkpoint has ranks, not their product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from harness.pytree import StateDict

Form = dict[str, int | None]
"""Elements of each value that an optimizer keeps for a stepped tensor; None for a number."""


class Run(NamedTuple):
    """Pieces of one parameter on successive ranks, one behind the other."""

    param: int  #: index of the parameter, as in layouts
    start: int  #: start of the first piece in the flattened parameter
    length: int  #: elements of each piece
    #: rank of the first piece, and number of ranks, each with one piece
    rank: int
    num_ranks: int
    #: index of the stepped tensor, and start of the piece in it, the same on each rank
    stepped: int
    at: int
    form: int  #: index of the form of the stepped tensor


@dataclass(frozen=True, kw_only=True)
class PartSummary:
    """What the index takes from the state of one rank."""

    journal: int  #: position in the run
    is_open: bool  #: whether an accumulation window is open
    #: rows of the layout of each optimizer
    layouts: dict[str, list[list[int]]] = field(default_factory=dict)
    #: form of each tensor that an optimizer steps
    forms: dict[str, list[Form]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PartIndex:
    """Where the pieces of a checkpoint are, and what is known of each rank's part."""

    journals: list[int]  #: position of each rank in its run
    is_open: bool  #: whether an accumulation window is open on a rank
    #: runs of each optimizer, by parameter and start
    runs: dict[str, list[Run]] = field(default_factory=dict)
    #: forms of each optimizer, to which runs refer by number
    forms: dict[str, list[Form]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ``ValueError`` if a run is of no rank of the checkpoint, or of no form."""
        for name, runs in self.runs.items():
            for run in runs:
                is_of_rank = run.rank + run.num_ranks <= len(self.journals)
                has_form = run.form < len(self.forms.get(name, ()))
                if min(run) < 0 or not is_of_rank or not has_form:
                    msg = f"a run of {len(self.journals)} ranks, got {run}"
                    raise ValueError(msg)


def is_divided(state: StateDict) -> bool:
    """Whether each rank has another part of the optimizers' state; of an accelerator."""
    return "optimizers" in state.get("own", {})


def summarize_part(state: StateDict) -> PartSummary:
    """Summarize the state of a rank for the index; without layouts if rank 0 has all of it."""
    accelerator = state["accelerator"]
    about = PartSummary(
        journal=state["journal"], is_open=any(accelerator.get("done", {}).values())
    )
    return add_pieces(about, accelerator) if is_divided(accelerator) else about


def add_pieces(about: PartSummary, state: StateDict) -> PartSummary:
    """Add the layouts and forms in the state of a rank's accelerator."""
    found = stepped_entries(state)
    for name, layout in state["layouts"].items():
        is_engine = "facts" in state
        # Only a single device leaves out tensors without a state.
        count = len(state["facts"][name]["state"]) if is_engine else len(layout)
        about.layouts[name] = layout.tolist()
        about.forms[name] = [get_form(found[name].get(n, {})) for n in range(count)]
    return about


def index_pieces(states: Sequence[StateDict]) -> PartIndex:
    """Index the pieces in the states of accelerators; those of all ranks, if divided."""
    parts = states if is_divided(states[0]) else [states[0]]
    empty = [PartSummary(journal=-1, is_open=False) for _ in parts]
    return make_index([add_pieces(*pair) for pair in zip(empty, parts, strict=True)])


def get_form(values: Mapping[str, object]) -> Form:
    """The form of what an optimizer keeps for one stepped tensor."""
    return {
        # Counters have no dims; parameters that DeepSpeed can train have some.
        key: value.numel() if isinstance(value, Tensor) and value.dim() else None
        for key, value in values.items()
    }


def make_index(parts: Sequence[PartSummary]) -> PartIndex:
    """Make the index of the parts of all ranks, in order of rank."""
    found = PartIndex(
        journals=[part.journal for part in parts],
        is_open=any(part.is_open for part in parts),
    )
    for name in parts[0].layouts:
        forms: list[Form] = []
        table = [
            _make_table(rank, part.layouts[name], part.forms[name], name, forms)
            for rank, part in enumerate(parts)
        ]
        found.runs[name] = list(_merge(np.concatenate(table)))
        found.forms[name] = forms
    return found


def _make_table(
    rank: int,
    layout: Sequence[Sequence[int]],
    of_stepped: Sequence[Form],
    name: str,
    forms: list[Form],
) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
    """The rows of a layout as runs of one rank; new forms are added."""
    numbers = []
    for form in of_stepped:
        if form not in forms:
            forms.append(form)
        numbers.append(forms.index(form))
    rows = np.array(layout, dtype=np.int64).reshape(-1, 5)
    if len(rows) and not 0 <= rows[:, 0].min() <= rows[:, 0].max() < len(numbers):
        msg = f"{name} steps {len(numbers)} tensors, got a layout of others"
        raise LookupError(msg)
    table = np.empty((len(rows), len(Run._fields)), dtype=np.int64)
    table[:, 0], table[:, 1], table[:, 2] = rows[:, 1], rows[:, 3], rows[:, 4]
    table[:, 3], table[:, 4] = rank, 1
    table[:, 5], table[:, 6] = rows[:, 0], rows[:, 2]
    table[:, 7] = np.array(numbers, dtype=np.int64)[rows[:, 0]]
    return table


def _merge(table: np.ndarray[tuple[int, int], np.dtype[np.int64]]) -> Iterator[Run]:
    """Sort runs of one piece, and merge those that follow each other."""
    table = table[np.lexsort((table[:, 3], table[:, 1], table[:, 0]))]
    before, after = table[:-1], table[1:]
    follows = (
        (before[:, [0, 2, 5, 6, 7]] == after[:, [0, 2, 5, 6, 7]]).all(1)
        & (before[:, 3] + 1 == after[:, 3])
        & (before[:, 1] + before[:, 2] == after[:, 1])
    )
    firsts: list[int] = []
    if len(table):
        firsts = np.flatnonzero(np.concatenate([[True], ~follows])).tolist()
    ends = [*firsts[1:], len(table)]
    for first, end in zip(firsts, ends, strict=True):
        run = Run(*table[first].tolist())
        yield run._replace(num_ranks=end - first)


def stepped_entries(state: StateDict) -> dict[str, dict[int, StateDict]]:
    """State of each optimizer by its name and the index of the stepped tensor."""
    if "facts" not in state:
        return {
            name: {n: dict(own["state"][n]) for n in own["state"] if type(n) is int}
            for name, own in state["optimizers"].items()
        }
    found = {
        name: {n: dict(numbers) for n, numbers in enumerate(facts["state"])}
        for name, facts in state["facts"].items()
    }
    for full, value in {**state["shared"], **state["own"]}["optimizers"].items():
        name, n, key = full.rsplit("/", 2)
        found[name][int(n)][key] = value
    return found


def named_entries(state: StateDict, name: str) -> StateDict:
    """Entries of a saved optimizer state that belong to no parameter."""
    if "facts" in state:
        found: StateDict = state["facts"][name].get("named", {})
        return found
    return select_named(state["optimizers"][name]["state"])


def select_named(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """Entries of an optimizer's state that belong to no parameter, such as a counter."""
    return {
        key: value for key, value in entries.items() if isinstance(key, str | tuple)
    }


def read_stepped(state: StateDict, name: str, stepped: int, key: str) -> object:
    """One value of ``stepped_entries``, without a look at the others."""
    if "facts" not in state:
        return state["optimizers"][name]["state"][stepped][key]
    tensors = {**state["shared"], **state["own"]}["optimizers"]
    full = f"{name}/{stepped}/{key}"
    if full in tensors:
        return tensors[full]
    return state["facts"][name]["state"][stepped][key]
