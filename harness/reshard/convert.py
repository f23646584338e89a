"""Convert an accelerator's state for other ranks, another ZeRO stage, or one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Size, Tensor, nn

from harness.errors import CheckpointError
from harness.pytree import StateDict, map_tensors
from harness.reshard.consolidated import (
    ConsolidatedState,
    Entry,
    PieceCopier,
    TensorPieces,
    check_shapes,
    is_master_name,
    named_groups,
    optimizer_classes,
    parameter_shapes,
)
from harness.reshard.index import PartIndex, named_entries
from harness.reshard.layout import BY_MATRIX, ELEMENTWISE, OWN_FORM
from harness.reshard.model_part import take_model_part

_STATE_KEYS = (
    {"model", "optimizers", "layouts", "steps", "done"},
    {"shared", "own", "facts", "layouts", "steps", "done"},
)
"""Keys of the states of one device, and of those of engines."""

_KEPT_ON_DEVICE = {
    "model": ("model",),
    "optimizers": ("optimizers", "layouts", "members", "kinds", "steps", "frozen"),
}
"""What one device takes from another one, where nothing is divided in another way."""

_OF_SCALING = ("scalers", "overflows")

_Row = list[int]
"""A row of a layout."""


def is_convertible(state: StateDict) -> bool:
    """True if the state is from one device or from engines."""
    return any(keys <= state.keys() for keys in _STATE_KEYS)


def has_same_layout(saved: StateDict, live: StateDict) -> bool:
    """True if a rank's saved state has the stage, precision and layout of the live one."""
    if not is_convertible(live):  # a custom accelerator
        return saved.keys() == live.keys()
    if "shared" not in saved or "shared" not in live:
        are_single = "shared" not in saved and "shared" not in live
        # Gradients of an open window are scaled as the scalers say.
        return (
            are_single
            and saved.get("scalers", {}).keys() == live.get("scalers", {}).keys()
        )
    then, now = saved["layouts"], live["layouts"]
    return (
        saved["stage"] == live["stage"]
        and saved["members"] == live["members"]
        and then.keys() == now.keys()
        and all(torch.equal(then[name], now[name]) for name in now)
        and all(saved["facts"][n]["form"] == live["facts"][n]["form"] for n in now)
    )


def convert_state(
    states: Sequence[StateDict],
    model: nn.Module,
    live: StateDict,
    rank: int,
    parts: Sequence[str] = ("model", "optimizers"),
    index: PartIndex | None = None,
) -> StateDict:
    """Convert a checkpoint, taken between two steps, to one rank of the live accelerator.

    Parameters
    ----------
    states
        States of the accelerator on all ranks of a checkpoint. Of those after the first,
        only the ones are looked at that have something of this rank.
    parts
        ``model``, ``optimizers`` or both: what to restore. The rest is that of `live`.
    index
        Index of `states`; None: it is made, from all of them.

    Raises
    ------
    CheckpointError
        If the states are from another model or other optimizers, or an optimizer has state
        that cannot be divided like that of the live one.
    LookupError, AttributeError, TypeError, ValueError, RuntimeError
        If the states are inconsistent.
    """
    if "shared" not in states[0] and "shared" not in live:
        check_same(states[0], live, parts)
        names = [n for part in parts for n in _KEPT_ON_DEVICE.get(part, ())]
        names += [name for name in _OF_SCALING if name in states[0] and name in live]
        kept = map_tensors({name: states[0][name] for name in names}, Tensor.clone)
        return {**live, **kept, "grads": {}, "done": dict.fromkeys(live["done"], 0)}
    builder = _StateBuilder(ConsolidatedState(states, index), live, model, rank)
    if "model" in parts:
        builder.check_model()
    found = dict(live)
    if "optimizers" in parts:
        builder.check_optimizers(states)
        kept = {name: states[0][name] for name in ("steps", "frozen")}
        found |= {**kept, "done": dict.fromkeys(live["done"], 0)}
    if "shared" in live:
        found |= builder.build_for_engines(states[0], parts)
    else:
        found |= builder.build_for_device(parts)
    for name in live["layouts"] if "optimizers" in parts else ():
        if named := named_entries(states[0], name):
            if "facts" in found:
                found["facts"][name]["named"] = named
            else:
                found["optimizers"][name]["state"] |= named
    return builder.finish(found)


