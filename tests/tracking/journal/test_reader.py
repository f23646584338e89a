from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.tracking.tables import floats, same
from tracking.journal import row_format
from tracking.journal.reader import JournalReader, get_segment_path, read_records
from tracking.journal.row_format import ROW_BYTES
from tracking.journal.segment import CAPACITY, Damage, write_segment
from tracking.journal.writer import Journal
from tracking.schema import FLOAT, flatten_value


@pytest.fixture
def rank_dir(tmp_path):
    return tmp_path / "a-run" / "records" / "0"


def put(journal, value, **counts):
    journal.write("metrics", "train", flatten_value(value, "test"), **counts)


class Torn(NamedTuple):
    """Bytes of an open block's files, and its rows."""

    rows: bytes
    text: bytes
    table: pa.Table

    def __repr__(self):
        return "Torn()"


def open_files(journal):
    """Copies of the bytes of the open block, as a killed process leaves them."""
    rank_dir, number = journal.rank_dir, journal.block.number
    return [path.read_bytes() for path in row_format.get_block_paths(rank_dir, number)]


@pytest.fixture(scope="module")
def torn(tmp_path_factory):
    """The two files of an open block with 100 floats and 20 strings."""
    journal = Journal(tmp_path_factory.mktemp("torn") / "0")
    for i in range(100):
        put(journal, float(i))
        if i % 5 == 0:
            put(journal, {"text": f"\xff wörd {i}"})
    files = open_files(journal)
    table = read_records(journal.rank_dir)[0]
    journal.close()
    row_bytes, text_bytes = files
    return Torn(row_bytes, text_bytes, table)


def left_behind(folder, row_bytes, text_bytes):
    rank_dir = folder / "0"
    rank_dir.mkdir(exist_ok=True)
    for path, data in zip(
        row_format.get_block_paths(rank_dir, 0), (row_bytes, text_bytes), strict=True
    ):
        path.write_bytes(data)
    return rank_dir


def check_recovers(rank_dir):
    """Opening it for writing keeps what can be read, and the damage."""
    table, damage = read_records(rank_dir)
    Journal(rank_dir).close()
    again, damage_again = read_records(rank_dir)
    assert same(again, table)
    assert [(d.file, d.rows_lost) for d in damage_again] == [
        (d.file, d.rows_lost) for d in damage
    ]


