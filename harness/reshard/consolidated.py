"""A checkpoint of several ranks as whole parameters with their optimizer states.

Each rank's state has ``layouts`` (see ``harness.reshard.layout``), which tell where the
pieces of each parameter are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Size, Tensor, nn
from torch.nn.parameter import is_lazy

from harness.errors import CheckpointError
from harness.pytree import StateDict
from harness.reshard.index import (
    Form,
    PartIndex,
    Run,
    index_pieces,
    is_divided,
    read_stepped,
)

STATE_ERRORS = (
    *(LookupError, AttributeError, TypeError, ValueError, RuntimeError),
    OverflowError,
)
"""Errors that inconsistent states cause."""


def whole_shape(tensor: Tensor) -> Size:
    """Shape of a tensor, which may be a parameter that ranks have divided."""
    found: Size = getattr(tensor, "ds_shape", tensor.shape)
    return found


def parameter_shapes(model: nn.Module) -> dict[str, Size]:
    """Shapes of a model's whole parameters by name, in the order of ``Module.parameters``."""
    return {name: whole_shape(param) for name, param in model.named_parameters()}


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
    """Copy saved tensors into live ones, after ``check_shapes``.

    A saved tensor without memory says which shape is to come; nothing is copied of it.
    """
    then, now = ({name: t.shape for name, t in of.items()} for of in (saved, live))
    check_shapes(then, now, *advice)
    with torch.no_grad():
        for name, value in live.items():
            if not saved[name].is_meta:
                copy_into(value, saved[name])


def copy_into(live: Tensor, saved: Tensor) -> None:
    """Copy values; an expanded tensor, into which torch cannot copy, stays expanded.

    A parameter that ``deepspeed.zero.Init`` has divided takes this rank's part of them.
    """
    if hasattr(live, "ds_id"):
        part: Tensor = live.ds_tensor  # type: ignore[attr-defined]
        start = live.ds_zero_partition_rank * part.numel()  # type: ignore[attr-defined]
        own = saved.reshape(-1)[start : start + part.numel()]
        part[: len(own)].copy_(own)
        return
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
    """Load a state dict of whole weights into a model, also into expanded buffers."""
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


class Piece(NamedTuple):
    """Some elements of a tensor on one rank, which are not read yet."""

    rank: int
    #: place of the first of them, counted from what was asked for, and their number
    at: int
    length: int
    read: Callable[[], Tensor]  #: returns them; the tensor has one dim


@dataclass(frozen=True)
class PieceRun:
    """Pieces of one length on successive ranks, one behind the other."""

    start: int  #: start of the first piece in the flattened tensor
    length: int  #: elements of each piece
    count: int  #: number of pieces; the last may extend past the end
    read: Callable[[int], Tensor]  #: returns the piece of a number, with one dim
    rank: int = 0  #: of the first piece

    @property
    def end(self) -> int:
        """End of the last piece."""
        return self.start + self.length * self.count

    def iter_within(self, start: int, end: int) -> Iterator[Piece]:
        """Yield what lies in a range of the whole tensor, in order."""
        first = max(start - self.start, 0) // self.length
        for number in range(first, self.count):
            at = self.start + number * self.length
            if at >= end:
                return
            cut = slice(max(start - at, 0), min(end - at, self.length))
            read = partial(self._read_part, number, cut)
            place = max(at - start, 0)
            yield Piece(self.rank + number, place, cut.stop - cut.start, read)

    def _read_part(self, number: int, cut: slice) -> Tensor:
        piece = self.read(number)
        if piece.shape != (self.length,):
            msg = f"a piece of {self.length} elements, got {tuple(piece.shape)}"
            raise ValueError(msg)
        return piece[cut]


class TensorPieces:
    """A tensor in pieces, which are neither opened nor copied until they are read."""

    def __init__(self, shape: Size) -> None:
        self.shape = shape
        self._runs: list[PieceRun] = []

    def add(self, run: PieceRun) -> None:
        """Add pieces that follow each other."""
        if run.length:
            self._runs.append(run)

    def check(self) -> None:
        """Raise ``ValueError`` if the pieces have gaps, overlap, or do not reach the end."""
        at = 0
        self._runs.sort(key=lambda run: run.start)
        for run in self._runs:
            if run.start != at:
                whole = tuple(self.shape)
                raise ValueError(f"a piece at {at} of {whole}, got one at {run.start}")
            at = run.end
        if at < self.shape.numel():
            msg = f"{self.shape.numel()} elements of {tuple(self.shape)}, got {at}"
            raise ValueError(msg)

    def list_pieces(self, start: int = 0, length: int | None = None) -> list[Piece]:
        """The pieces of up to `length` elements from `start`, in order; of all by default."""
        end = self.shape.numel()
        if length is not None:
            end = min(start + length, end)
        return [
            piece
            for run in self._runs
            if run.start < end and run.end > start
            for piece in run.iter_within(start, end)
        ]


