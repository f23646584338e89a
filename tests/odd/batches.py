"""Forms of batches: how rows become one, and how a model takes it."""

from __future__ import annotations

from collections import OrderedDict, UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

WIDTH, CLASSES = 4, 3
Row = tuple[Tensor, Tensor, int]
"""Features, class, and number of the row."""


class Sample(NamedTuple):
    x: Any
    y: Any


@dataclass
class Record:
    names: list[str]
    x: Tensor
    y: Tensor | None = None


class Moves:
    """An object that is no dataclass, and moves itself."""

    def __init__(self, names: list[str], x: Tensor, y: Tensor) -> None:
        self.names, self.x, self.y = names, x, y

    def to(self, device: torch.device) -> Moves:
        return Moves(self.names, self.x.to(device), self.y.to(device))


class Encoding(UserDict):
    """A mapping that is no dict, as tokenizers return."""


class Out(OrderedDict):
    """A dict whose keys are attributes, as Hugging Face models return."""

    __getattr__ = OrderedDict.__getitem__


def names_of(rows: list[Row]) -> list[str]:
    return [f"row {n}" for *_, n in rows]


def x_of(rows: list[Row]) -> Tensor:
    return torch.stack([x for x, *_ in rows])


def y_of(rows: list[Row]) -> Tensor:
    return torch.stack([y for _, y, _ in rows])


def pieces_of(rows: list[Row]) -> list[Tensor]:
    """Features of other lengths: the first 1, 2 or 3 of each row."""
    return [x[: n % 3 + 1] for x, _, n in rows]


def widen(pieces: list[Tensor]) -> Tensor:
    """Pieces of other lengths as features again."""
    return torch.stack([torch.cat([p, p.new_zeros(WIDTH - len(p))]) for p in pieces])


def read_packed(packed: PackedSequence) -> Tensor:
    padded, _ = pad_packed_sequence(packed, batch_first=True)
    return widen(list(padded.squeeze(-1)))


def read_texts(*names: str) -> Tensor:
    numbers = [float(name.split()[1]) for name in names]
    return torch.tensor(numbers).sin().unsqueeze(1).repeat(1, WIDTH)


@dataclass(frozen=True, kw_only=True)
class BatchForm:
    """One form of batches.

    Attributes
    ----------
    collate
        Makes a batch of rows.
    call
        Calls a model as ``forward`` expects it.
    target_of
        What losses and metrics get as target.
    read
        Inside ``forward``: features of its arguments, or features and classes.
    """

    collate: Callable[[list[Row]], Any]
    call: Callable[[Any, Any], Any] = lambda model, batch: model(batch[0])
    target_of: Callable[[Any], Any] = lambda batch: batch[1]
    read: Callable[..., Any] = lambda x: x
    is_plain: bool = field(default=False)  #: tensors as metrics take them


def whole(**options: Any) -> BatchForm:
    """A batch that is input and target in one."""
    options = {"call": lambda model, batch: model(batch)} | options
    return BatchForm(target_of=lambda batch: None, **options)


