"""A checkpoint of several ranks as whole parameters, each with its optimizer state.

All states have ``layouts`` (see ``harness.reshard.layout``): by those of all ranks the
pieces of each parameter are found where they lie.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Size, Tensor, nn

from harness.errors import CheckpointError
from harness.pytree import StateDict

STATE_ERRORS = (LookupError, AttributeError, TypeError, ValueError, RuntimeError)
"""What is raised by states whose parts do not fit together."""


def parameter_shapes(model: nn.Module) -> dict[str, Size]:
    """Shapes of a model's whole parameters, by name, as ``Module.parameters`` counts them."""
    return {
        name: getattr(param, "ds_shape", param.shape)
        for name, param in model.named_parameters()
    }


def check_shapes(
    then: Mapping[str, Sequence[int]],
    now: Mapping[str, Sequence[int]],
    advice: str = "Resume with the model that was saved.",
) -> None:
    """Raise ``CheckpointError`` unless names and shapes of tensors are the same."""
    for name in sorted(now.keys() | then.keys()):
        want, got = (tuple(of[name]) if name in of else "none" for of in (now, then))
        if want != got:
            msg = f"resume: expected the tensor {name!r} of shape {want}, got {got}."
            raise CheckpointError(f"{msg} {advice}")


def copy_tensors(
    live: Mapping[str, Tensor], saved: Mapping[str, Tensor], *advice: str
) -> None:
    """Copy saved tensors into live ones, after ``check_shapes``."""
    then, now = ({name: t.shape for name, t in of.items()} for of in (saved, live))
    check_shapes(then, now, *advice)
    with torch.no_grad():
        for name, value in live.items():
            value.copy_(saved[name])


def weights_dtype(model: nn.Module) -> str:
    """Dtype of the weights, which an engine may have changed."""
    return str(next((param.dtype for param in model.parameters()), None))


def is_master_name(name: str) -> bool:
    """True for the name of what an optimizer steps in the place of weights."""
    return name.endswith("/master")


