"""A checkpoint of several ranks as whole parameters, each with its optimizer state.

All states have ``layouts`` (see ``harness.accelerator.layout``): by those of all ranks the
pieces of each parameter are found where they lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Size, Tensor, nn


def shapes_of(model: nn.Module) -> dict[str, Size]:
    """Shapes of a model's whole parameters, by name, as ``Module.parameters`` counts them."""
    return {
        name: getattr(param, "ds_shape", param.shape)
        for name, param in model.named_parameters()
    }


class Pieces:
    """A flattened tensor in pieces, which lie where they were read.

    Parameters
    ----------
    pieces
        Where each begins in the whole, and the piece, of one dim.
    """

    def __init__(self, *pieces: tuple[int, Tensor]) -> None:
        self._pieces = list(pieces)

    def add(self, start: int, piece: Tensor) -> None:
        """One more piece, that begins at `start`."""
        self._pieces.append((start, piece))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the pieces."""
        return self._pieces[0][1].dtype

    def read(self, start: int, length: int) -> Tensor:
        """Elements from `start` on, as many as there are up to `length`."""
        end = start + length
        found = [
            piece[max(start - at, 0) : end - at]
            for at, piece in sorted(self._pieces, key=itemgetter(0))
            if at < end and at + len(piece) > start
        ]
        if not found:
            return torch.empty(0)
        return found[0] if len(found) == 1 else torch.cat(found)

    def shape(self, wanted: Size | None) -> Size:
        """The wanted shape, if the whole can have it; else its flat one."""
        size = sum(len(piece) for _, piece in self._pieces)
        if wanted is None:
            return Size([size])
        # Of equal parts on all ranks the last one is padded.
        fits = 0 <= size - wanted.numel() < max(1, len(self._pieces))
        return wanted if fits else Size([size])

    def whole(self, wanted: Size | None) -> Tensor:
        """All elements, in the wanted shape if they can have it."""
        shape = self.shape(wanted)
        return self.read(0, shape.numel()).reshape(shape)


class Whole:
    """What all ranks of a checkpoint hold together; nothing is copied until it is read.

    Parameters
    ----------
    states
        States of the accelerator on all ranks.
    shapes
        What ``shapes_of`` the live model gives.

    Attributes
    ----------
    weights
        Parameters by name, in their order; those that an optimizer steps in more precision,
        in that one.
    buffers
        Buffers by name.
    groups
        Options of each optimizer's parameter groups.
    entries
        Optimizer states by name of the optimizer, name of the parameter and key: ``Pieces``
        where each element of the parameter has its own, else the value.
    live
        Names of the live model's parameters, as live layouts count them.
    """

    def __init__(
        self, states: Sequence[Mapping[str, Any]], shapes: Mapping[str, Size]
    ) -> None:
        self.shapes, self.live = shapes, list(shapes)
        first = states[0]
        names, self.weights, self.buffers = _tensors(states, shapes)
        self.groups = groups_of(first)
        self.entries: dict[str, dict[str, dict[str, Any]]] = {
            n: {} for n in self.groups
        }
        is_divided = "optimizers" in first.get("own", {})
        for state in states if is_divided else states[:1]:
            # Without layouts, as of other makes, the weights can be had all the same.
            layouts = state.get("layouts", {})
            stepped = _stepped(state) if layouts else {}
            for name, layout in layouts.items():
                for n, number, *place in layout.tolist():
                    values = stepped[name].get(n, {})
                    self._add(name, names[number], values, *place)
        for by_param in self.entries.values():
            for name, entry in by_param.items():
                if "master" in entry:
                    self.weights[name] = entry.pop("master")

    def _add(
        self,
        optimizer: str,
        param: str,
        values: Mapping[str, Any],
        at: int,
        start: int,
        length: int,
    ) -> None:
        """Take a piece of a parameter from what an optimizer keeps for a stepped tensor."""
        entry = self.entries[optimizer].setdefault(param, {})
        size = values["master"].numel() if "master" in values else length
        for key, value in values.items():
            # Counters have no dims, and neither have parameters that DeepSpeed can train.
            if isinstance(value, Tensor) and value.dim() and value.numel() == size:
                piece = value.reshape(-1)[at : at + length]
                entry.setdefault(key, Pieces()).add(start, piece)
            else:
                entry.setdefault(key, value)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole parameters and buffers; flat, where they cannot have the model's shape."""
        found = {
            name: pieces.whole(self.shapes.get(name))
            for name, pieces in self.weights.items()
        }
        return found | self.buffers


def _tensors(
    states: Sequence[Mapping[str, Any]], shapes: Mapping[str, Size]
) -> tuple[list[str], dict[str, Pieces], dict[str, Tensor]]:
    """Names in the order of layouts, parameters and buffers."""
    first = states[0]
    if "model" in first:
        names, parts = list(first["model"]), [first["model"]]
        weights = [name for name in names if name in shapes]
        buffers = {n: value for n, value in parts[0].items() if n not in shapes}
    else:
        kinds = {**first["shared"], **first["own"]}
        names = weights = list(kinds["weights"])
        buffers = dict(kinds["buffers"])
        is_divided = "weights" in first["own"]
        parts = [state["own"]["weights"] for state in states] if is_divided else []
        parts = parts or [kinds["weights"]]
    found = {}
    for name in weights:
        size = parts[0][name].numel()
        pieces = [(n * size, part[name].reshape(-1)) for n, part in enumerate(parts)]
        found[name] = Pieces(*pieces)
    return names, found, buffers


def groups_of(state: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Options of each optimizer's parameter groups."""
    if "facts" in state:
        return {name: facts["groups"] for name, facts in state["facts"].items()}
    return {
        name: [
            {key: value for key, value in group.items() if key != "params"}
            for group in own["param_groups"]
        ]
        for name, own in state.get("optimizers", {}).items()
    }


def _stepped(state: Mapping[str, Any]) -> dict[str, dict[int, dict[str, Any]]]:
    """What each optimizer keeps for each tensor that it steps, by name and number."""
    if "facts" not in state:
        return {
            name: {int(n): dict(entry) for n, entry in own["state"].items()}
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
