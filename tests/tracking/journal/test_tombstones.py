from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from tracking.journal.tombstones import Tombstones
from tracking.schema import SCHEMA


def table_of(rows):
    """Rows given as (kind, index or position), one ``seq`` after the other."""
    columns = {name: [] for name in SCHEMA.names}
    for seq, (kind, number) in enumerate(rows):
        is_place = kind in ("rewind", "fit")
        row = dict.fromkeys(SCHEMA.names)
        row |= {"seq": seq, "rank": 0, "time": seq, "kind": kind, "name": "x"}
        row |= {"what": "" if is_place else "metrics", "set": "train"}
        row |= {"value": float(number)} if is_place else {"index": number, "value": 0.0}
        for name, value in row.items():
            columns[name].append(value)
    return pa.table(columns, schema=SCHEMA)


def replay(rows):
    """Live rows, and the fit of every row, by keeping the whole state after each row."""
    after = [([], 1)]  # live rows, and the fit that goes on, after 0, 1, ... rows
    fits = []
    for seq, (kind, number) in enumerate(rows):
        now, fit = list(after[-1][0]), after[-1][1]
        if kind == "rewind":
            now, fit = after[max(-1, min(number, seq - 1)) + 1]
        elif kind == "fit":
            fit = number if number > 0 else fit
        elif kind == "overwrite":
            now = [old for old in now if (rows[old][1], fits[old]) != (number, fit)]
        else:
            now = [*now, seq]
        after.append((now, fit))
        fits.append(fit)
    return after[-1][0], fits


def find_live(rows, cuts=()):
    tombstones = Tombstones()
    table = table_of(rows)
    start = 0
    for end in [*sorted(cuts), len(rows)]:
        tombstones.add(table.slice(start, end - start))
        start = max(start, end)
    live = np.flatnonzero(tombstones.mask_live(table)).tolist()
    return live, tombstones.fits.find(table["seq"].to_numpy()).tolist()


def test_rewind_supersedes_what_came_after_the_position():
    rows = [("float", 1), ("float", 2), ("float", 3), ("rewind", 0), ("float", 2)]
    assert find_live(rows)[0] == [0, 4]


def test_overwrite_supersedes_its_index_alone():
    rows = [("float", 1), ("float", 2), ("overwrite", 1), ("float", 1)]
    assert find_live(rows)[0] == [1, 3]


def test_rewind_undoes_the_overwrites_after_its_position():
    rows = [("float", 1), ("overwrite", 1), ("float", 1), ("rewind", 0)]
    assert find_live(rows)[0] == [0]


def test_rewind_into_an_abandoned_range_brings_it_back():
    rows = [("float", n) for n in range(5)] + [("rewind", 1), ("float", 9)]
    assert find_live([*rows, ("rewind", 3)])[0] == [0, 1, 2, 3]


def test_overwrite_leaves_its_index_in_other_fits():
    rows = [("float", 1), ("fit", 2), ("float", 1), ("overwrite", 1), ("float", 1)]
    assert find_live(rows) == ([0, 4], [1, 2, 2, 2, 2])


def test_rewind_goes_back_to_the_fit_at_its_position():
    rows = [("float", 1), ("fit", 2), ("float", 1), ("fit", 1), ("float", 2)]
    assert find_live([*rows, ("rewind", 2), ("float", 2)]) == (
        [0, 2, 6],
        [1, 2, 2, 1, 1, 2, 2],
    )
    assert find_live([*rows, ("rewind", 0), ("float", 2)])[1][-1] == 1


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["float", "float", "overwrite", "rewind", "fit"]),
            st.integers(-1, 12),
        ),
        max_size=14,
    ),
    st.lists(st.integers(0, 14), max_size=3),
)
def test_live_rows_are_those_of_a_replay(rows, cuts):
    cuts = [min(cut, len(rows)) for cut in cuts]
    assert find_live(rows, cuts) == replay(rows)
