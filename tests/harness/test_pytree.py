from __future__ import annotations

import gc
import inspect
import json
import math
import sys
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from harness.pytree import (
    DTYPES,
    cache_by_identity,
    flatten,
    is_installed,
    iter_tensors,
    map_tensors,
    named_leaves,
    restore,
)

VALUES: dict[str, Any] = {
    "none": None,
    "bools": [True, False],
    "numbers": [0, -1, 2**200, 0.1, -0.0, math.inf, -math.inf],
    "text": ["", "ä\n", "$tensor"],
    "bytes": b"\x00\xff",
    "tuples": (1, (2, [3])),
    "keys": {1: "a", (2, 3): "b", None: "c", "$float": "d"},
    "one dollar": {"$float": 1},
    "ordered": OrderedDict(b=1, a=2),
    "kinds": [
        deque([1, 2], maxlen=3),
        {4, 5},
        frozenset({6}),
        Counter(a=2),
        defaultdict(list, {1: [2]}),
    ],
    "nested": {"a": {"b": [{"c": None}]}},
}


def written(tree: Any) -> Any:
    """Through JSON and back."""
    plan, tensors = flatten(tree)
    return restore(json.loads(json.dumps(plan, allow_nan=False)), tensors)


@pytest.mark.parametrize("name", VALUES)
def test_restore_of_plain_values_gives_them_back(name: str) -> None:
    found = written(VALUES[name])
    assert found == VALUES[name]
    assert repr(found) == repr(VALUES[name])