def convert_model_part(
    states: Sequence[StateDict],
    model: nn.Module,
    live: StateDict,
    rank: int,
    index: PartIndex | None = None,
) -> StateDict:
    """Convert what ``take_model_part`` took on each rank of a fit to one rank of another one.

    Parameters
    ----------
    states
        What each rank took; also ``{"model": ...}`` alone, with whole weights and buffers.
        The buffers stay as they are, also if the live ones have other shapes.
    """
    part = take_model_part(live)
    builder = _StateBuilder(ConsolidatedState(states, index), part, model, rank)
    return builder.finish(part | builder.build_model_part())


class _StateBuilder:
    """Builds the state of one rank of the live accelerator from a checkpoint.

    What it builds has memory and no values until ``finish``, which opens the parts of the
    checkpoint one after another.
    """

    def __init__(
        self, saved: ConsolidatedState, live: StateDict, model: nn.Module, rank: int
    ) -> None:
        self._saved, self._live, self._rank = saved, live, rank
        self._shapes = parameter_shapes(model)
        self._names = list(self._shapes)
        self._buffers = {name: buffer.shape for name, buffer in model.named_buffers()}
        self._copier = PieceCopier()

    def finish(self, state: StateDict) -> StateDict:
        """Fill in the values of what was built; other tensors are copied.

        They are views into files otherwise, or live.
        """
        self._copier.copy()
        made = self._copier.made
        found: StateDict = map_tensors(
            state, lambda own: own if id(own) in made else own.clone()
        )
        return found

    # ------------------------------------------------------------------- checks

    def check_model(self) -> None:
        """Raise if the checkpoint is from another model."""
        weights, buffers = self._saved.weights, self._saved.buffers
        then = {name: pieces.shape for name, pieces in weights.items()}
        then |= {name: buffer.shape for name, buffer in buffers.items()}
        check_shapes(then, {**self._shapes, **self._buffers})

    def check_optimizers(self, states: Sequence[StateDict]) -> None:
        """Raise if the optimizers are others, or their state cannot be divided in a new way."""
        check_same_optimizers(states[0], self._live)
        kinds = optimizer_classes(self._live)
        is_divided = states[0].get("stage") or self._live.get("stage")
        for name in sorted(kinds):
            if is_divided and kinds[name] in BY_MATRIX:
                msg = f"resume: expected optimizer {name!r} to update each element separately"
                advice = "Resume on as many ranks and at the same ZeRO stage as before."
                raise CheckpointError(f"{msg}, got {kinds[name]}. {advice}")
            if OWN_FORM in states[0].get("optimizers", {}).get(name, {}):
                msg = f"resume: expected optimizer {name!r} to save 'state' and 'param_groups'"
                advice = "Resume on one device, or restore only the weights."
                raise CheckpointError(f"{msg}, got a state of its own form. {advice}")
            # A parameter without a layout would silently lose its state.
            known = self._saved.entries[name].keys() | set(states[0]["frozen"])
            for _, params in self._saved.groups[name]:
                missing = sorted(set(params) - known)
                if missing:
                    msg = f"resume: expected optimizer {name!r} to step {missing[0]!r}"
                    got = "got no layout of it"
                    raise CheckpointError(f"{msg}, {got}. Take another checkpoint.")

    # ------------------------------------------------------------------- states

    def build_model_part(self) -> StateDict:
        """Weights and buffers, as ``take_model_part`` takes them."""
        whole, buffers = self._saved.weights, self._saved.buffers
        check_shapes(
            {n: own.shape for n, own in whole.items() if n in self._shapes},
            self._shapes,
        )
        names = [*buffers, *(name for name in whole if name not in self._shapes)]
        if "model" in self._live:
            return {"model": {n: self._tensor(n) for n in (*self._shapes, *names)}}
        part = {side: dict(self._live[side]) for side in ("shared", "own")}
        for kinds in part.values():
            if "weights" in kinds:
                kinds["weights"] = self._weights(kinds["weights"])
            if "optimizers" in kinds:
                kinds["optimizers"] |= self._masters(kinds["optimizers"])
        part["own"]["buffers"] = {name: self._tensor(name) for name in names}
        return part

    def build_for_device(self, parts: Sequence[str]) -> StateDict:
        """Tensors and optimizers for one device."""
        found: StateDict = {"grads": {}}
        if "model" in parts:
            names = (*self._saved.weights, *self._saved.buffers)
            found["model"] = {name: self._tensor(name) for name in names}
        if "optimizers" in parts:
            found["optimizers"] = {
                name: self._optimizer(name, layout)
                for name, layout in self._live["layouts"].items()
            }
        return found

    def _optimizer(self, name: str, layout: Tensor) -> StateDict:
        """State of an optimizer on one device."""
        entries = {
            n: self._entry(name, rows, self._shape(rows))
            for n, rows in _group_rows(layout)
        }
        own = self._live["optimizers"][name]["param_groups"]
        groups = [
            {**now, **then} for now, then in zip(own, self._groups(name), strict=True)
        ]
        state = {n: entry for n, entry in entries.items() if entry}
        return {"state": state, "param_groups": groups}

    def _groups(self, name: str) -> list[StateDict]:
        """Options for each live parameter group, from the saved group of its parameters."""
        found = []
        for own, params in named_groups(self._live, self._names)[name]:
            options = [
                then
                for then, members in self._saved.groups[name]
                if not set(params).isdisjoint(members)
            ]
            # ZeRO 1 to 3 leave out a group whose parameters are all frozen.
            found.append(options[0] if options else own)
        return found

    def build_for_engines(self, saved: StateDict, parts: Sequence[str]) -> StateDict:
        """Tensors and facts for the engines of one rank."""
        live = self._live
        made = {**live["shared"], **live["own"]}
        has_tensors = "optimizers" in made  # else only rank 0 needs them
        tensors = dict(made.get("optimizers", {}))
        facts = dict(live["facts"])
        if "model" in parts:
            made["weights"] = self._weights(made.get("weights", {}))
            made["buffers"] = {n: self._tensor(n) for n in self._buffers}
            tensors |= self._masters(tensors)
        if "optimizers" in parts:
            tensors = {n: value for n, value in tensors.items() if is_master_name(n)}
            for name in live["layouts"]:
                entries, numbers = self._entries(name, tensors, has_tensors=has_tensors)
                tensors |= entries
                facts[name] = {
                    **(saved if "facts" in saved else live)["facts"][name],
                    "form": live["facts"][name]["form"],
                    "groups": self._groups(name),
                    "state": numbers,
                }
        made["optimizers"] = tensors
        return {
            "shared": {kind: made[kind] for kind in live["shared"]},
            "own": {kind: made[kind] for kind in live["own"]},
            "facts": facts,
        }

    def _tensor(self, name: str) -> Tensor:
        """A whole parameter or buffer."""
        buffers = self._saved.buffers
        if name in buffers:
            return buffers[name]
        return self._copier.add_whole(self._saved.weights[name])

    def _weights(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights: whole ones, or at ZeRO 3 this rank's part of each."""
        made = {}
        for name, value in live.items():
            is_whole = value.shape == self._shapes[name]
            start = 0 if is_whole else self._rank * value.numel()
            row = (0, 0, 0, start, value.numel())
            pieces = self._saved.weights[name]
            made[name] = self._fill(value.shape, [(pieces, row)], value.dtype)
        return made

    def _masters(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Master weights, which optimizers step instead of weights, padded with zeros."""
        made = {}
        for name, layout in self._live["layouts"].items():
            for n, rows in _group_rows(layout):
                full = f"{name}/{n}/master"
                if full in live:
                    pieces = [
                        (self._saved.weights[self._names[row[1]]], row) for row in rows
                    ]
                    made[full] = self._fill(live[full].shape, pieces, live[full].dtype)
        return made

    def _entries(
        self, name: str, masters: Mapping[str, Tensor], *, has_tensors: bool
    ) -> tuple[dict[str, Tensor], list[StateDict]]:
        """State of an engine's optimizer: tensors by name, numbers by stepped tensor."""
        tensors = {}
        numbers: list[StateDict] = [{} for _ in self._live["facts"][name]["state"]]
        for n, rows in _group_rows(self._live["layouts"][name]):
            master = masters.get(f"{name}/{n}/master")
            shape = self._shape(rows) if master is None else master.shape
            entry = self._entry(name, rows, shape if has_tensors else None)
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{n}/{key}"] = value
                else:
                    numbers[n][key] = value
        return tensors, numbers

    def _shape(self, rows: Sequence[_Row]) -> Size:
        """Shape of a stepped tensor that is a whole parameter."""
        return self._shapes[self._names[rows[0][1]]]

    def _entry(self, name: str, rows: Sequence[_Row], shape: Size | None) -> StateDict:
        """State of an optimizer for one stepped tensor; no shape: no element values."""
        entries = self._saved.entries[name]
        found = [entries.get(self._names[row[1]], Entry()) for row in rows]
        # A parameter that sometimes had no gradient may have counted fewer steps.
        lead = max(found, key=_count_steps)
        entry: StateDict = {}
        for key in dict.fromkeys(key for own in (lead, *found) for key in own):
            pieces = [
                (own.pieces[key], row)
                for own, row in zip(found, rows, strict=True)
                if key in own.pieces
            ]
            if not pieces:
                entry[key] = lead.get(key)
                self._check_divisible(name, key, entry[key], rows, shape)
            elif shape is not None:
                entry[key] = self._fill(shape, pieces)
        return entry

    def _fill(
        self,
        shape: Size,
        pieces: Iterable[tuple[TensorPieces, Sequence[int]]],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A tensor that will have pieces at the places in their layout rows."""
        places = [
            (piece, at + piece.at)
            for found, (_, _, at, start, length) in pieces
            for piece in found.list_pieces(start, length)
        ]
        return self._copier.add(shape, places, dtype)

    def _check_divisible(
        self,
        name: str,
        key: str,
        value: object,
        rows: Sequence[_Row],
        shape: Size | None,
    ) -> None:
        """Raise if a saved tensor is not one value per element and would have to be."""
        if not isinstance(value, Tensor) or not value.dim():
            return
        is_whole = len(rows) == 1 and shape in (None, self._shape(rows))
        if not is_whole or self._saved.kinds[name] in ELEMENTWISE:
            msg = f"resume: expected a value for each element in {key!r} of"
            got = f"optimizer {name!r}, got shape {tuple(value.shape)}"
            advice = "Resume on as many ranks and at the same ZeRO stage as before."
            raise CheckpointError(f"{msg} {got}. {advice}")


def check_same(saved: StateDict, live: StateDict, parts: Sequence[str]) -> None:
    """Raise if a state with the live layout is from another model or other optimizers.

    Parameters
    ----------
    parts
        ``model``, ``optimizers`` or both: what to check.
    """
    if not is_convertible(live):
        return
    if "model" in parts:
        check_shapes(_shapes_in(saved), _shapes_in(live))
    if "optimizers" in parts:
        check_same_optimizers(saved, live)


def _shapes_in(state: StateDict) -> dict[str, Sequence[int]]:
    """Shapes of whole weights and buffers."""
    if "model" in state:
        return {name: value.shape for name, value in state["model"].items()}
    buffers = {name: value.shape for name, value in state["own"]["buffers"].items()}
    return {**state["shapes"], **buffers}


def check_same_optimizers(saved: StateDict, live: StateDict) -> None:
    """Raise if names or classes of optimizers, or the config's schedulers, differ."""
    then, now = optimizer_classes(saved), optimizer_classes(live)
    if then != now:
        msg = f"resume: expected the optimizers {now}, got {then}."
        advice = "Resume with the learner that was saved, or restore_optimizers=False."
        raise CheckpointError(f"{msg} {advice}")
    saved_names, live_names = (
        {n for n, facts in of.get("facts", {}).items() if facts["scheduler"]}
        for of in (saved, live)
    )
    if saved_names != live_names:
        msg = f"resume: expected schedulers in DeepSpeed's config for {sorted(live_names)}"
        advice = (
            "Resume with the scheduler that was saved, or restore_optimizers=False."
        )
        raise CheckpointError(f"{msg}, got {sorted(saved_names)}. {advice}")


def _group_rows(layout: Tensor) -> Iterator[tuple[int, list[_Row]]]:
    """Group the rows of a layout by stepped tensor."""
    rows = sorted(layout.tolist())
    for n, found in groupby(rows, key=itemgetter(0)):
        yield n, list(found)


def _count_steps(entry: Entry) -> float:
    count = entry.get("step", 0)
    if not isinstance(count, Tensor | int | float):
        raise TypeError(f"a count of steps, got {count!r:.80}")
    return float(count)
