from __future__ import annotations

import enum
import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.schema import (
    DEFERRED,
    KINDS,
    MAX_ELEMENTS,
    fetch_values,
    find_copies,
    finish_leaf,
    flatten_value,
    parse_value,
)

PLACE = "Run.log('metrics', 'train')"

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(codec="utf-8"))
)
json_like = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(codec="utf-8"))
            | st.sampled_from(["$numberDouble", "$literal"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


class Colour(enum.IntEnum):
    RED = 1


class Word(enum.StrEnum):
    ONE = "one"


def back(value):
    """What a value that becomes one row is read back as."""
    ((_, kind, number, payload),) = flatten_value(value, PLACE)
    name = KINDS[kind]
    return parse_value(
        name, number if name in ("float", "int", "bool") else None, payload
    )


@given(scalars)
def test_flatten_value_scalar_comes_back_as_it_went_in(value):
    found = back(value)
    assert type(found) is type(value)
    assert found == value
    if isinstance(value, float):
        assert math.copysign(1, found) == math.copysign(1, value)


@given(st.lists(json_like, max_size=4))
def test_flatten_value_list_comes_back_as_it_went_in(value):
    assert back(value) == value


def test_flatten_value_list_with_nonfinite_numbers_is_extended_json():
    value = [math.nan, math.inf, -math.inf, -0.0, 5e-324]
    ((_, _, _, payload),) = flatten_value(value, PLACE)
    assert json.loads(payload)[:3] == [
        {"$numberDouble": "NaN"},
        {"$numberDouble": "Infinity"},
        {"$numberDouble": "-Infinity"},
    ]
    found = back(value)
    assert math.isnan(found[0])
    assert found[1:3] == [math.inf, -math.inf]
    assert math.copysign(1, found[3]) == -1
    assert found[4] == 5e-324


def test_flatten_value_users_own_notation_is_not_taken_for_ours():
    value = [{"$numberDouble": "NaN"}, {"$literal": {"$numberDouble": 5}}]
    assert back(value) == value


def test_flatten_value_dictionary_gives_one_row_per_leaf():
    value = {"loss": 0.5, "acc": {"top1": 1, "top5": True}, "note": "x", "none": None}
    found = [
        (name, KINDS[kind], number)
        for name, kind, number, _ in flatten_value(value, "")
    ]
    assert found == [
        ("loss", "float", 0.5),
        ("acc/top1", "int", 1.0),
        ("acc/top5", "bool", 1.0),
        ("note", "str", 0.0),
        ("none", "none", 0.0),
    ]


@pytest.mark.parametrize("value", [{}, {"a": {}}])
def test_flatten_value_empty_dictionary_is_a_row_itself(value):
    ((_, kind, _, payload),) = flatten_value(value, PLACE)
    assert (KINDS[kind], payload) == ("json", "{}")


@pytest.mark.parametrize(
    ("value", "number", "digits"),
    [
        (2**53, 2.0**53, None),
        (2**53 + 1, 2.0**53, "9007199254740993"),
        (-(2**70), -(2.0**70), str(-(2**70))),
        (10**400, math.inf, str(10**400)),
        (-(10**400), -math.inf, str(-(10**400))),
    ],
)
def test_flatten_value_large_integer_keeps_its_digits(value, number, digits):
    assert flatten_value(value, PLACE) == [("", KINDS.index("int"), number, digits)]


@pytest.mark.parametrize(
    ("value", "kind", "plain"),
    [
        (np.float32(0.5), "float", 0.5),
        (np.float64(0.5), "float", 0.5),
        (np.int64(7), "int", 7),
        (np.bool_(True), "bool", True),
        (np.array(1.5), "float", 1.5),
        (np.array([1.0, math.inf]), "array", [1.0, math.inf]),
        (np.array([[1, 2], [3, 4]]), "array", [[1, 2], [3, 4]]),
        (np.str_("x"), "str", "x"),
        ((1, np.float64(2.5)), "json", [1, 2.5]),
        (Colour.RED, "int", 1),
        (Word.ONE, "str", "one"),
    ],
)
def test_flatten_value_numpy_and_subclasses_are_what_they_hold(value, kind, plain):
    ((_, code, _, _),) = flatten_value(value, PLACE)
    assert KINDS[code] == kind
    assert back(value) == plain


def test_flatten_value_array_is_copied_at_once():
    array = np.ones(3)
    found = flatten_value(array, PLACE)
    array += 1
    assert found[0][3] == "[1.0,1.0,1.0]"


def test_flatten_value_lone_surrogate_in_a_string_comes_back():
    assert back("\ud800x") == "\ud800x"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (object(), r"at value\."),
        ({"a": {"b": object()}}, r"at value\['a'\]\['b'\]\."),
        ({"a": [1, {"b": 1j}]}, r"at value\['a'\]\[1\]\['b'\]\."),
        (np.array([1j]), r"at value\[0\]\."),
        (np.datetime64("2026-11-22"), r"at value\."),
        (b"bytes", r"at value\."),
        ({1, 2}, r"at value\."),
        (np.longdouble(1), r"at value\."),
    ],
)
def test_flatten_value_unloggable_value_names_its_path(value, path):
    with pytest.raises(
        TypeError, match=r"Run\.log\('metrics', 'train'\): expected a number.*" + path
    ):
        flatten_value(value, PLACE)


