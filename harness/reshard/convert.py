"""The state of an accelerator in another form: other ranks, another ZeRO stage, one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter

import torch
from torch import Size, Tensor, nn

from harness.errors import CheckpointError
from harness.pytree import StateDict
from harness.reshard.consolidated import (
    ConsolidatedState,
    TensorPieces,
    check_shapes,
    is_master_name,
    named_groups,
    optimizer_classes,
    parameter_shapes,
)
from harness.reshard.layout import BY_MATRIX, ELEMENTWISE

_FORMS = (
    {"model", "optimizers", "layouts", "steps", "done"},
    {"shared", "own", "facts", "layouts", "steps", "done"},
)
"""What states have: those of one device, and those of engines."""

_Row = list[int]
"""A row of a layout."""


def is_convertible(state: StateDict) -> bool:
    """True if the state is that of one device or of engines."""
    return any(form <= state.keys() for form in _FORMS)


def has_same_layout(saved: StateDict, live: StateDict) -> bool:
    """True if a rank's saved state has the stage, precision and parts of the live one."""
    if not is_convertible(live):  # an accelerator of the user's own
        return saved.keys() == live.keys()
    if "shared" not in saved or "shared" not in live:
        are_single = "shared" not in saved and "shared" not in live
        return are_single and bool(saved["members"] == live["members"])
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
) -> StateDict:
    """The state of one rank of the live accelerator, between two optimizer steps.

    Parameters
    ----------
    states
        States of the accelerator on all ranks of a checkpoint.
    model
        The live model.
    live
        State of the live accelerator on this rank.
    rank
        This rank.
    parts
        What is wanted of them; the rest stays as it is.

    Raises
    ------
    CheckpointError
        If the states are of another model or other optimizers, or an optimizer keeps what
        cannot be divided as the live one is.
    LookupError, AttributeError, TypeError, ValueError, RuntimeError
        If the states do not fit together.
    """
    target = _StateBuilder(ConsolidatedState(states), live, model, rank)
    if "model" in parts:
        target.check_model()
    found = dict(live)
    if "optimizers" in parts:
        target.check_optimizers(states)
        kept = {name: states[0][name] for name in ("steps", "frozen")}
        found |= {**kept, "done": dict.fromkeys(live["done"], 0)}
    make = target.engines if "shared" in live else target.single
    return found | make(states[0], parts)


def convert_weights(
    weights: Mapping[str, Tensor], model: nn.Module, live: StateDict, rank: int
) -> StateDict:
    """The state of one rank of the live accelerator with other weights.

    Parameters
    ----------
    weights
        Whole weights and buffers, by name; buffers that are not there stay as they are.
    model, live, rank
        As in ``convert_state``.

    Raises
    ------
    CheckpointError
        If they are of another model.
    """
    buffers = {n: weights.get(n, buffer) for n, buffer in model.named_buffers()}
    params = {
        name: weights[name] for name in parameter_shapes(model) if name in weights
    }
    return convert_state(
        [{"model": {**params, **buffers}}], model, live, rank, ["model"]
    )


