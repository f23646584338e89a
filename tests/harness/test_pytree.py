from __future__ import annotations

import json
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch

from harness.pytree import DTYPES, flatten, restore

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
    assert repr(found) == repr(
        dict(VALUES[name]) if isinstance(VALUES[name], dict) else VALUES[name]
    )


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
        ({"a": [{1, 2}]}, r"state/a/0: expected numbers, strings, tensors"),
        ({"f": print}, r"state/f: expected numbers, strings, tensors"),
        (torch.eye(2).to_sparse(), "state: expected a dense tensor of a common dtype"),
    ],
)
def test_flatten_of_anything_else_names_its_path(value: Any, match: str) -> None:
    with pytest.raises(TypeError, match=match):
        flatten(value)


@pytest.mark.parametrize(
    "plan", [{"$float": "1"}, {"$tensor": "x"}, {"$what": 1}, {"$tuple": 3}]
)
def test_restore_of_an_unknown_form_is_refused(plan: Any) -> None:
    with pytest.raises(ValueError, match="expected a known form"):
        restore(plan, {})
