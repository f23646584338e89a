from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tracking.delivery.reconcile import row_ids, unmatched_rows

rows = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2)), max_size=12)


@given(rows, rows)
def test_unmatched_rows_are_the_difference_of_the_counts(left, right):
    tables = [np.array(side, np.int64).reshape(-1, 2) for side in (left, right)]
    found = unmatched_rows(*tables)
    counts = Counter(left), Counter(right)
    assert Counter(left[i] for i in found[0]) == counts[0] - counts[1]
    assert Counter(right[i] for i in found[1]) == counts[1] - counts[0]


def test_values_are_the_same_as_in_a_database():
    values = [0.0, -0.0, math.nan, -math.nan, 1.0]
    table = pa.table({"key": ["a"] * 5, "step": [1] * 5, "value": values})
    found = row_ids(table, ["a"], ["step", "value"])
    assert len(np.unique(found, axis=0)) == 3


def test_unknown_key_is_told_by_a_negative_number():
    table = pa.table({"key": ["a", "b"], "step": [1, 1]})
    assert row_ids(table, ["b"], ["step"]).tolist() == [[-1, 1], [0, 1]]
