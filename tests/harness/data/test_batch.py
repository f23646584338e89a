from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from harness.data.batch import (
    copy_by_value,
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

T = torch.zeros
IMAGES, SIZED_IMAGES = [T(3, 8, 8)] * 5, [T(3, n, 8) for n in range(1, 6)]
BOXES = [{"boxes": T(2, 4), "labels": T(2)}] * 5


class Opaque:
    """A batch object that tells nothing."""


class Sized:
    def __len__(self) -> int:
        return 6


class AttributeDict(dict):
    """Keys as attributes; what is missing is a KeyError."""

    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        (T(3, 2), 3),
        ((T(3), T(3)), 3),
        ([(T(4), T(2)), T(4)], 4),
        ({"ids": T(5, 7)}, 5),
        (({"ids": T(5, 7)}, T(5)), 5),
        # text first
        ({"text": ["a"] * 4, "x": T(4, 1)}, 4),
        (({"text": "one", "x": T(4, 1)}, None), 4),
        ((["a", "b"], T(2)), 2),
        # the target decides
        ((T(6, 2), T(12)), 12),
        ((T(3), torch.tensor(1.0)), 3),
        ((T(3, 2), {"a": T(3), "b": T(3, 5)}), 3),
        ((T(3, 2), (T(3), T(3, 5))), 3),
        ((T(3, 2), (480, 640)), 3),
        ((T(3, 2), Graph(T(3))), 3),
        # one item for each row
        ((IMAGES, T(5)), 5),
        ((IMAGES, [1, 2, 3, 4, 5]), 5),
        ((IMAGES, ["a", "b", "c", "d", "e"]), 5),
        ((IMAGES, BOXES), 5),
        ((tuple(IMAGES), tuple(BOXES)), 5),
        ((IMAGES, [Graph(T(2))] * 5), 5),
        ([[T(2), T(3), T(4)]], 3),
        ([[torch.tensor(1.0)] * 6], 6),
        (([["a"], ["b", "c"]], None), 2),
        # several inputs of one batch
        (([T(4, 2), T(4, 2)], None), 4),
        ((T(7, 2), torch.zeros(2, 9, dtype=torch.int64)), 2),
        (((T(7, 2), torch.zeros(2, 9, dtype=torch.int64)), None), 7),
        ((Pair(T(4), T(4)), None), 4),
        # other objects
        (np.zeros((3, 2)), 3),
        (Sized(), 6),
        ((pack_sequence([T(5), T(3)]), None), 2),
        (pack_sequence([T(5), T(3)]), 2),
        (AttributeDict(names=["a"] * 4, x=T(4)), 4),
        ((AttributeDict(x=T(4)), AttributeDict(y=T(3))), 3),
        (([AttributeDict(x=T(4))] * 5, None), 5),
        ((T(0, 3), T(0)), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_num_rows_finds_the_rows_of_a_batch(batch, rows):
    assert num_rows(input_of(batch), target_of(batch)) == rows


@pytest.mark.parametrize(
    "batch", ["text", (), {}, None, Opaque(), 3, torch.tensor(1.0), (Opaque(), "a")]
)
def test_num_rows_that_cannot_be_known_is_none(batch):
    assert num_rows(input_of(batch), target_of(batch)) is None


@pytest.mark.parametrize("input", [Opaque(), IMAGES, None])
def test_num_rows_asks_the_prediction_last(input):
    assert num_rows(input, None, {"loss": torch.tensor(1.0), "logits": T(5, 2)}) == 5
    assert num_rows(T(4, 2), None, T(7)) == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_num_rows_of_nested_tensors():
    for layout in (torch.strided, torch.jagged):
        nested = torch.nested.nested_tensor([T(2), T(3)], layout=layout)
        assert num_rows(nested) == 2


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


def test_move_takes_no_key_of_a_mapping_for_a_method():
    moved = move(AttributeDict(x=torch.ones(2)), META)
    assert type(moved) is AttributeDict
    assert moved["x"].device == META
    calls = AttributeDict(to=len, x=torch.ones(2))
    assert move(calls, META)["x"].device == META


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


# --- copies


def test_copy_by_value_shares_no_memory():
    x, array = torch.ones(2, requires_grad=True), np.ones(2)
    found = copy_by_value({"x": [x], "graph": Graph(x), "array": array, "text": "a"})
    with torch.no_grad():
        x.zero_()
    array[:] = 0
    assert found["x"][0].tolist() == found["graph"].nodes.tolist() == [1, 1]
    assert not found["x"][0].requires_grad
    assert found["array"].tolist() == [1, 1]
    assert found["text"] == "a"


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


def test_join_of_other_widths_is_a_list_by_batch():
    wide, narrow = torch.ones(2, 3), torch.ones(2, 1)
    assert join([wide, narrow]) == [wide, narrow]
    found = join([{"a": wide, "b": wide}, {"a": wide, "b": narrow}])
    assert found["a"].shape == (4, 3)
    assert [item.shape for item in found["b"]] == [(2, 3), (2, 1)]
    pair = join([(wide, wide), (narrow, wide)])
    assert [item.shape for item in pair[0]] == [(2, 3), (2, 1)]
    assert pair[1].shape == (4, 3)


def test_join_of_outputs_with_rows_in_the_second_dim_concatenates_there():
    whole = torch.arange(2 * 5 * 3).view(2, 5, 3)
    parts = [*whole.split([2, 2, 1], dim=1)]
    pairs = [(part[0], part) for part in parts]
    rows, states = join(pairs, [2, 2, 1])
    assert torch.equal(rows, whole[0])
    assert torch.equal(states, whole)
    assert join(parts[:2], [2, 2]).shape == (4, 2, 3)  # as if the first dim were rows
    assert join(parts, [None, None, None]) == parts


def test_join_of_other_forms_is_a_list_by_batch():
    one = torch.ones(2)
    for outputs in ([one, {"a": one}], [{"a": one}, {"b": one}], [(one,), (one, one)]):
        assert join(outputs) is not outputs
        assert len(join(outputs)) == 2
        assert type(join(outputs)) is list


class Moved(Tensor):
    """Tells how it is moved, and stays where it is: there may be no such device."""

    how: ClassVar[list[object]] = []

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is Tensor.to:
            cls.how.append((kwargs or {}).get("non_blocking", False))
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def test_only_cuda_may_still_be_copying_after_a_move() -> None:
    batch = torch.ones(2).as_subclass(Moved)
    Moved.how.clear()
    for device in ("cuda:1", "mps", "meta"):
        move(batch, torch.device(device))
    move(torch.ones(2, device="meta").as_subclass(Moved), torch.device("cpu"))
    assert Moved.how == [True, False, False, False]
