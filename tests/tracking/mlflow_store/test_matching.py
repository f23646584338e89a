from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracking.mlflow_store.matching import (
    RowMatcher,
    hash_rows,
    row_ids,
    unmatched_rows,
)

rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12)


def as_rows(side):
    return np.array(side, np.int64).reshape(-1, 2)


@given(rows, rows)
def test_unmatched_rows_are_the_difference_of_the_counts(left, right):
    found = unmatched_rows(as_rows(left), as_rows(right))
    counts = Counter(left), Counter(right)
    assert Counter(left[i] for i in found[0]) == counts[0] - counts[1]
    assert Counter(right[i] for i in found[1]) == counts[1] - counts[0]


@given(rows, rows, st.integers(1, 4))
def test_pages_are_matched_as_if_they_were_one(left, right, size):
    whole, paged = RowMatcher(as_rows(right)), RowMatcher(as_rows(right))
    pages = [left[i : i + size] for i in range(0, len(left), size)]
    found = [one for page in pages for one in paged.match(as_rows(page)).tolist()]
    assert found == whole.match(as_rows(left)).tolist()
    assert paged.find_unmatched().tolist() == whole.find_unmatched().tolist()


def test_rows_with_the_same_hash_are_different_rows():
    # The second column undoes what the first one did to the hash.
    hashes = hash_rows(as_rows([(1, 0), (2, 0)]), 0)
    first = hash_rows(np.array([[1], [2]]), 0)
    twin = (first[0] ^ first[1]).astype(np.int64)
    same = as_rows([(1, 0), (2, int(twin))])
    again = hash_rows(same, 0)
    assert again[0] == again[1] == hashes[0]
    matcher = RowMatcher(same)
    assert matcher.match(same[1:]).tolist() == [True]
    assert matcher.find_unmatched().tolist() == [0]
    assert RowMatcher(same[:1]).match(same[1:]).tolist() == [False]


def test_values_are_equal_as_in_a_database():
    values = [0.0, -0.0, math.nan, -math.nan, 1.0]
    table = pa.table({"key": ["a"] * 5, "step": [1] * 5, "value": values})
    found = row_ids(table, pa.array(["a"]), ["step", "value"])
    assert len(np.unique(found, axis=0)) == 3


@pytest.mark.parametrize("kind", [pa.string(), pa.dictionary(pa.int32(), pa.string())])
def test_unknown_key_becomes_a_negative_number(kind):
    chunks = [pa.array(keys).cast(kind) for keys in (["a", "b"], ["c", "b"])]
    table = pa.table({"key": pa.chunked_array(chunks), "step": [1, 1, 2, 3]})
    found = row_ids(table, pa.array(["c", "b"]), ["step"]).tolist()
    assert found == [[-1, 1], [1, 1], [0, 2], [1, 3]]
