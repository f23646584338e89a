"""A checkpoint of several ranks as whole parameters with their optimizer states.

Each rank's state has ``layouts`` (see ``harness.reshard.layout``), which tell where the
pieces of each parameter are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

import torch
from torch import Size, Tensor, nn
from torch.nn.parameter import is_lazy

from harness.errors import CheckpointError
from harness.pytree import StateDict

STATE_ERRORS = (
    *(LookupError, AttributeError, TypeError, ValueError, RuntimeError),
    OverflowError,
)
"""Errors that inconsistent states cause."""


def parameter_shapes(model: nn.Module) -> dict[str, Size]:
    """Shapes of a model's whole parameters by name, in the order of ``Module.parameters``."""
    return {
        name: getattr(param, "ds_shape", param.shape)
        for name, param in model.named_parameters()
    }


def check_shapes(
    then: Mapping[str, Sequence[int]],
    now: Mapping[str, Sequence[int]],
    advice: str = "Resume with the model that was saved.",
) -> None:
    """Raise ``CheckpointError`` if names or shapes of tensors differ."""
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
            copy_into(value, saved[name])


def copy_into(live: Tensor, saved: Tensor) -> None:
    """Copy values; an expanded tensor, into which torch cannot copy, stays expanded."""
    if _is_expanded(live):
        steps = live.stride()
        one = tuple(slice(0, 1) if step == 0 else slice(None) for step in steps)
        if torch.equal(saved[one].expand_as(saved), saved):
            live, saved = live[one], saved[one]
        else:  # it was not expanded when it was saved
            live.data = torch.empty_like(live, memory_format=torch.contiguous_format)
    live.copy_(saved)