BATCHES = {
    "pair": BatchForm(collate=lambda r: (x_of(r), y_of(r)), is_plain=True),
    "list": BatchForm(collate=lambda r: [x_of(r), y_of(r)], is_plain=True),
    "triple": BatchForm(
        collate=lambda r: (x_of(r), y_of(r), torch.ones(len(r))), is_plain=True
    ),
    "named tuple": BatchForm(collate=lambda r: Sample(x_of(r), y_of(r)), is_plain=True),
    "two inputs": BatchForm(
        collate=lambda r: ((x_of(r)[:, :2], x_of(r)[:, 2:]), y_of(r)),
        call=lambda model, batch: model(*batch[0]),
        read=lambda a, b: torch.cat([a, b], 1),
        is_plain=True,
    ),
    "mapping input": BatchForm(
        collate=lambda r: ({"b": x_of(r)[:, 2:], "a": x_of(r)[:, :2]}, y_of(r)),
        call=lambda model, batch: model(**batch[0]),
        read=lambda a, b: torch.cat([a, b], 1),
        is_plain=True,
    ),
    "text-first input": BatchForm(
        collate=lambda r: ({"names": names_of(r), "x": x_of(r)}, y_of(r)),
        call=lambda model, batch: model(**batch[0]),
        read=lambda names, x: x,
        is_plain=True,
    ),
    "texts": BatchForm(
        collate=lambda r: (names_of(r), y_of(r)),
        call=lambda model, batch: model(*batch[0]),
        read=read_texts,
        is_plain=True,
    ),
    "named tuple input": BatchForm(
        collate=lambda r: (Sample(x_of(r)[:, :2], x_of(r)[:, 2:]), y_of(r)),
        read=lambda sample: torch.cat([sample.x, sample.y], 1),
        is_plain=True,
    ),
    "dataclass input": BatchForm(
        collate=lambda r: (Record(names_of(r), x_of(r)), y_of(r)),
        read=lambda record: record.x,
        is_plain=True,
    ),
    "packed": BatchForm(
        collate=lambda r: (
            pack_sequence([p[:, None] for p in pieces_of(r)], enforce_sorted=False),
            y_of(r),
        ),
        read=read_packed,
        is_plain=True,
    ),
    "ragged": BatchForm(
        collate=lambda r: (pieces_of(r), y_of(r)),
        call=lambda model, batch: model(*batch[0]),
        read=lambda *pieces: widen(list(pieces)),
        is_plain=True,
    ),
    "columns": BatchForm(
        collate=lambda r: (x_of(r).T.contiguous(), y_of(r)),
        read=lambda x: x.T,
        is_plain=True,
    ),
    "ragged target": BatchForm(collate=lambda r: (x_of(r), list(y_of(r)))),
    "numbers as target": BatchForm(
        collate=lambda r: (x_of(r), [int(y) for _, y, _ in r])
    ),
    "tuple target": BatchForm(
        collate=lambda r: (x_of(r), (y_of(r), torch.ones(len(r), 2)))
    ),
    "mapping target": BatchForm(
        collate=lambda r: (x_of(r), {"names": names_of(r), "y": y_of(r)})
    ),
    "arrays": BatchForm(
        collate=lambda r: (x_of(r).numpy(), y_of(r).numpy()),
        read=lambda x: torch.from_numpy(np.ascontiguousarray(x)),
    ),
    "mapping": whole(
        collate=lambda r: {"x": x_of(r), "labels": y_of(r)},
        call=lambda model, batch: model(**batch),
        read=lambda x, labels: (x, labels),
    ),
    "text-first mapping": whole(
        collate=lambda r: {"names": names_of(r), "x": x_of(r), "y": y_of(r)},
        call=lambda model, batch: model(**batch),
        read=lambda names, x, y: (x, y),
    ),
    "encoding": whole(
        collate=lambda r: Encoding(n=names_of(r), x=x_of(r), y=y_of(r)),
        call=lambda model, batch: model(**batch),
        read=lambda n, x, y: (x, y),
    ),
    "dataclass": whole(
        collate=lambda r: Record(names_of(r), x_of(r), y_of(r)),
        read=lambda record: (record.x, record.y),
    ),
    "object": whole(
        collate=lambda r: Moves(names_of(r), x_of(r), y_of(r)),
        read=lambda item: (item.x, item.y),
    ),
    "lone tensor": whole(collate=x_of, read=lambda x: (x, (x[:, 0] > 0).long())),
    "list of one": whole(
        collate=lambda r: [x_of(r)],
        call=lambda model, batch: model(batch[0]),
        read=lambda x: (x, (x[:, 0] > 0).long()),
    ),
}
"""Forms of batches by name."""


def scores_of(pred: Any) -> Tensor:
    """Scores in an output of any form."""
    if isinstance(pred, dict):
        return pred["scores"]
    if isinstance(pred, Record):
        return pred.x
    return pred if isinstance(pred, Tensor) else pred[0]


def as_pair(pred: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Scores and classes, as a loss or metric of the user's finds them."""
    own = None
    if isinstance(pred, dict | Record):
        own = pred["y"] if isinstance(pred, dict) else pred.y
    elif not isinstance(pred, Tensor) and target is None:
        own = pred[1]
    target = target if own is None else own
    if isinstance(target, dict):
        target = target["y"]
    if isinstance(target, tuple | list) and isinstance(target[0], Tensor):
        target = target[0] if target[0].dim() else torch.stack(list(target))
    if isinstance(target, np.ndarray):
        target = torch.from_numpy(target)
    return scores_of(pred), torch.as_tensor(target)
