"""The state of an accelerator in another form: other ranks, another ZeRO stage, one device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Size, Tensor, nn

from harness.accelerator.whole import Pieces, Whole, groups_of, shapes_of
from harness.errors import CheckpointError

_FORMS = (
    {"model", "optimizers", "layouts", "steps", "done"},
    {"shared", "own", "facts", "layouts", "steps", "done"},
)
"""What states have: those of one device, and those of engines."""

_Row = list[int]
"""A row of a layout."""


def is_known(state: Mapping[str, Any]) -> bool:
    """True if the state is that of one device or of engines."""
    return any(form <= state.keys() for form in _FORMS)


def is_same_form(saved: Mapping[str, Any], live: Mapping[str, Any]) -> bool:
    """True if a rank's saved state has the stage, precision and parts of the live one."""
    if "shared" not in saved or "shared" not in live:
        return "shared" not in saved and "shared" not in live
    then, now = saved.get("layouts", {}), live["layouts"]
    return (
        saved["stage"] == live["stage"]
        and then.keys() == now.keys()
        and all(torch.equal(then[name], now[name]) for name in now)
        and all(
            saved["facts"][name]["wrapper"] == live["facts"][name]["wrapper"]
            for name in now
        )
    )


def converted(
    place: str,
    states: Sequence[Mapping[str, Any]],
    model: nn.Module,
    live: Mapping[str, Any],
    rank: int,
) -> dict[str, Any]:
    """The state of one rank of the live accelerator, between two optimizer steps.

    Parameters
    ----------
    place
        Which resume, for errors.
    states
        States of the accelerator on all ranks of a checkpoint.
    model
        The live model.
    live
        State of the live accelerator on this rank.
    rank
        This rank.

    Raises
    ------
    CheckpointError
        If the states are of another model or other optimizers, or an optimizer keeps what
        cannot be divided as the live one is.
    """
    make = _engines if "shared" in live else _single
    try:
        whole = Whole(states, shapes_of(model))
        _check(place, whole, dict(model.named_buffers()), live)
        made = make(whole, states[0], live, rank)
    except _IndivisibleError as error:
        msg = (
            f"{place}: expected a value for each element, or one for all, got {error}."
        )
        raise CheckpointError(
            f"{msg} Resume on as many ranks and at the ZeRO stage as it was saved."
        ) from None
    except (LookupError, AttributeError, TypeError, ValueError, RuntimeError) as error:
        msg = f"{place}: expected a state whose parts fit together, got: {error!r}."
        raise CheckpointError(f"{msg} Take another checkpoint.") from error
    steps, done = states[0]["steps"], dict.fromkeys(live["done"], 0)
    return {**live, **made, "steps": steps, "done": done}


class _IndivisibleError(Exception):
    """Some state of an optimizer cannot be cut into pieces."""


def _check(
    place: str, whole: Whole, buffers: Mapping[str, Tensor], live: Mapping[str, Any]
) -> None:
    """Raise if the checkpoint is of another model or of other optimizers."""
    advice = "Resume with the learner that was saved."
    now = {**whole.shapes, **{name: value.shape for name, value in buffers.items()}}
    then = {name: of.shape(now.get(name)) for name, of in whole.weights.items()}
    then |= {name: value.shape for name, value in whole.buffers.items()}
    for name in sorted(now.keys() | then.keys()):
        if then.get(name) != now.get(name):
            want, got = (
                tuple(of[name]) if name in of else "none" for of in (now, then)
            )
            msg = f"{place}: expected the tensor {name!r} of shape {want}, got {got}."
            raise CheckpointError(f"{msg} {advice}")
    wanted, found = (
        {name: len(groups) for name, groups in every.items()}
        for every in (groups_of(live), whole.groups)
    )
    if wanted != found:
        msg = f"{place}: expected optimizers with as many groups as {wanted}, got {found}."
        raise CheckpointError(f"{msg} {advice}")


def _single(
    whole: Whole, _: Mapping[str, Any], live: Mapping[str, Any], __: int
) -> dict[str, Any]:
    """Tensors and optimizers as one device takes them."""
    optimizers = {}
    for name, layout in live["layouts"].items():
        entries = {
            n: _entry(whole, name, rows, _shape(whole, rows))
            for n, rows in _by_stepped(layout)
        }
        groups = live["optimizers"][name]["param_groups"]
        optimizers[name] = {
            "state": {n: entry for n, entry in entries.items() if entry},
            "param_groups": [
                {**now, **then}
                for now, then in zip(groups, whole.groups[name], strict=True)
            ],
        }
    return {"model": whole.state_dict(), "optimizers": optimizers, "grads": {}}