class PieceCopier:
    """Tensors into which pieces are copied, the pieces of one rank after those of another.

    So each part of a checkpoint is opened once, however many tensors have a piece there.

    Attributes
    ----------
    made
        Tensors that were made, by their ids.
    """

    def __init__(self) -> None:
        self.made: dict[int, Tensor] = {}
        self._copies: list[tuple[Piece, Tensor, int]] = []

    def add_whole(self, pieces: TensorPieces) -> Tensor:
        """A whole tensor, which has no values before ``copy``."""
        places = [(piece, piece.at) for piece in pieces.list_pieces()]
        return self.add(pieces.shape, places)

    def add(
        self,
        shape: Size,
        places: Sequence[tuple[Piece, int]],
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A tensor of zeros, into which ``copy`` copies pieces, each at its place.

        Without a dtype, it is that of the first piece.
        """
        if dtype is None and places:
            dtype = places[0][0].read().dtype
        made = torch.zeros(shape, dtype=dtype)
        flat = made.view(-1)
        self._copies += [(piece, flat, at) for piece, at in places]
        self.made[id(made)] = made
        return made

    def copy(self) -> None:
        """Copy the pieces."""
        for piece, flat, at in sorted(self._copies, key=lambda copy: copy[0].rank):
            flat[at : at + piece.length] = piece.read()
        self._copies.clear()


class Entry(Mapping[str, object]):
    """What an optimizer keeps for one parameter; numbers are read when they are asked for."""

    def __init__(self) -> None:
        self.pieces: dict[str, TensorPieces] = {}
        self._others: dict[str, Callable[[], object]] = {}

    def add_other(self, key: str, read: Callable[[], object]) -> None:
        """Add a value that does not have one element for each of the parameter."""
        self._others.setdefault(key, read)

    def __getitem__(self, key: str) -> object:
        return self.pieces[key] if key in self.pieces else self._others[key]()

    def __iter__(self) -> Iterator[str]:
        yield from self.pieces
        yield from (key for key in self._others if key not in self.pieces)

    def __len__(self) -> int:
        return sum(1 for _ in self)


class ConsolidatedState:
    """The state of all ranks of a checkpoint together; not copied until it is read.

    Parameters
    ----------
    states
        States of the accelerator on all ranks. One is only looked at when a piece of it is
        read, except the first.
    index
        Index of these states; None: it is made, from all of them.

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
        If the states are inconsistent; also when a piece is read.
    """

    def __init__(
        self, states: Sequence[StateDict], index: PartIndex | None = None
    ) -> None:
        first = states[0]
        self._states = states
        self._names, self.weights, self.buffers = _tensors(states)
        for pieces in self.weights.values():
            pieces.check()
        # A state of weights only has no layouts.
        has_layouts = "layouts" in first
        self.kinds = optimizer_classes(first) if has_layouts else {}
        self.groups = named_groups(first, self._names) if has_layouts else {}
        self.entries: dict[str, dict[str, Entry]] = {n: {} for n in self.kinds}
        if has_layouts:
            if index is None or not is_divided(first):
                index = index_pieces(states)
            index.check()
            for name in self.kinds:
                self._add_optimizer(name, index.runs[name], index.forms[name])

    def _add_optimizer(
        self, name: str, runs: Sequence[Run], forms: Sequence[Form]
    ) -> None:
        """Add the pieces that an optimizer steps."""
        entries = self.entries[name]
        for run in runs:
            param = self._names[run.param]
            entry = entries.setdefault(param, Entry())
            self._add_run(entry, name, self.weights[param].shape, run, forms[run.form])
        for param, entry in entries.items():
            for pieces in entry.pieces.values():
                pieces.check()
            if "master" in entry.pieces:
                self.weights[param] = entry.pieces.pop("master")

    def _add_run(
        self, entry: Entry, name: str, shape: Size, run: Run, form: Form
    ) -> None:
        """Add the pieces of a parameter on successive ranks."""
        size = form.get("master") or shape.numel()
        if run.at + run.length > size:
            msg = f"a piece of {size} elements, got {run.length} from {run.at} on"
            raise ValueError(msg)
        for key, numel in form.items():
            if numel == size:
                pieces = entry.pieces.setdefault(key, TensorPieces(shape))
                read = partial(self._read_piece, name, run, key)
                own = PieceRun(run.start, run.length, run.num_ranks, read, run.rank)
                pieces.add(own)
            else:
                read_other = partial(self._read_value, name, run, key, 0)
                entry.add_other(key, read_other)

    def _read_piece(self, name: str, run: Run, key: str, number: int) -> Tensor:
        value = self._read_value(name, run, key, number)
        if not isinstance(value, Tensor):
            raise TypeError(f"a tensor for {key!r}, got {value!r:.80}")
        return value.reshape(-1)[run.at : run.at + run.length]

    def _read_value(self, name: str, run: Run, key: str, number: int) -> object:
        """What the optimizer of one of a run's ranks keeps for a stepped tensor."""
        state = self._states[run.rank + number]
        return read_stepped(state, name, run.stepped, key)


def _tensors(
    states: Sequence[StateDict],
) -> tuple[list[str], dict[str, TensorPieces], dict[str, Tensor]]:
    """Names in the order of layouts, then parameters and buffers by name."""
    first = states[0]
    buffers: dict[str, Tensor] = {}
    if "model" in first:
        # On one device nothing is divided, so buffers need not be told from parameters.
        whole, count = first["model"], 1
        shapes = {name: part.shape for name, part in whole.items()}
    else:
        kinds = {**first["shared"], **first["own"]}
        whole, buffers = kinds["weights"], dict(kinds["buffers"])
        shapes = {name: part.shape for name, part in whole.items()}
        count = 1
        if "weights" in first["own"]:
            shapes = {name: Size(first["shapes"][name]) for name in whole}
            count = len(states)

    def read(name: str, rank: int) -> Tensor:
        own = states[rank]["own"]["weights"] if count > 1 else whole
        flat: Tensor = own[name].reshape(-1)
        return flat

    weights = {name: TensorPieces(shape) for name, shape in shapes.items()}
    for name, pieces in weights.items():
        pieces.add(PieceRun(0, whole[name].numel(), count, partial(read, name)))
    return list(whole), weights, buffers


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