def test_flatten_value_key_that_is_no_string_is_refused():
    with pytest.raises(TypeError, match=r"expected a string as key in value\['a'\]"):
        flatten_value({"a": {1: 0.5}}, PLACE)
    with pytest.raises(TypeError, match=r"expected a string as key in value\[0\]"):
        flatten_value([{1: 0.5}], PLACE)


def test_flatten_value_name_that_utf8_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"expected valid Unicode as key in value"):
        flatten_value({"\udc00": 0.5}, PLACE)


def test_flatten_value_large_array_is_sent_to_artifacts():
    assert flatten_value(np.zeros(MAX_ELEMENTS), PLACE)
    with pytest.raises(ValueError, match=r"at most 1024 elements.*use log_artifact"):
        flatten_value(np.zeros(MAX_ELEMENTS + 1), PLACE)


def test_flatten_value_large_text_is_sent_to_artifacts():
    with pytest.raises(ValueError, match=r"at most 1048576 bytes.*use log_artifact"):
        flatten_value("x" * (1 << 20), PLACE)


def test_flatten_value_value_that_holds_itself_is_refused():
    value: dict = {}
    value["a"] = value
    with pytest.raises(ValueError, match=r"at most 100 levels of nesting"):
        flatten_value(value, PLACE)
    items: list = []
    items.append(items)
    with pytest.raises(ValueError, match=r"at most 100 levels of nesting"):
        flatten_value(items, PLACE)


def test_flatten_value_integer_too_large_for_decimal_is_refused():
    with pytest.raises(
        ValueError, match=r"expected an integer that Python can convert"
    ):
        flatten_value(10**5000, PLACE)


def test_flatten_value_tensor_is_left_for_later():
    import torch  # noqa: PLC0415

    value: dict = {"a": torch.tensor(1.5), "b": [torch.tensor([1, 2]), 3]}
    found = flatten_value(value, PLACE)
    assert [(name, kind) for name, kind, _, _ in found] == [
        ("a", DEFERRED),
        ("b", DEFERRED),
    ]
    value["a"].add_(1)
    values = fetch_values(copy for leaf in found for copy in find_copies(leaf[3]))
    done = [finish_leaf(name, rest, values, PLACE) for name, _, _, rest in found]
    assert [(KINDS[kind], number) for _, kind, number, _ in done] == [
        ("float", 1.5),
        ("json", 0.0),
    ]
    assert done[1][3] == "[[1,2],3]"


def test_flatten_value_tensor_of_each_dtype_comes_back_exactly():
    import torch  # noqa: PLC0415

    values = {
        "bf16": torch.tensor(1 / 3, dtype=torch.bfloat16),
        "f16": torch.tensor(1 / 3, dtype=torch.float16),
        "f64": torch.tensor(1 / 3, dtype=torch.float64),
        "i64": torch.tensor(2**60 + 1),
        "bool": torch.tensor(True),
        "nan": torch.tensor(math.nan),
        "matrix": torch.tensor([[0.5, math.inf]]),
    }
    found = flatten_value(values, PLACE)
    read = fetch_values(copy for leaf in found for copy in find_copies(leaf[3]))
    done = {}
    for name, _, _, rest in found:
        _, kind, number, payload = finish_leaf(name, rest, read, PLACE)
        done[name] = parse_value(KINDS[kind], number, payload)
    assert math.isnan(done.pop("nan"))
    assert done == {
        name: value.tolist() for name, value in values.items() if name != "nan"
    }


def test_flatten_value_complex_or_large_tensor_is_refused():
    import torch  # noqa: PLC0415

    with pytest.raises(TypeError, match=r"expected a number"):
        flatten_value(torch.tensor(1j), PLACE)
    with pytest.raises(ValueError, match=r"at most 1024 elements"):
        flatten_value([torch.zeros(2000)], PLACE)