def _engines(
    whole: Whole, saved: Mapping[str, Any], live: Mapping[str, Any], rank: int
) -> dict[str, Any]:
    """Tensors and facts as the engines of one rank take them."""
    wanted = {**live["shared"], **live["own"]}
    held = wanted.get("optimizers")  # None where rank 0 gives them to all
    facts, tensors = {}, {}
    for name, layout in live["layouts"].items():
        numbers: list[dict[str, Any]] = [{} for _ in live["facts"][name]["state"]]
        # What has no piece of any parameter is padding.
        tensors |= {
            full: torch.zeros_like(value, device="cpu")
            for full, value in (held or {}).items()
            if full.startswith(f"{name}/") and full.endswith("/master")
        }
        for n, rows in _by_stepped(layout):
            master = (held or {}).get(f"{name}/{n}/master")
            shape = _shape(whole, rows) if master is None else master.shape
            entry = _entry(whole, name, rows, None if held is None else shape)
            if master is not None:
                weights = [(whole.weights[whole.live[row[1]]], row) for row in rows]
                entry["master"] = _filled(shape, master.dtype, weights)
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{n}/{key}"] = value
                else:
                    numbers[n][key] = value
        then = saved.get("facts", live["facts"])[name]
        facts[name] = {**then, "groups": whole.groups[name], "state": numbers}
    made = {
        "weights": _weights(whole, wanted.get("weights", {}), rank),
        "buffers": whole.buffers,
        "optimizers": tensors,
    }
    return {
        "shared": {kind: made[kind] for kind in live["shared"]},
        "own": {kind: made[kind] for kind in live["own"]},
        "facts": facts,
    }


def _weights(whole: Whole, live: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Weights, each whole, or this rank's part of equal ones (ZeRO 3)."""
    made = {}
    for name, value in live.items():
        start = 0 if value.shape == whole.shapes[name] else rank * value.numel()
        row = (0, 0, 0, start, value.numel())
        made[name] = _filled(value.shape, value.dtype, [(whole.weights[name], row)])
    return made


def _by_stepped(layout: Tensor) -> Iterator[tuple[int, list[_Row]]]:
    """Rows of a layout for each stepped tensor."""
    rows = sorted(layout.tolist())
    for n, found in groupby(rows, key=itemgetter(0)):
        yield n, list(found)


def _shape(whole: Whole, rows: Sequence[_Row]) -> Size:
    """Shape of a stepped tensor that is a parameter itself."""
    return whole.shapes[whole.live[rows[0][1]]]


def _entry(
    whole: Whole, name: str, rows: Sequence[_Row], shape: Size | None
) -> dict[str, Any]:
    """What an optimizer keeps for one tensor that it steps; no shape leaves out tensors."""
    found = [whole.entries[name].get(whole.live[row[1]], {}) for row in rows]
    entry: dict[str, Any] = {}
    for key in dict.fromkeys(key for own in found for key in own):
        values = [own.get(key) for own in found]
        pieces = [
            (value, row)
            for value, row in zip(values, rows, strict=True)
            if isinstance(value, Pieces)
        ]
        if not pieces:
            is_whole = shape in (None, _shape(whole, rows))
            entry[key] = _common(f"{key!r} of optimizer {name!r}", values, is_whole)
        elif shape is not None:
            entry[key] = _filled(shape, pieces[0][0].dtype, pieces)
    return entry


def _common(what: str, values: Sequence[Any], is_whole: bool) -> Any:
    """The one value for a parameter, or for the parameters that are stepped together."""
    if len(values) == 1 and is_whole:
        return values[0]
    numbers = [value for value in values if value is not None]
    if any(isinstance(value, Tensor) and value.dim() for value in numbers):
        raise _IndivisibleError(what)
    # A parameter without gradients may have counted fewer steps by itself.
    return max(numbers, key=float, default=None)


def _filled(
    shape: Size, dtype: torch.dtype, pieces: Iterable[tuple[Pieces, Sequence[int]]]
) -> Tensor:
    """A tensor of zeros with pieces put where their rows of the layout say."""
    made = torch.zeros(shape, dtype=dtype)
    flat = made.view(-1)
    for found, (_, _, at, start, length) in pieces:
        piece = found.read(start, length)
        flat[at : at + len(piece)] = piece
    return made
