"""Checkpoints of many ranks as ZeRO 1 and 3 write them, without the ranks.

Parameters are divided as DeepSpeed 0.19.8 divides them: at ZeRO 3 each one over all ranks, at
ZeRO 1 a flat tensor of all of them. An element of a parameter is its place among all elements, so
a test can tell whether one came to the right place.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from harness.checkpoint.format import (
    Manifest,
    Position,
    RunRef,
    begin_checkpoint,
    commit_checkpoint,
    write_rank,
)
from harness.pytree import flatten
from harness.reshard.index import summarize_part

OPT = "opt"
MOMENTS = ("exp_avg", "exp_avg_sq")


class Model(nn.Module):
    """Parameters of the given shapes, and a buffer."""

    def __init__(self, shapes: Sequence[Sequence[int]], device: str = "cpu") -> None:
        super().__init__()
        self.parts = nn.ParameterList(torch.zeros(*s, device=device) for s in shapes)
        self.register_buffer("count", torch.zeros(1))


def numbered(model: Model, offset: float = 0.0) -> dict[str, Tensor]:
    """Each parameter, with the places of its elements among all as values."""
    found, at = {}, 0
    for name, param in model.named_parameters():
        end = at + param.numel()
        values = torch.arange(at, end, dtype=torch.float32) + offset
        found[name], at = values.reshape(param.shape), end
    return found


@dataclass(frozen=True)
class Faker:
    """Makes the state of each rank of a fit that never ran."""

    model: Model
    world_size: int
    stage: Literal[1, 3]

    def accelerator(self, rank: int, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """State of one rank's accelerator; `values` are whole parameters, by name.

        The moments are the negative values, and their squares are one more than the values.
        """
        rows, flat = self._divide(rank, values)
        stepped = {
            f"{OPT}/0/master": flat,
            f"{OPT}/0/exp_avg": -flat,
            f"{OPT}/0/exp_avg_sq": flat + 1,
        }
        buffers = {"count": torch.full((1,), 7.0)}
        shared: dict[str, Any] = {}
        own: dict[str, Any] = {"buffers": buffers, "optimizers": stepped}
        if self.stage == 3:
            own = {"weights": self._own_weights(rank, values), **own}
        else:
            shared = {"weights": dict(values)} if rank == 0 else {}
        facts = {
            "kind": "AdamW",
            "form": ["Faked", "torch.float32"],
            "groups": [{"lr": 0.1}],
            "state": [{"step": 5}],
            "scheduler": None,
        }
        count = len(list(self.model.parameters()))
        return {
            "shared": shared,
            "own": own,
            "facts": {OPT: facts},
            "grads": {OPT: {}},
            "world_size": self.world_size,
            "stage": self.stage,
            "steps": {OPT: 5},
            "overflows": {OPT: 0},
            "done": {OPT: 0},
            "layouts": {OPT: torch.tensor(rows, dtype=torch.int64).reshape(-1, 5)},
            "members": {OPT: [list(range(count))]},
            "shapes": {n: list(p.shape) for n, p in self.model.named_parameters()},
            "frozen": [],
        }

    def state(self, rank: int, values: Mapping[str, Tensor]) -> dict[str, Any]:
        """State of one rank, as far as it is read here."""
        return {
            "accelerator": self.accelerator(rank, values),
            "callbacks": {},
            "extra": {},
            "journal": 100 + rank,
            "pass": None,
            "random": {},
            "records": {},
            "rank": rank,
        }

    def _divide(
        self, rank: int, values: Mapping[str, Tensor]
    ) -> tuple[list[list[int]], Tensor]:
        """Rows of the layout, and the flat tensor that the rank steps."""
        pieces, rows, at, whole = [], [], 0, list(values.values())
        for number, place, start, length, room in self._iter_pieces(rank):
            if length:
                rows.append([0, number, at + place, start, length])
            value = whole[number].reshape(-1)
            piece = torch.zeros(room, dtype=value.dtype, device=value.device)
            piece[:length] = value[start : start + length]
            pieces.append(piece)
            at += room
        if self.stage == 1:
            used = sum(len(piece) for piece in pieces)
            padding = self._size() - used
            pieces.append(torch.zeros(padding))
        return rows, torch.cat(pieces)

    def _size(self) -> int:
        """Elements of a rank's part of the flat tensor at ZeRO 1."""
        numel = sum(param.numel() for param in self.model.parameters())
        return -(-numel // self.world_size)

    def _iter_pieces(self, rank: int) -> Iterator[tuple[int, int, int, int, int]]:
        """Parameter, place in its room, start, length and room of each piece."""
        first, begin = rank * self._size(), 0
        for number, param in enumerate(self.model.parameters()):
            if self.stage == 3:
                room = -(-param.numel() // self.world_size)
                length = max(min(room, param.numel() - rank * room), 0)
                yield number, 0, rank * room, length, room
                continue
            start = max(first - begin, 0)
            end = min(first + self._size() - begin, param.numel())
            if start < end:
                yield number, 0, start, end - start, end - start
            begin += param.numel()

    def _own_weights(
        self, rank: int, values: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """This rank's part of each parameter, padded."""
        found = {}
        for name, value in values.items():
            room = -(-value.numel() // self.world_size)
            part = torch.zeros(room)
            piece = value.reshape(-1)[rank * room : (rank + 1) * room]
            part[: len(piece)] = piece
            found[name] = part
        return found


def save(folder: Path, faker: Faker, *, has_index: bool = True) -> Path:
    """A complete checkpoint of all ranks; without an index, as earlier versions wrote it."""
    position = Position(epoch=1, iter=5, step=5, phase="epoch")
    temporary, values = begin_checkpoint(folder, position), numbered(faker.model)
    for rank in range(faker.world_size):
        state = faker.state(rank, values)
        summary = summarize_part(state) if has_index else None
        write_rank(temporary, rank, *flatten(state), summary)
    manifest = Manifest(
        world_size=faker.world_size, position=position, run=RunRef(), about={}
    )
    return commit_checkpoint(temporary, manifest)


def read_index_json(place: Path) -> Any:
    return json.loads((place / "index.json").read_text())