cheap = settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@cheap
@given(cut=st.integers(0, 130 * ROW_BYTES))
def test_read_records_rows_cut_at_any_byte_are_read_up_to_it(cut, torn, tmp_path):
    row_bytes, text_bytes, whole = torn
    rank_dir = left_behind(tmp_path, row_bytes[:cut], text_bytes)
    table, damage = read_records(rank_dir)
    assert same(table, whole.slice(0, min(cut // ROW_BYTES, 120)))
    assert [(d.file.name, d.offset, d.rows_lost) for d in damage] == [
        ("000000.rows", cut, CAPACITY - cut // ROW_BYTES)
    ]


@cheap
@given(data=st.data())
def test_read_records_text_cut_at_any_byte_keeps_all_that_needs_none(
    data, torn, tmp_path
):
    row_bytes, text_bytes, whole = torn
    cut = data.draw(st.integers(0, len(text_bytes) - 1))
    rank_dir = left_behind(tmp_path, row_bytes, text_bytes[:cut])
    table, damage = read_records(rank_dir)
    seen = set(table["seq"].to_pylist())
    kept = [row for row in whole.to_pylist() if row["seq"] in seen]
    assert table.to_pylist() == kept
    assert [d.rows_lost for d in damage] == [120 - table.num_rows]
    if cut > 50:  # the first entry is the key of the floats
        assert len(table["value"].drop_null()) == 100


@cheap
@given(
    at=st.integers(0, 121 * ROW_BYTES - 1), garbage=st.binary(min_size=1, max_size=200)
)
def test_read_records_overwritten_rows_are_lost_alone(at, garbage, torn, tmp_path):
    row_bytes, text_bytes, whole = torn
    changed = row_bytes[:at] + garbage + row_bytes[at + len(garbage) :]
    rank_dir = left_behind(tmp_path, changed[: len(row_bytes)], text_bytes)
    table, _ = read_records(rank_dir)
    hit = set(range(at // ROW_BYTES, (at + len(garbage) - 1) // ROW_BYTES + 1))
    untouched = [row for row in whole.to_pylist() if row["seq"] not in hit]
    found = [row for row in table.to_pylist() if row["seq"] not in hit]
    assert found == untouched


def test_read_records_garbage_after_the_end_is_named(torn, tmp_path):
    row_bytes, text_bytes, whole = torn
    rank_dir = left_behind(tmp_path, row_bytes + b"junk", text_bytes + b"\xff\xfejunk")
    table, damage = read_records(rank_dir)
    assert same(table, whole)
    assert [(d.file.name, d.offset, d.rows_lost) for d in damage] == [
        ("000000.rows", CAPACITY * ROW_BYTES, 0),
        ("000000.text", len(text_bytes), 0),
    ]
    check_recovers(rank_dir)


def test_read_records_text_torn_in_the_middle_is_read_on_after_it(torn, tmp_path):
    row_bytes, text_bytes, whole = torn
    rank_dir = left_behind(tmp_path, row_bytes, b"\xff\xfe\x01torn" + text_bytes)
    table, damage = read_records(rank_dir)
    assert same(table, whole)
    assert [(d.offset, d.rows_lost) for d in damage] == [(0, 0)]


@pytest.mark.parametrize("absent", ["rows", "text"])
def test_read_records_absent_file_is_named(absent, torn, tmp_path):
    row_bytes, text_bytes, _ = torn
    rank_dir = left_behind(tmp_path, row_bytes, text_bytes)
    (rank_dir / f"000000.{absent}").unlink()
    table, damage = read_records(rank_dir)
    assert table.num_rows == 0
    if absent == "text":
        assert [(d.file.name, d.rows_lost) for d in damage] == [("000000.text", 120)]
        check_recovers(rank_dir)


def test_read_records_row_torn_while_written_is_named(torn, tmp_path):
    row_bytes, text_bytes, whole = torn
    half = row_bytes[: 119 * ROW_BYTES + 30] + bytes(18) + row_bytes[120 * ROW_BYTES :]
    rank_dir = left_behind(tmp_path, half, text_bytes)
    table, damage = read_records(rank_dir)
    assert same(table, whole.slice(0, 119))
    assert damage == [
        Damage(
            rank_dir / "000000.rows",
            119 * ROW_BYTES,
            1,
            "rows that were torn while being written, or changed later",
        )
    ]
    check_recovers(rank_dir)


def test_read_records_row_without_its_first_page_is_no_row(torn, tmp_path):
    # After a power cut: the page that holds a row's time never reached the disk.
    row_bytes, text_bytes, whole = torn
    lost = row_bytes[: 85 * ROW_BYTES] + bytes(16) + row_bytes[85 * ROW_BYTES + 16 :]
    table, damage = read_records(left_behind(tmp_path, lost, text_bytes))
    assert 85 not in table["seq"].to_pylist()
    assert table.num_rows == whole.num_rows - 1
    assert [(d.offset, d.rows_lost) for d in damage] == [(85 * ROW_BYTES, 1)]


def test_read_records_block_that_is_gone_is_named(rank_dir):
    journal = Journal(rank_dir)
    journal.write("m", "s", (("x", FLOAT, float(i), None) for i in range(40_000)))
    journal.close()
    (rank_dir / "000001.arrow").unlink()
    table, damage = read_records(rank_dir)
    assert table.num_rows == 40_000 - CAPACITY
    assert damage == [
        Damage(rank_dir / "000001.arrow", 0, CAPACITY, "the block is missing")
    ]
    assert JournalReader(rank_dir).read(5)["seq"].to_pylist() == [0, 1, 2, 3, 4]
    reader = JournalReader(rank_dir, after=CAPACITY - 1)
    assert reader.read(1)["seq"].to_pylist() == [2 * CAPACITY]


def test_read_records_absent_folder_is_empty(tmp_path):
    table, damage = read_records(tmp_path / "nothing")
    assert (table.num_rows, damage) == (0, [])
    assert JournalReader(tmp_path / "nothing").read().num_rows == 0
    assert JournalReader(tmp_path / "nothing").count_unread() == 0


def test_journal_reader_gives_each_row_once_in_order_while_it_grows(rank_dir):
    journal = Journal(rank_dir)
    reader = JournalReader(rank_dir)
    seen: list[float] = []
    counter = itertools.count()
    for burst in (1, 10, 20_000, 5, 16_384, 30_000):
        leaves = (("x", FLOAT, float(next(counter)), None) for _ in range(burst))
        journal.write("m", "s", leaves)
        assert reader.count_unread() == burst
        while (table := reader.read(7000)).num_rows:
            assert table.num_rows <= 7000
            seen += floats(table)
        assert reader.count_unread() == 0
    journal.close()
    put_more = Journal(rank_dir)
    put(put_more, -1.0)
    while (table := reader.read()).num_rows:
        seen += floats(table)
    put_more.close()
    assert seen == [*range(sum((1, 10, 20_000, 5, 16_384, 30_000))), -1.0]


def test_journal_reader_starts_after_a_given_row(rank_dir):
    journal = Journal(rank_dir)
    journal.write("m", "s", (("x", FLOAT, float(i), None) for i in range(10)))
    assert floats(JournalReader(rank_dir, after=6).read()) == [7, 8, 9]
    assert JournalReader(rank_dir, after=6).count_unread() == 3
    journal.close()
    assert floats(JournalReader(rank_dir, after=6).read()) == [7, 8, 9]


def test_journal_reader_waits_for_a_row_that_is_being_written(rank_dir):
    journal = Journal(rank_dir)
    put(journal, 1.0)
    # As a thread that is just about to write.
    for slot in journal.block.slots:  # noqa: B007
        break
    put(journal, 3.0)
    reader = JournalReader(rank_dir)
    assert floats(reader.read()) == [1.0]
    assert reader.read().num_rows == 0
    group = journal.get_group(journal.block, "metrics", "train")
    now = time.time_ns() // 1000
    key = group.ids[""]
    journal.block.put(*row_format.encode_row(slot, now, 1, 1, 2.0, 1, key, FLOAT, 0))
    assert floats(reader.read()) == [2.0, 3.0]
    journal.close()


def test_journal_reader_passes_a_row_that_can_not_come_any_more(rank_dir):
    journal = Journal(rank_dir)
    put(journal, 1.0)
    for _ in journal.block.slots:
        break
    put(journal, 3.0)
    reader = JournalReader(rank_dir)
    assert floats(reader.read()) == [1.0]
    journal.close()
    assert floats(reader.read()) == [3.0]
    assert read_records(rank_dir)[1] == []


@pytest.mark.parametrize(
    "name",
    [
        "999999999.arrow",
        "999999999.rows",
        "99999999999999999999999.arrow",
        "0000001.arrow",
        "000001.arrow.bak",
        "\u0660\u0660\u0660\u0660\u0660\u0661.arrow",
        "copy",
        "folder",
        "x.new",
    ],
)
def test_stray_file_among_blocks_costs_nothing(name, rank_dir):
    journal = Journal(rank_dir)
    put(journal, 1.0)
    journal.close()
    if name == "folder":
        (rank_dir / "000500.arrow").mkdir()
    elif name == "copy":
        sealed = (rank_dir / "000000.arrow").read_bytes()
        (rank_dir / "999999999.arrow").write_bytes(sealed)
    elif name == "x.new":
        (rank_dir / name).mkdir()
    else:
        (rank_dir / name).write_bytes(b"mine")
    table, damage = read_records(rank_dir)
    assert (table["value"].to_pylist(), damage) == ([1.0], [])
    assert JournalReader(rank_dir).read()["value"].to_pylist() == [1.0]
    assert JournalReader(rank_dir).count_unread() == 1
    again = Journal(rank_dir)
    put(again, 2.0)
    again.close()
    table, _ = read_records(rank_dir)
    assert table["value"].to_pylist() == [1.0, 2.0]
    assert table["seq"].to_pylist() in ([0, CAPACITY], [0, 2 * CAPACITY])


def test_block_far_behind_a_gap_is_read_and_the_gap_is_named_once(rank_dir):
    journal = Journal(rank_dir)
    put(journal, 1.0)
    journal.close()
    number = 5_000
    table, _ = read_records(rank_dir)
    seq = pa.array([number * CAPACITY])
    write_segment(table.set_column(0, table.schema.field(0), seq),
                  get_segment_path(rank_dir, number))  # fmt: skip
    table, damage = read_records(rank_dir)
    assert table["seq"].to_pylist() == [0, number * CAPACITY]
    (gap,) = damage
    assert gap.rows_lost == (number - 1) * CAPACITY
    assert gap.reason == "4999 blocks are missing"


def test_flipped_bit_of_a_row_is_found_and_never_read_as_a_value(torn, tmp_path):
    random = np.random.default_rng(7)
    row_bytes, text_bytes, whole = torn
    num_bits = whole.num_rows * ROW_BYTES * 8
    for bit in random.integers(num_bits, size=60):
        rows = bytearray(row_bytes)
        rows[bit // 8] ^= 1 << (bit % 8)
        table, damage = read_records(left_behind(tmp_path, bytes(rows), text_bytes))
        slot = bit // 8 // ROW_BYTES
        kept = whole.filter(pc.not_equal(whole["seq"], int(slot)))
        assert same(table, kept)
        assert [(found.offset, found.rows_lost) for found in damage] == [
            (slot * ROW_BYTES, 1)
        ]


def test_row_of_before_1970_is_read(rank_dir):
    journal = Journal(rank_dir)
    journal.write("m", "s", [("x", FLOAT, 1.5, None)], time_us=-1)
    assert floats(read_records(rank_dir)[0]) == [1.5]
    journal.close()
    table, damage = read_records(rank_dir)
    assert floats(table) == [1.5]
    assert damage == []


def test_checks_of_many_rows_are_those_of_zlib():
    random = np.random.default_rng(1)
    rows = b"".join(
        row_format.ROW.pack(data, check)
        for slot in range(500)
        for _, data, check in [
            row_format.encode_row(
                slot, *random.integers(0, 2**40, 3).tolist(), 0.5, 1, 2, 1, 0
            )
        ]
    )
    found = np.frombuffer(rows, row_format._DTYPE)
    assert row_format._match_checks(found, lambda: None).all()
    assert not row_format._match_checks(found[1:], lambda: None).any()


def test_slot_without_a_row_never_passes_for_one():
    empty = np.zeros(CAPACITY, row_format._DTYPE)
    assert not row_format._match_checks(empty, lambda: None).any()
    assert not row_format._is_written(empty).any()