class _StateBuilder:
    """The live accelerator that a checkpoint is put together for."""

    def __init__(
        self,
        whole: ConsolidatedState,
        live: StateDict,
        model: nn.Module,
        rank: int,
    ) -> None:
        self._whole, self._live, self._rank = whole, live, rank
        self._shapes = parameter_shapes(model)
        self._names = list(self._shapes)
        self._buffers = {name: buffer.shape for name, buffer in model.named_buffers()}

    # ------------------------------------------------------------------- checks

    def check_model(self) -> None:
        """Raise if the checkpoint is of another model."""
        weights, buffers = self._whole.weights, self._whole.buffers
        then = {name: pieces.shape for name, pieces in weights.items()}
        then |= {name: buffer.shape for name, buffer in buffers.items()}
        check_shapes(then, {**self._shapes, **self._buffers})

    def check_optimizers(self, states: Sequence[StateDict]) -> None:
        """Raise if the checkpoint is of other optimizers, or they cannot be divided anew."""
        check_same_optimizers(states[0], self._live)
        kinds = optimizer_classes(self._live)
        is_divided = states[0].get("stage") or self._live.get("stage")
        for name in sorted(kinds):
            if is_divided and kinds[name] in BY_MATRIX:
                msg = (
                    f"resume: expected optimizer {name!r} to treat elements one by one"
                )
                advice = "Resume on as many ranks and at the ZeRO stage of before."
                raise CheckpointError(f"{msg}, got {kinds[name]}. {advice}")
            # Without the layout of a parameter its state would be left out in silence.
            known = self._whole.entries[name].keys() | set(states[0]["frozen"])
            for _, params in self._whole.groups[name]:
                lacking = sorted(set(params) - known)
                if lacking:
                    msg = f"resume: expected optimizer {name!r} to step {lacking[0]!r}"
                    raise CheckpointError(f"{msg}, got none. Take another checkpoint.")

    # -------------------------------------------------------------------- forms

    def single(self, _: StateDict, parts: Sequence[str]) -> StateDict:
        """Tensors and optimizers as one device takes them."""
        found: StateDict = {"grads": {}}
        if "model" in parts:
            found["model"] = self._whole.state_dict()
        if "optimizers" in parts:
            found["optimizers"] = {
                name: self._optimizer(name, layout)
                for name, layout in self._live["layouts"].items()
            }
        return found

    def _optimizer(self, name: str, layout: Tensor) -> StateDict:
        """State of an optimizer of one device."""
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
        """Options for each live parameter group: of the one that had its parameters."""
        found = []
        for own, params in named_groups(self._live, self._names)[name]:
            options = [
                then
                for then, members in self._whole.groups[name]
                if not set(params).isdisjoint(members)
            ]
            # A group that is frozen as a whole is left out at ZeRO 1 to 3.
            found.append(options[0] if options else own)
        return found

    def engines(self, saved: StateDict, parts: Sequence[str]) -> StateDict:
        """Tensors and facts as the engines of one rank take them."""
        live = self._live
        made = {**live["shared"], **live["own"]}
        is_held = "optimizers" in made  # else rank 0 gives them to all
        tensors = dict(made.get("optimizers", {}))
        facts = dict(live["facts"])
        if "model" in parts:
            made["weights"] = self._weights(made.get("weights", {}))
            made["buffers"] = {n: self._tensor(n) for n in self._buffers}
            tensors |= self._copies(tensors)
        if "optimizers" in parts:
            tensors = {n: value for n, value in tensors.items() if is_master_name(n)}
            for name in live["layouts"]:
                entries, numbers = self._entries(name, tensors, is_held=is_held)
                tensors |= entries
                former = saved["facts"] if "facts" in saved else live["facts"]
                facts[name] = {
                    **former[name],
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
        buffers = self._whole.buffers
        return buffers[name] if name in buffers else self._whole.weights[name].whole()

    def _weights(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights, each whole, or this rank's part of equal ones (ZeRO 3)."""
        made = {}
        for name, value in live.items():
            is_whole = value.shape == self._shapes[name]
            start = 0 if is_whole else self._rank * value.numel()
            row = (0, 0, 0, start, value.numel())
            pieces = self._whole.weights[name]
            made[name] = _filled(value.shape, value.dtype, [(pieces, row)])
        return made

    def _copies(self, live: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What optimizers step in the place of weights; all but their pieces is padding."""
        made = {}
        for name, layout in self._live["layouts"].items():
            for n, rows in _group_rows(layout):
                full = f"{name}/{n}/master"
                if full in live:
                    pieces = [
                        (self._whole.weights[self._names[row[1]]], row) for row in rows
                    ]
                    made[full] = _filled(live[full].shape, live[full].dtype, pieces)
        return made

    def _entries(
        self, name: str, copies: Mapping[str, Tensor], *, is_held: bool
    ) -> tuple[dict[str, Tensor], list[StateDict]]:
        """What an engine's optimizer keeps: tensors by name, numbers by stepped tensor."""
        tensors = {}
        numbers: list[StateDict] = [{} for _ in self._live["facts"][name]["state"]]
        for n, rows in _group_rows(self._live["layouts"][name]):
            copy = copies.get(f"{name}/{n}/master")
            shape = self._shape(rows) if copy is None else copy.shape
            entry = self._entry(name, rows, shape if is_held else None)
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{n}/{key}"] = value
                else:
                    numbers[n][key] = value
        return tensors, numbers

    def _shape(self, rows: Sequence[_Row]) -> Size:
        """Shape of a stepped tensor that is a parameter itself."""
        return self._shapes[self._names[rows[0][1]]]

    def _entry(self, name: str, rows: Sequence[_Row], shape: Size | None) -> StateDict:
        """What an optimizer keeps for one stepped tensor; no shape leaves out its values."""
        entries = self._whole.entries[name]
        found = [entries.get(self._names[row[1]], {}) for row in rows]
        # A parameter without gradients may have counted fewer steps by itself.
        lead = max(found, key=lambda own: float(own.get("step", 0)))
        entry: StateDict = {}
        for key in dict.fromkeys(key for own in (lead, *found) for key in own):
            pieces = [
                (own[key], row)
                for own, row in zip(found, rows, strict=True)
                if isinstance(own.get(key), TensorPieces)
            ]
            if not pieces:
                value = entry[key] = lead.get(key)
                is_whole = len(rows) == 1 and shape in (None, self._shape(rows))
                may_be_other = is_whole and self._whole.kinds[name] not in ELEMENTWISE
                if isinstance(value, Tensor) and value.dim() and not may_be_other:
                    msg = f"resume: expected a value for each element in {key!r} of"
                    got = f"optimizer {name!r}, got shape {tuple(value.shape)}"
                    advice = "Resume on as many ranks and at the ZeRO stage of before."
                    raise CheckpointError(f"{msg} {got}. {advice}")
            elif shape is not None:
                entry[key] = _filled(shape, pieces[0][0].dtype, pieces)
        return entry


def check_same(saved: StateDict, live: StateDict, parts: Sequence[str]) -> None:
    """Raise if a state of the live form is of another model or other optimizers.

    Parameters
    ----------
    saved, live
        States of one rank.
    parts
        What is wanted of it.

    Raises
    ------
    CheckpointError
        If names or shapes of tensors, or names or classes of optimizers, are others.
    """
    if not is_convertible(live):
        return
    if "model" in parts:
        check_shapes(_shapes_in(saved), _shapes_in(live))
    if "optimizers" in parts:
        check_same_optimizers(saved, live)


def _shapes_in(state: StateDict) -> dict[str, Sequence[int]]:
    """Shapes of weights and buffers; parts of weights have those of the whole."""
    if "model" in state:
        return {name: value.shape for name, value in state["model"].items()}
    buffers = {name: value.shape for name, value in state["own"]["buffers"].items()}
    return {**state["shapes"], **buffers}


def check_same_optimizers(saved: StateDict, live: StateDict) -> None:
    """Raise if optimizers have other names or classes, or the config's schedulers differ."""
    then, now = optimizer_classes(saved), optimizer_classes(live)
    if then != now:
        msg = f"resume: expected the optimizers {now}, got {then}."
        raise CheckpointError(
            f"{msg} Resume with the learner that was saved, or restore_optimizers=False."
        )
    has_one, has_now = (
        {n for n, facts in of.get("facts", {}).items() if facts["scheduler"]}
        for of in (saved, live)
    )
    if has_one != has_now:
        msg = f"resume: expected schedulers in DeepSpeed's config for {sorted(has_now)}"
        raise CheckpointError(
            f"{msg}, got {sorted(has_one)}. Resume with the scheduler that was saved, or "
            "restore_optimizers=False."
        )


def _group_rows(layout: Tensor) -> Iterator[tuple[int, list[_Row]]]:
    """Rows of a layout for each stepped tensor."""
    rows = sorted(layout.tolist())
    for n, found in groupby(rows, key=itemgetter(0)):
        yield n, list(found)


def _filled(
    shape: Size,
    dtype: torch.dtype,
    pieces: Iterable[tuple[TensorPieces, Sequence[int]]],
) -> Tensor:
    """A tensor of zeros with pieces put where their rows of the layout say."""
    made = torch.zeros(shape, dtype=dtype)
    flat = made.view(-1)
    for found, (_, _, at, start, length) in pieces:
        piece = found.read(start, length)
        flat[at : at + len(piece)] = piece
    return made