class TensorPieces:
    """A tensor in pieces, which lie where they were read.

    Parameters
    ----------
    shape
        Of the whole.
    pieces
        Where each begins in the flattened whole, and the piece, of one dim; one may reach
        beyond the end.
    """

    def __init__(self, shape: Size, pieces: Iterable[tuple[int, Tensor]] = ()) -> None:
        self.shape = shape
        self._pieces = list(pieces)

    def add(self, start: int, piece: Tensor) -> None:
        """One more piece, that begins at `start`."""
        self._pieces.append((start, piece))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the pieces."""
        return self._pieces[0][1].dtype

    def check(self) -> None:
        """Raise ``ValueError`` unless the pieces follow each other to the end."""
        at = 0
        for start, piece in sorted(self._pieces, key=itemgetter(0)):
            if start != at:
                msg = f"a piece at {at} of {tuple(self.shape)}, got one at {start}"
                raise ValueError(msg)
            at += len(piece)
        if at < self.shape.numel():
            msg = f"{self.shape.numel()} elements of {tuple(self.shape)}, got {at}"
            raise ValueError(msg)

    def read(self, start: int, length: int) -> Tensor:
        """Elements from `start` on, as many as there are up to `length`."""
        end = min(start + length, self.shape.numel())
        found = [
            piece[max(start - at, 0) : end - at]
            for at, piece in sorted(self._pieces, key=itemgetter(0))
            if at < end and at + len(piece) > start
        ]
        if not found:
            return torch.empty(0)
        return found[0] if len(found) == 1 else torch.cat(found)

    def whole(self) -> Tensor:
        """All elements, in their shape."""
        return self.read(0, self.shape.numel()).reshape(self.shape)


class ConsolidatedState:
    """What all ranks of a checkpoint hold together; nothing is copied until it is read.

    Parameters
    ----------
    states
        States of the accelerator on all ranks.

    Attributes
    ----------
    weights
        Parameters by name; those that an optimizer steps in more precision, in that one.
    buffers
        Buffers by name.
    kinds
        Class of each optimizer.
    groups
        Each optimizer's parameter groups: options, and names of the parameters.
    entries
        Optimizer states by name of the optimizer, name of the parameter and key: ``TensorPieces``
        where each element of the parameter has its own, else the value.

    Raises
    ------
    LookupError, AttributeError, TypeError, ValueError
        If the states do not fit together.
    """

    def __init__(self, states: Sequence[StateDict]) -> None:
        first = states[0]
        self._names, self.weights, self.buffers = _tensors(states)
        for pieces in self.weights.values():
            pieces.check()
        # Without layouts, as of other makes, the weights can be had all the same.
        has_layouts = "layouts" in first
        self.kinds = optimizer_classes(first) if has_layouts else {}
        self.groups = named_groups(first, self._names) if has_layouts else {}
        self.entries: dict[str, dict[str, StateDict]] = {n: {} for n in self.kinds}
        is_divided = "optimizers" in first.get("own", {})
        for state in states if is_divided else states[:1]:
            if has_layouts:
                self._take(state)
        for by_param in self.entries.values():
            for name, entry in by_param.items():
                for value in entry.values():
                    if isinstance(value, TensorPieces):
                        value.check()
                if "master" in entry:
                    self.weights[name] = entry.pop("master")

    def _take(self, state: StateDict) -> None:
        """Take the pieces that one rank's optimizers step."""
        stepped = _stepped(state)
        for name, entries in self.entries.items():
            layout = state["layouts"][name]
            for n, number, *place in layout.tolist():
                param = self._names[number]
                values = stepped[name].get(n)
                # Only one device leaves out what has no state yet.
                if values is None and ("facts" in state or not 0 <= n < len(layout)):
                    msg = f"{name} steps {len(stepped[name])} tensors, got number {n}"
                    raise LookupError(msg)
                entry = entries.setdefault(param, {})
                self._add(entry, param, values or {}, *place)

    def _add(
        self,
        entry: StateDict,
        param: str,
        values: StateDict,
        at: int,
        start: int,
        length: int,
    ) -> None:
        """Take a piece of a parameter from what an optimizer keeps for a stepped tensor."""
        shape = self.weights[param].shape
        size = values["master"].numel() if "master" in values else shape.numel()
        if min(at, start, length) < 0 or at + length > size:
            msg = f"a piece of {size} elements, got {length} from {at} on"
            raise ValueError(msg)
        for key, value in values.items():
            # Counters have no dims, and neither have parameters that DeepSpeed can train.
            if isinstance(value, Tensor) and value.dim() and value.numel() == size:
                piece = value.reshape(-1)[at : at + length]
                entry.setdefault(key, TensorPieces(shape)).add(start, piece)
            else:
                entry.setdefault(key, value)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole parameters and buffers."""
        found = {name: pieces.whole() for name, pieces in self.weights.items()}
        return found | self.buffers


def _tensors(
    states: Sequence[StateDict],
) -> tuple[list[str], dict[str, TensorPieces], dict[str, Tensor]]:
    """Names in the order of layouts, parameters and buffers."""
    first = states[0]
    if "model" in first:
        # Which are buffers does not matter: nothing of theirs is divided.
        names, parts, buffers = list(first["model"]), [first["model"]], {}
        is_divided = False
    else:
        kinds = {**first["shared"], **first["own"]}
        names, buffers = list(kinds["weights"]), dict(kinds["buffers"])
        is_divided = "weights" in first["own"]
        parts = [state["own"]["weights"] for state in states] if is_divided else []
        parts = parts or [kinds["weights"]]
    weights = {}
    for name in names:
        one = parts[0][name]
        shape = Size(first["shapes"][name]) if is_divided else one.shape
        weights[name] = TensorPieces(
            shape,
            [(n * one.numel(), part[name].reshape(-1)) for n, part in enumerate(parts)],
        )
    return names, weights, buffers


def optimizer_classes(state: StateDict) -> dict[str, str]:
    """Class of each optimizer, by its name."""
    if "facts" in state:
        return {name: facts["kind"] for name, facts in state["facts"].items()}
    return dict(state.get("kinds", {}))


def named_groups(
    state: StateDict, names: Sequence[str]
) -> dict[str, list[tuple[StateDict, list[str]]]]:
    """Options of each optimizer's parameter groups, and names of their parameters."""
    optimizers = state["facts"] if "facts" in state else state.get("optimizers", {})
    key = "groups" if "facts" in state else "param_groups"
    found = {}
    for optimizer, own in optimizers.items():
        members = state["members"][optimizer]
        found[optimizer] = [
            (
                {name: value for name, value in group.items() if name != "params"},
                [names[number] for number in numbers],
            )
            for group, numbers in zip(own[key], members, strict=True)
        ]
    return found


def _stepped(state: StateDict) -> dict[str, dict[int, StateDict]]:
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
