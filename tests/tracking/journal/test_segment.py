from __future__ import annotations

import struct

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tracking.tables import floats, same
from tracking.journal import segment
from tracking.journal.segment import CAPACITY
from tracking.schema import SCHEMA

cheap = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def block_table(num_rows):
    """Rows as a block may hold them, in all their variety."""
    return pa.table(
        {
            "seq": pa.array([i + i // 7 for i in range(num_rows)]),
            "rank": pa.array([3] * num_rows, pa.int32()),
            "time": pa.array([1_700_000_000_000_000 + i * i for i in range(num_rows)]),
            "what": ["metrics"] * num_rows,
            "set": [("train", "valid")[i % 2] for i in range(num_rows)],
            "name": [f"n{i % 300}" for i in range(num_rows)],
            "index": pa.array(
                [i if i % 3 else None for i in range(num_rows)], pa.int64()
            ),
            "epoch": pa.array([None] * num_rows, pa.int32()),
            "step": pa.array([5] * num_rows, pa.int64()),
            "value": pa.array([i / 3 if i % 5 else None for i in range(num_rows)]),
            "payload": pa.array([None if i % 5 else f'"{i}"' for i in range(num_rows)]),
            "kind": ["float" if i % 5 else "str" for i in range(num_rows)],
        }
    ).cast(SCHEMA)


@pytest.fixture(scope="module")
def sealed_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("sealed") / "3" / "000000.arrow"
    path.parent.mkdir()
    table = block_table(10_000).combine_chunks()
    segment.write_segment(table, path)
    return path.read_bytes(), table


def test_sealed_block_is_an_arrow_file_for_anybody(sealed_file, tmp_path):
    data, table = sealed_file
    stored = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    assert stored.num_rows == 10_000
    assert stored["value"].equals(table["value"])
    assert stored["name"].to_pylist() == table["name"].to_pylist()
    # Leaving out what is constant is what makes it small.
    assert "rank" not in stored.column_names
    assert "step" not in stored.column_names


@cheap
@given(data=st.data())
def test_sealed_block_cut_at_any_byte_is_read_up_to_it(data, sealed_file, tmp_path):
    whole, table = sealed_file
    cut = data.draw(st.integers(0, len(whole) - 1))
    path = tmp_path / "000000.arrow"
    path.write_bytes(whole[:cut])
    found, damage = segment.read_segment(path)
    assert same(found, table.slice(0, found.num_rows))
    assert found.num_rows in (0, 4096, 8192, 10_000)
    (only,) = damage
    assert only.offset <= cut
    assert only.rows_lost in (10_000 - found.num_rows, CAPACITY)


@cheap
@given(data=st.data())
def test_sealed_block_changed_at_any_byte_gives_no_false_row(
    data, sealed_file, tmp_path
):
    whole, table = sealed_file
    at = data.draw(st.integers(0, len(whole) - 1))
    byte = data.draw(st.integers(1, 255))
    path = tmp_path / "000000.arrow"
    path.write_bytes(whole[:at] + bytes([whole[at] ^ byte]) + whole[at + 1 :])
    found, damage = segment.read_segment(path)
    assert same(found, table.slice(0, found.num_rows))
    assert bool(damage) or found.num_rows == 10_000
    assert sum(d.rows_lost for d in damage) >= 10_000 - found.num_rows


def test_sealed_block_with_garbage_after_it_is_whole(sealed_file, tmp_path):
    whole, table = sealed_file
    path = tmp_path / "000000.arrow"
    path.write_bytes(whole + b"garbage")
    found, damage = segment.read_segment(path)
    assert same(found, table)
    assert [(d.rows_lost, d.reason) for d in damage] == [
        (0, "the end of the file is damaged")
    ]


def test_sealed_block_of_a_later_format_is_refused(tmp_path):
    columns, notes = segment._encode(block_table(3))
    notes |= {"format": 2, "rank": 3, "num_rows": 3, "damage": []}
    data = segment._build_file(pa.table(columns), notes)
    (tmp_path / "000000.arrow").write_bytes(data)
    with pytest.raises(ValueError, match=r"expected format 1, got 2"):
        segment.read_segment(tmp_path / "000000.arrow")


counts = st.none() | st.integers(-(2**63) + 1, 2**63 - 1)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**62),
            counts,
            st.none() | st.integers(-(2**31) + 1, 2**31 - 1),
            st.none() | st.floats() | st.floats(width=32),
            st.text(st.characters(codec="utf-8"), max_size=3),
        ),
        max_size=20,
    )
)
def test_sealed_block_gives_back_every_bit(tmp_path_factory, found):
    count = len(found)
    table = pa.table(
        {
            "seq": pa.array(range(0, 3 * count, 3)),
            "rank": pa.array([0] * count, pa.int32()),
            "time": pa.array([row[0] for row in found], pa.int64()),
            "what": [row[4] for row in found],
            "set": ["s"] * count,
            "name": [row[4] for row in found][::-1],
            "index": pa.array([row[1] for row in found], pa.int64()),
            "epoch": pa.array([row[2] for row in found], pa.int32()),
            "step": pa.array([row[1] for row in found][::-1], pa.int64()),
            "value": pa.array([row[3] for row in found], pa.float64()),
            "payload": pa.array([row[4] or None for row in found], pa.string()),
            "kind": ["float"] * count,
        }
    ).cast(SCHEMA)
    path = tmp_path_factory.mktemp("bits") / "000000.arrow"
    segment.write_segment(table, path)
    again, damage = segment.read_segment(path)
    assert damage == []
    assert same(again.drop(["value"]), table.drop(["value"]))
    assert [bits(v) for v in floats(again)] == [bits(v) for v in floats(table)]
    assert segment.read_num_rows(path) == count


def bits(value):
    return None if value is None else struct.pack("<d", value)