def _is_expanded(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and 0 in tensor.stride()


def load_whole_state(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Load a state dict of whole weights into a model, also into expanded buffers.

    Raises
    ------
    RuntimeError
        As ``Module.load_state_dict``.
    """
    expanded = {
        name: live
        for name, live in model.named_buffers()
        if name in saved and live.shape == saved[name].shape and _is_expanded(live)
    }
    with torch.no_grad():
        for name, live in expanded.items():
            copy_into(live, saved[name])
    model.load_state_dict({**saved, **expanded})


def shape_lazy_parameters(model: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Give the parameters and buffers of lazy layers the shapes that they had when saved."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for name, live in tensors:
        if is_lazy(live) and name in saved:
            live.materialize(saved[name].shape)


def shape_buffers(model: nn.Module, saved: Mapping[str, Tensor]) -> list[str]:
    """Give buffers the shapes that they had when saved, since a model may change them.

    A buffer that is None in the model, but was a tensor when saved, becomes a tensor.

    Returns
    -------
    Names of the buffers whose shapes were others. Their values are not set.
    """
    changed = []
    for place, module in model.named_modules():
        for own_name, live in module._buffers.items():
            name = f"{place}.{own_name}" if place else own_name
            if name not in saved or (live is not None and is_lazy(live)):
                continue
            if live is None:
                empty = torch.empty_like(saved[name], device=_device_of(model))
                module._buffers[own_name] = empty
                changed.append(name)
            elif live.shape != saved[name].shape:
                live.data = live.new_empty(saved[name].shape)
                changed.append(name)
    return changed


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def weights_dtype(model: nn.Module) -> str:
    """Dtype of the weights, which an engine may have changed."""
    return str(next((param.dtype for param in model.parameters()), None))


def is_master_name(name: str) -> bool:
    """True for the name of a master weight, which an optimizer steps instead of a weight."""
    return name.endswith("/master")


class TensorPieces:
    """A tensor in pieces, which are not copied until they are read.

    Parameters
    ----------
    shape
        Shape of the whole tensor.
    pieces
        Start of each piece in the flattened tensor, and the piece, which has one dim. A
        piece may extend past the end.
    """

    def __init__(self, shape: Size, pieces: Iterable[tuple[int, Tensor]] = ()) -> None:
        self.shape = shape
        self._pieces = list(pieces)

    def add(self, start: int, piece: Tensor) -> None:
        """Add a piece that starts at `start`."""
        self._pieces.append((start, piece))

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the pieces."""
        return self._pieces[0][1].dtype

    def check(self) -> None:
        """Raise ``ValueError`` if the pieces have gaps, overlap, or do not reach the end."""
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
        """Up to `length` elements from `start`."""
        end = min(start + length, self.shape.numel())
        found = [
            piece[max(start - at, 0) : end - at]
            for at, piece in sorted(self._pieces, key=itemgetter(0))
            if at < end and at + len(piece) > start
        ]
        if not found:
            return torch.empty(0)
        return found[0] if len(found) == 1 else torch.cat(found)

    def assemble(self) -> Tensor:
        """The whole tensor."""
        return self.read(0, self.shape.numel()).reshape(self.shape)


class ConsolidatedState:
    """The state of all ranks of a checkpoint together; not copied until it is read.

    Parameters
    ----------
    states
        States of the accelerator on all ranks.

    Attributes
    ----------
    weights
        Parameters by name, in the precision in which an optimizer steps them.
    buffers
        Buffers by name.
    kinds
        Class name of each optimizer.
    groups
        Parameter groups of each optimizer: options, and names of the parameters.
    entries
        Optimizer states by optimizer name, parameter name and key: ``TensorPieces`` if each
        element of the parameter has its own value, else the value.

    Raises
    ------
    LookupError, AttributeError, TypeError, ValueError
        If the states are inconsistent.
    """

    def __init__(self, states: Sequence[StateDict]) -> None:
        first = states[0]
        self._names, self.weights, self.buffers = _tensors(states)
        for pieces in self.weights.values():
            pieces.check()
        # A state of weights only has no layouts.
        has_layouts = "layouts" in first
        self.kinds = optimizer_classes(first) if has_layouts else {}
        self.groups = named_groups(first, self._names) if has_layouts else {}
        self.entries: dict[str, dict[str, StateDict]] = {n: {} for n in self.kinds}
        is_divided = "optimizers" in first.get("own", {})
        for state in states if is_divided else states[:1]:
            if has_layouts:
                self._add_rank(state)
        for by_param in self.entries.values():
            for name, entry in by_param.items():
                for value in entry.values():
                    if isinstance(value, TensorPieces):
                        value.check()
                if "master" in entry:
                    self.weights[name] = entry.pop("master")

    def _add_rank(self, state: StateDict) -> None:
        """Add the pieces that one rank's optimizers step."""
        stepped = _optimizer_entries(state)
        for name, entries in self.entries.items():
            layout = state["layouts"][name]
            for n, number, *place in layout.tolist():
                param = self._names[number]
                values = stepped[name].get(n)
                # Only a single device leaves out tensors without a state.
                if values is None and ("facts" in state or not 0 <= n < len(layout)):
                    msg = f"{name} steps {len(stepped[name])} tensors, got number {n}"
                    raise LookupError(msg)
                entry = entries.setdefault(param, {})
                self._add_piece(entry, param, values or {}, *place)

    def _add_piece(
        self,
        entry: StateDict,
        param: str,
        values: StateDict,
        at: int,
        start: int,
        length: int,
    ) -> None:
        """Add the piece of a parameter in an optimizer's values for one stepped tensor."""
        shape = self.weights[param].shape
        size = values["master"].numel() if "master" in values else shape.numel()
        if min(at, start, length) < 0 or at + length > size:
            msg = f"a piece of {size} elements, got {length} from {at} on"
            raise ValueError(msg)
        for key, value in values.items():
            # Counters have no dims; parameters that DeepSpeed can train have some.
            if isinstance(value, Tensor) and value.dim() and value.numel() == size:
                piece = value.reshape(-1)[at : at + length]
                entry.setdefault(key, TensorPieces(shape)).add(start, piece)
            else:
                entry.setdefault(key, value)

    def state_dict(self) -> dict[str, Tensor]:
        """Whole parameters and buffers."""
        found = {name: pieces.assemble() for name, pieces in self.weights.items()}
        return found | self.buffers


def _tensors(
    states: Sequence[StateDict],
) -> tuple[list[str], dict[str, TensorPieces], dict[str, Tensor]]:
    """Names in the order of layouts, then parameters and buffers by name."""
    first = states[0]
    if "model" in first:
        # On one device nothing is divided, so buffers need not be told from parameters.
        names, of_ranks, buffers = list(first["model"]), [first["model"]], {}
        is_divided = False
    else:
        kinds = {**first["shared"], **first["own"]}
        names, buffers = list(kinds["weights"]), dict(kinds["buffers"])
        is_divided = "weights" in first["own"]
        of_ranks = [kinds["weights"]]
        if is_divided:
            of_ranks = [state["own"]["weights"] for state in states]
    weights = {}
    for name in names:
        part = of_ranks[0][name]
        shape = Size(first["shapes"][name]) if is_divided else part.shape
        weights[name] = TensorPieces(
            shape,
            [
                (n * part.numel(), own[name].reshape(-1))
                for n, own in enumerate(of_ranks)
            ],
        )
    return names, weights, buffers


def optimizer_classes(state: StateDict) -> dict[str, str]:
    """Class name of each optimizer by its name."""
    if "facts" in state:
        return {name: facts["kind"] for name, facts in state["facts"].items()}
    return dict(state.get("kinds", {}))


def option_groups(state: StateDict) -> dict[str, list[StateDict]]:
    """Parameter groups of each optimizer in the state of an accelerator; not copied."""
    optimizers = state["facts"] if "facts" in state else state.get("optimizers", {})
    key = "groups" if "facts" in state else "param_groups"
    return {name: own[key] for name, own in optimizers.items()}


def named_groups(
    state: StateDict, names: Sequence[str]
) -> dict[str, list[tuple[StateDict, list[str]]]]:
    """Parameter groups of each optimizer: options, and names of the parameters."""
    found = {}
    for optimizer, groups in option_groups(state).items():
        members = state["members"][optimizer]
        found[optimizer] = [
            (
                {name: value for name, value in group.items() if name != "params"},
                [names[number] for number in numbers],
            )
            for group, numbers in zip(groups, members, strict=True)
        ]
    return found


def _optimizer_entries(state: StateDict) -> dict[str, dict[int, StateDict]]:
    """State of each optimizer by its name and the index of the stepped tensor."""
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
