"""Tables of any usual library become columns and rows."""

from __future__ import annotations

import datetime
import io
import json

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

from tracking.artifacts.tables import encode_table, make_table


def table(value):
    made = make_table(
        value, "test", mask=lambda name, cell: cell, save_picture=lambda cell: "picture"
    )
    return made["columns"], made["data"]


COLUMNS = {"a": [1, 2], "b": ["x", "y"]}
EXPECTED = (["a", "b"], [[1, "x"], [2, "y"]])


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (COLUMNS, EXPECTED),
        ({"a": torch.tensor([1, 2]), "b": np.array(["x", "y"])}, EXPECTED),
        ([{"a": 1, "b": "x"}, {"b": "y", "a": 2}], EXPECTED),
        (pd.DataFrame(COLUMNS), EXPECTED),
        (pa.table(COLUMNS), EXPECTED),
        ({"a": [1, 2], "b": "same"}, (["a", "b"], [[1, "same"], [2, "same"]])),
        ({"loss": 0.5, "k": None}, (["loss", "k"], [[0.5, None]])),
        ([{"a": 1}, {"b": 2}], (["a", "b"], [[1, None], [None, 2]])),
        ([[1, 2], (3, 4)], (["0", "1"], [[1, 2], [3, 4]])),
        (torch.eye(2), (["0", "1"], [[1.0, 0.0], [0.0, 1.0]])),
        (pd.DataFrame({"n": [7]}, index=["cat"]), (["index", "n"], [["cat", 7]])),
        (pd.DataFrame([[1, 2]], columns=["a", "a"]), (["a", "a#2"], [[1, 2]])),
        ({}, ([], [])),
        ([], ([], [])),
        ({"a": []}, (["a"], [])),
    ],
)
def test_table_of_a_usual_form_is_read(value, expected):
    assert table(value) == expected


def test_cells_become_what_json_has():
    cells = [
        np.float32(0.5),
        float("nan"),
        float("-inf"),
        2**70,
        torch.tensor(3),
        np.array([1, 2]),
        pd.NaT,
        pd.NA,
        datetime.date(2026, 1, 2),
        {"k": (1, None)},
        "NaT",
        "x" * 10_001,
        np.zeros((4, 4, 3), np.uint8),
    ]
    _, rows = table({"cells": cells})
    assert [cell for (cell,) in rows] == [
        0.5,
        None,
        "-inf",
        2**70,
        3,
        [1, 2],
        None,
        None,
        "2026-01-02",
        {"k": [1, None]},
        "NaT",
        "x" * 10_000 + "...",
        "picture",
    ]


def test_file_is_read_by_pandas():
    columns, data = table({"a": [1.5, float("nan")], "b": ["\ud800", "é"]})
    file = encode_table({"columns": columns, "data": data})
    assert json.loads(file)["data"][1] == [None, "é"]
    frame = pd.read_json(io.BytesIO(file), orient="split")
    assert frame["a"].tolist()[0] == 1.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, "expected a table, got int"),
        ("a,b", "expected a table, got str"),
        ([1, 2], "expected a table, got list"),
        (torch.zeros(3), "expected a table, got Tensor"),
        ({"a": [1], "b": [1, 2]}, r"columns of one length, got \{'a': 1, 'b': 2\}"),
        ([[1], [1, 2]], "rows of 1 and of 2 cells"),
        (np.zeros((600, 600)), "at most 250000 cells, got 360000"),
        ({"p": [np.zeros((1, 1, 3), np.uint8)] * 1001}, "at most 1000 images"),
    ],
)
def test_what_is_no_table_is_refused(value, message):
    with pytest.raises((TypeError, ValueError), match=message):
        table(value)