def test_restore_of_nan_is_nan() -> None:
    assert math.isnan(written(math.nan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_restore_of_tensors_keeps_dtype_shape_and_values(dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype)
    found = written([tensor, tensor[0, 0]])
    assert found[0].dtype == dtype
    assert torch.equal(found[0].double(), tensor.double())
    assert found[1].shape == ()


def test_restore_of_a_tensor_keeps_the_order_of_its_dims_in_memory() -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    found = written(tensor)
    assert found.stride() == tensor.stride()
    assert torch.equal(found, tensor)


BASE = torch.arange(24.0)
COMPLEX = torch.randn(4, dtype=torch.complex64)
SHARED: dict[str, list[torch.Tensor]] = {
    "same": [BASE, BASE, BASE.detach()],
    "view": [BASE, BASE[3:9]],
    "view first": [BASE[3:9], BASE[2:20].view(3, 6), BASE],
    "overlap": [BASE[2:6], BASE[4:9]],
    "transposed": [BASE.view(4, 6).t(), BASE.view(4, 6)],
    "channels last": [
        BASE.view(1, 2, 3, 4).to(memory_format=torch.channels_last).expand(2, 2, 3, 4)
    ],
    "steps": [BASE[::2], BASE[1::2]],
    "expanded": [torch.ones(3, 1).expand(3, 50), torch.ones(()).expand(7)],
    "expanded views": [BASE[:1].expand(9), BASE[0], BASE],
    "scalar of it": [BASE[5], BASE],
    "complex": [COMPLEX, COMPLEX[1:3]],
    "same view": [BASE[4:8], BASE[4:8]],
    "same column": [BASE.view(4, 6)[:, 1], BASE.view(4, 6)[:, 1]],
}


@pytest.mark.parametrize("name", SHARED)
def test_restore_of_tensors_that_share_memory_lets_them_share_it(name: str) -> None:
    tensors = SHARED[name]
    plan, flat = flatten({"a": tensors})
    copies = {
        key: torch.empty(t.shape, dtype=t.dtype).copy_(t) for key, t in flat.items()
    }
    found = restore(json.loads(json.dumps(plan)), copies)["a"]
    for one, two in zip(tensors, found, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
        assert one.stride() == two.stride() or name == "same column"
    storages = [
        [tensor.untyped_storage().data_ptr() for tensor in of]
        for of in (tensors, found)
    ]
    shared = [[one == two for one in own for two in own] for own in storages]
    assert shared[0] == shared[1]
    assert sum(t.numel() for t in flat.values()) <= 24


def test_restore_of_tensors_that_lie_apart_in_one_memory_copies_them_alone() -> None:
    pool = torch.arange(1000.0).view(10, 100)
    tensors = [pool[:, 3], pool[:, 7], pool[5, :2], pool.view(-1)[:0]]
    plan, flat = flatten(tensors)
    assert sum(tensor.numel() for tensor in flat.values()) == 22
    for one, two in zip(tensors, restore(plan, flat), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize(
    "form", [([3], [1], 2), ([2], [4], 0), ([1], [1], -1), ([2], [-1], 0), ([1], [], 0)]
)
def test_restore_of_a_view_beyond_its_memory_is_refused(form: Any) -> None:
    memory = torch.arange(8.0)[2:6]
    with pytest.raises(ValueError, match=r"state: expected a view of 4 values|zip"):
        restore({"$view": ["x", *form]}, {"x": memory})


def test_restore_of_complex_tensors_gives_them_back() -> None:
    tensor = torch.randn(3, dtype=torch.complex64)
    assert torch.equal(written(tensor), tensor)


def test_restore_of_numpy_values_gives_arrays_and_numbers() -> None:
    found = written({"a": np.arange(3.0), "b": np.float32(0.5), "c": np.int64(7)})
    assert isinstance(found["a"], np.ndarray)
    assert found["a"].tolist() == [0.0, 1.0, 2.0]
    assert (found["b"], found["c"]) == (0.5, 7)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"a": [range(2)]}, r"state/a/0: expected numbers, strings, tensors"),
        ({"f": print}, r"state/f: expected numbers, strings, tensors"),
        (torch.eye(2).to_mkldnn(), "state: expected a dense tensor of a common dtype"),
    ],
)
def test_flatten_of_anything_else_names_its_path(value: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        flatten(value)


@pytest.mark.parametrize(
    "plan",
    [
        {"$float": "1"},
        {"$float": 1.0},
        {"$tensor": "x"},
        {"$array": "x"},
        {"$permuted": ["x", [0]]},
        {"$view": ["x", [1], [1], 0]},
        {"$complex": {"$tensor": "x"}},
        {"$bytes": 1},
        {"$dict": {}},
        {"$what": 1},
        {"$tuple": 3},
        {"$kind": ["eval", None, []]},
    ],
    ids=str,
)
def test_restore_of_an_unknown_form_is_refused(plan: Any) -> None:
    with pytest.raises(ValueError, match="expected a known form"):
        restore(plan, {})


# --- containers


class Output(OrderedDict):  # type: ignore[type-arg]
    """As transformers' ModelOutput: its keys are attributes too."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Encoding(UserDict):  # type: ignore[type-arg]
    """As transformers' BatchEncoding: attributes are looked up among the items."""

    def __init__(self, data: Any, n_sequences: int = 1) -> None:
        super().__init__(data)
        self.n_sequences = n_sequences

    def __getattr__(self, name: str) -> Any:
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


class Shared(Mapping):  # type: ignore[type-arg]
    """A mapping that a copy would share its items with."""

    def __init__(self, items: dict[str, Any]) -> None:
        self._items = items

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class Boxes(list):  # type: ignore[type-arg]
    """A list with an attribute."""

    size = (0, 0)


@dataclass(frozen=True, slots=True)
class Point:
    x: Any
    label: str
    hidden: int = field(init=False, default=3)


Pair = namedtuple("Pair", "left right")

CONTAINERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda x: [x, "text"],
    "tuple": lambda x: (x, 1),
    "named tuple": lambda x: Pair(x, None),
    "return type": lambda x: torch.return_types.max((x, x)),
    "dict": lambda x: {"a": x},
    "ordered dict": lambda x: OrderedDict(a=x),
    "default dict": lambda x: defaultdict(list, a=x),
    "model output": lambda x: Output(a=x),
    "encoding": lambda x: Encoding({"a": x}, n_sequences=2),
    "data class": lambda x: Point(x, "label"),
    "own list": lambda x: Boxes([x]),
    "packed": lambda x: pack_sequence([x, x[:1]]),
    "nested": lambda x: {"a": [(x, Point([x], "label"))]},
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_map_tensors_keeps_the_type_and_leaves_the_value_alone(name: str) -> None:
    x = torch.arange(2.0)
    value = CONTAINERS[name](x)
    before = [tensor.clone() for tensor in iter_tensors(value)]
    found = map_tensors(value, lambda tensor: tensor + 1)
    assert type(found) is type(value)
    after = list(iter_tensors(found))
    assert len(after) == len(before) > 0
    for now, then, kept in zip(after, before, iter_tensors(value), strict=True):
        assert torch.equal(now, then + 1)
        assert torch.equal(kept, then)


def test_map_tensors_keeps_what_a_container_has_beside_its_items() -> None:
    x = torch.ones(1)
    boxes = Boxes([x])
    boxes.size = (2, 3)
    double = [x, Encoding({"a": x}, 2), Output(a=x), Point(x, "p"), boxes]
    _, encoding, output, point, found = map_tensors(double, lambda t: t * 2)
    assert encoding.n_sequences == 2
    assert encoding["a"].item() == 2
    assert output.a is output["a"]
    assert (point.x.item(), point.label, point.hidden) == (2, "p", 3)
    assert found.size == (2, 3)


def test_map_tensors_of_an_unknown_mapping_is_a_dict() -> None:
    value = Shared({"a": torch.ones(1)})
    found = map_tensors(value, lambda t: t * 2)
    assert found == {"a": torch.tensor([2.0])}
    assert value["a"].item() == 1


@pytest.mark.parametrize("value", ["text", None, 3, b"x", range(2), Point, {1}, object])
def test_map_tensors_leaves_other_values_as_they_are(value: Any) -> None:
    assert map_tensors(value, torch.neg) is value


def test_map_tensors_keeps_a_data_class_in_which_nothing_changes() -> None:
    point = Point(torch.ones(1), "p")
    assert map_tensors(point, lambda tensor: tensor) is point


def test_iter_tensors_goes_in_order() -> None:
    a, b, c = (torch.tensor(float(n)) for n in range(3))
    found = list(iter_tensors({"first": [a, "text"], "then": Point(b, ""), "last": c}))
    assert [tensor.item() for tensor in found] == [0, 1, 2]


def test_named_leaves_joins_names_by_slashes() -> None:
    value = {"loss": 1, "f1": {"0": 2, "1": {"x": [3]}}, "none": {}}
    found = [("loss", 1), ("f1/0", 2), ("f1/1/x", [3])]
    assert list(named_leaves(value)) == found


def test_restore_sparse_tensor_is_the_same():
    rows, values = [[2, 0, 2]], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    sparse = torch.sparse_coo_tensor(rows, values, (4, 2), check_invariants=True)
    for value in (sparse, sparse.coalesce()):
        found = restore(*flatten({"grad": value}))["grad"]
        assert found.is_coalesced() == value.is_coalesced()
        assert torch.equal(found._indices(), value._indices())
        assert torch.equal(found._values(), value._values())


@pytest.mark.parametrize(
    ("name", "file", "expected"),
    [
        ("odd_of_user", "/home/me/.local/lib/python3/site-packages/odd.py", True),
        ("odd_of_debian", "/usr/lib/python3/dist-packages/odd/__init__.py", True),
        ("odd_of_project", "/home/me/project/odd.py", False),
    ],
)
def test_installed_modules_are_known_by_their_folders(
    monkeypatch: pytest.MonkeyPatch, name: str, file: str, expected: bool
) -> None:
    module = ModuleType(name)
    module.__file__ = file
    monkeypatch.setitem(sys.modules, name, module)
    assert is_installed(name) is expected
    assert is_installed(json.__name__)
    assert is_installed(None)  # of a generated function


def test_cache_by_identity_takes_what_has_no_hash_and_lets_it_die() -> None:
    class Unhashable(type):
        __hash__ = None  # type: ignore[assignment]

    calls = []

    @cache_by_identity
    def name(thing: Any) -> str:
        calls.append(1)
        return str(thing)

    kind = Unhashable("Kind", (), {})
    assert name(kind) == name(kind)
    assert len(calls) == 1
    assert name(None) == name(None) == "None"  # not cached: it has no weak reference
    gone = weakref.ref(kind)
    del kind
    gc.collect()
    assert gone() is None
    assert [*get_closure(name)["found"]] == []


def get_closure(function: Any) -> dict[str, Any]:
    return dict(inspect.getclosurevars(function).nonlocals)
