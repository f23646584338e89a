"""Layouts: where the pieces of parameters are in the tensors that an optimizer steps.

A plain optimizer steps the parameters themselves. DeepSpeed steps flat tensors that contain
many parameters one after another, and a rank may have only a part of them.

A layout is an int64 tensor of shape (pieces, 5). The columns are: index of the stepped
tensor, index of the parameter in ``Module.parameters``, start of the piece in the stepped
tensor, start of the piece in the flattened parameter, and its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

ELEMENTWISE = frozenset(
    {"Adadelta", "Adagrad", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam"}
    | {"RMSprop", "Rprop", "SGD"}
)
"""Optimizers of torch 2.13 that update each element by itself.

ZeRO may divide their parameters anywhere.
"""

BY_MATRIX = frozenset({"Adafactor", "Muon"})
"""Optimizers whose state depends on the shape of the whole parameter."""

OWN_FORM = "own_form"
"""Key of a state that an optimizer returned in another form than torch's own."""

_Piece = tuple[int, Tensor, int, int, int]


def make_plain_layout(params: Iterable[Tensor], stepped: Sequence[Tensor]) -> Tensor:
    """Make the layout of an optimizer that steps whole ones of a model's parameters."""
    return _make_layout(params, _whole_pieces(stepped))


def make_engine_layout(
    params: Iterable[Tensor], engine: Any, stepped: Sequence[Tensor], rank: int
) -> Tensor:
    """Make the layout of the tensors that an engine's optimizer steps on one rank.

    References
    ----------
    DeepSpeed 0.19.8: ``zero/stage3.py``, ``set_grad_positions``; ``zero/stage_1_and_2.py``,
    ``bf16_optimizer.py`` and ``fp16/fused_optimizer.py``, where parameters become views of a
    flat tensor; ``fp16/unfused_optimizer.py``.
    """
    wrapper = engine.optimizer
    if hasattr(wrapper, "fp32_partitioned_groups_flat"):
        return _make_layout(params, _partitioned_pieces(wrapper, rank))
    for kind in ("bit16", "bf16", "fp16"):
        flats = getattr(wrapper, f"{kind}_groups_flat", None)
        if flats is not None:
            groups = getattr(wrapper, f"{kind}_groups")
            return _make_layout(params, _flat_pieces(groups, flats, stepped, rank))
    copied = getattr(wrapper, "fp16_groups", None)
    whole = stepped if copied is None else [p for group in copied for p in group]
    return _make_layout(params, _whole_pieces(whole))


def group_members(
    params: Iterable[Tensor], groups: Iterable[Mapping[str, Any]]
) -> list[list[int]]:
    """Indexes, among a model's parameters, of those in each of an optimizer's groups."""
    indexes = {id(param): n for n, param in enumerate(params)}
    return [
        [indexes[id(param)] for param in group["params"] if id(param) in indexes]
        for group in groups
    ]


def _make_layout(params: Iterable[Tensor], pieces: Iterable[_Piece]) -> Tensor:
    """Put the pieces in a tensor, with the index of each parameter of a model."""
    indexes = {id(param): n for n, param in enumerate(params)}
    rows = [
        (n, indexes[id(param)], at, start, length)
        for n, param, at, start, length in pieces
        if id(param) in indexes
    ]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)


def _whole_pieces(params: Sequence[Tensor]) -> Iterator[_Piece]:
    """Pieces of an optimizer that steps each parameter by itself."""
    for n, param in enumerate(params):
        yield n, param, 0, 0, param.numel()


def _flat_pieces(
    groups: Sequence[Sequence[Tensor]],
    flats: Sequence[Tensor],
    stepped: Sequence[Tensor],
    rank: int,
) -> Iterator[_Piece]:
    """Pieces of flat groups, of which a rank steps all or an equal part."""
    for n, (params, flat) in enumerate(zip(groups, flats, strict=True)):
        size = stepped[n].numel()
        first = 0 if size == flat.numel() else rank * size
        for param in params:
            begin = (param.data_ptr() - flat.data_ptr()) // flat.element_size()
            start = max(first - begin, 0)
            end = min(first + size - begin, param.numel())
            if start < end:
                yield n, param, begin + start - first, start, end - start


def _partitioned_pieces(wrapper: Any, rank: int) -> Iterator[_Piece]:
    """Pieces at ZeRO 3: one part of each parameter; the last part may be shorter."""
    for params in wrapper.fp16_groups:
        for param in params:
            n, at, size = wrapper.grad_position[wrapper.get_param_id(param)]
            start = rank * size
            length = min(size, param.ds_numel - start)
            if length > 0:
                yield n, param, at, start, length
