from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from harness.data.batch import (
    detach,
    input_of,
    join,
    move,
    num_rows,
    target_of,
    with_input,
    with_target,
)

META = torch.device("meta")
Pair = namedtuple("Pair", "left right")


@dataclass(frozen=True)
class Graph:
    nodes: Any
    name: str = "graph"


class Own:
    """An object that knows how to move itself, and is no container."""

    def __init__(self, device: Any = None) -> None:
        self.device = device

    def to(self, device: Any) -> Own:
        return Own(device)


# --- input and target


@pytest.mark.parametrize(
    ("batch", "input", "target"),
    [
        (("x", "y"), "x", "y"),
        (["x", "y", "weight"], "x", "y"),
        (("x",), "x", None),
        ("x", "x", None),
        ({"ids": 1}, {"ids": 1}, None),
    ],
)
def test_input_and_target_are_the_first_two_items(batch, input, target):
    assert input_of(batch) == input
    assert target_of(batch) == target


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (("x", "y", "weight"), ["new", "y", "weight"]),
        (("x",), ["new"]),
        ({"ids": 1}, "new"),
    ],
)
def test_with_input_replaces_the_first_item(batch, found):
    assert with_input(batch, "new") == found


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (("x", "y", "weight"), ["x", "new", "weight"]),
        (("x",), ["x", "new"]),
        ({"ids": 1}, [{"ids": 1}, "new"]),
    ],
)
def test_with_target_replaces_the_second_item_or_adds_it(batch, found):
    assert with_target(batch, "new") == found


# --- rows


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (torch.zeros(3, 2), 3),
        (torch.tensor(1.0), 1),
        ((torch.zeros(3), torch.zeros(3)), 3),
        ([(torch.zeros(4), torch.zeros(2)), torch.zeros(4)], 4),
        ({"ids": torch.zeros(5, 7)}, 5),
        (({"ids": torch.zeros(5, 7)}, torch.zeros(5)), 5),
        ("text", 1),
        ((), 1),
        ({}, 1),
    ],
)
def test_num_rows_is_that_of_the_first_tensor(batch, rows):
    assert num_rows(batch) == rows


# --- moving and detaching


def test_move_keeps_the_form_of_a_batch():
    x = torch.ones(2)
    batch: Any = OrderedDict(a=(x, [x]), b=Pair(x, "text"), c=None, d=Graph(x))
    moved = move(batch, META)
    assert type(moved) is OrderedDict
    kinds = [type(moved[name]) for name in "abcd"]
    assert kinds == [tuple, Pair, type(None), Graph]
    assert type(moved["a"][1]) is list
    tensors = moved["a"][0], moved["a"][1][0], moved["b"].left, moved["d"].nodes
    assert {tensor.device for tensor in tensors} == {META}
    assert (moved["b"].right, moved["d"].name) == ("text", "graph")
    assert {t.device.type for t in (batch["a"][0], batch["d"].nodes)} == {"cpu"}


def test_move_uses_an_objects_own_method():
    moved = move({"own": Own(), "class": Own}, META)
    assert moved["own"].device == META
    assert moved["class"] is Own


def test_move_of_a_packed_sequence_keeps_its_lengths_on_the_cpu():
    packed = pack_sequence([torch.ones(2), torch.ones(3)], enforce_sorted=False)
    moved = move((packed, None), META)[0]
    assert type(moved) is type(packed)
    assert (moved.data.device, moved.sorted_indices.device) == (META, META)
    assert moved.batch_sizes is packed.batch_sizes


def test_move_of_what_is_there_copies_no_tensor():
    x, packed = torch.ones(2), pack_sequence([torch.ones(2)])
    moved = move([x, packed, Graph(x)], torch.device("cpu"))
    assert moved[0] is x
    assert moved[1].data is packed.data
    assert moved[2].nodes is x


def test_detach_takes_tensors_off_the_graph_in_any_form():
    x = torch.ones(2, requires_grad=True) * 2
    packed = pack_sequence([x, x])
    found = detach({"a": [x], "b": Graph(x), "c": packed, "d": Pair(x, 1)})
    tensors = found["a"][0], found["b"].nodes, found["c"].data, found["d"].left
    assert not any(tensor.requires_grad for tensor in tensors)
    assert x.requires_grad
    assert packed.data.requires_grad


# --- joining outputs


def test_join_concatenates_tensors_in_the_form_of_one_output():
    def output(rows):
        x = torch.full((rows, 2), float(rows))
        return OrderedDict(a=x, b=Pair(x[:, 0], (x,)))

    found = join([output(2), output(1)])
    assert type(found) is OrderedDict
    assert found["a"].tolist() == [[2, 2], [2, 2], [1, 1]]
    assert found["b"].left.tolist() == [2, 2, 1]
    assert type(found["b"]) is Pair
    assert found["b"].right[0].shape == (3, 2)


@pytest.mark.parametrize(
    "outputs",
    [
        [],
        ["a", "b"],
        [torch.tensor(1.0), torch.tensor(2.0)],
        [[torch.ones(1)], [torch.ones(2)]],
        [pack_sequence([torch.ones(1)])],
    ],
    ids=["nothing", "text", "scalars", "lists", "packed"],
)
def test_join_of_other_outputs_is_a_list(outputs):
    found = join(outputs)
    assert type(found) is list
    assert all(a is b for a, b in zip(found, outputs, strict=True))
