"""A sealed block: one small Arrow IPC file, whose pieces are checked when it is read.

Any Arrow reader can open it. It differs from the public schema as follows; the schema's
metadata under ``luz`` says how to undo it:

- a column with the same value in every row is left out; ``constant`` has its value;
- ``seq``, ``time`` (us since 1970), ``index``, ``epoch`` and ``step`` contain the
  difference from the previous row (0 at a null), in the narrowest integer type;
  ``first`` has their first values; 1 is subtracted from the differences of ``seq``, so
  that they are mostly 0;
- ``value`` is float32 if that keeps every bit of every value.

``luz-segments`` has the end and the CRC-32 of the schema message and of each batch: a
damaged file is read up to the damage, and no damaged byte reaches Arrow.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tracking import durable
from tracking.errors import InvalidFileError
from tracking.journal.arrays import (
    join_chunks,
    make_array,
    make_empty_table,
    make_texts,
    read_array,
)
from tracking.schema import SCHEMA

FORMAT: Final = 1
CAPACITY: Final = 16384
"""Rows that a block can take."""

BATCH_ROWS: Final = 4096
WORDS: Final = ("what", "set", "name", "kind")
COUNTS: Final = ("seq", "time", "index", "epoch", "step")

_SEGMENT: Final = "{:012x}:{:08x},"
_SEGMENTS: Final = re.compile(rb"luz-segments=((?:[0-9a-f]{12}:[0-9a-f]{8},)+)")
_NUM_ROWS: Final = re.compile(rb'"num_rows": (\d+)')
_FIRST_SEQ: Final = re.compile(rb'"first": {"seq": (\d+)')
_START: Final = 8  # after the magic "ARROW1" and its padding
_END: Final = b"\xff\xff\xff\xff\0\0\0\0"  # a stream's end, after the last batch


@dataclass(frozen=True)
class Damage:
    """Damage in a file of a journal.

    Attributes
    ----------
    offset
        Position of the first damaged byte in the file.
    rows_lost
        Rows that the file contained, or may have contained, and that cannot be read.
    """

    file: Path
    offset: int
    rows_lost: int
    reason: str


def get_rank(rank_dir: Path) -> int:
    """Return the rank whose records a folder contains: its name."""
    return int(rank_dir.name) if rank_dir.name.isdecimal() else 0


def write_segment(
    table: pa.Table,
    path: Path,
    *,
    damage: Iterable[Damage] = (),
    pause: Callable[[], None] | None = None,
) -> None:
    """Write rows as a sealed block; the file is complete and on the disk afterwards.

    Parameters
    ----------
    table
        Rows in the public schema, of one rank, in order of ``seq``.
    damage
        What the block lost before it was sealed; stored in the file.
    pause
        Called between the steps, so that other threads can run.
    """
    columns, notes = _encode(table)
    rank = get_rank(path.parent)
    notes |= {"format": FORMAT, "rank": rank, "num_rows": table.num_rows}
    notes["damage"] = [[d.file.name, d.offset, d.rows_lost, d.reason] for d in damage]
    if pause:
        pause()
    data = _build_file(pa.table(columns), notes)
    with durable.replace_file(path, temporary=path.with_suffix(".sealing")) as fresh:
        durable.write_synced(fresh, [data])


def read_segment(path: Path) -> tuple[pa.Table, list[Damage]]:
    """Read the rows of a sealed block, and its damage.

    Parameters
    ----------
    path
        File that ``write_segment`` made, complete or damaged.

    Returns
    -------
    rows before the first damage, in the public schema, and all damage, including what
    happened before sealing

    Raises
    ------
    InvalidFileError
        If another version of the format is in the file.
    """
    data = path.read_bytes()
    ends, reason = _check_pieces(data)
    if not ends:
        return make_empty_table(), [Damage(path, 0, CAPACITY, reason)]
    stream = pa.BufferReader(data[_START : ends[-1]] + _END)
    # Waking the threads of a pool takes longer than the work.
    options = pa.ipc.IpcReadOptions(use_threads=False)
    stored = pa.ipc.open_stream(stream, options=options).read_all()
    notes = json.loads(stored.schema.metadata[b"luz"])
    if notes["format"] != FORMAT:
        raise InvalidFileError(
            f"{path}: expected format {FORMAT}, got {notes['format']}. "
            "Read it with the version of luz-harness that wrote it, or a later one."
        )
    damage = [Damage(path.parent / file, *rest) for file, *rest in notes["damage"]]
    if reason:
        damage.append(
            Damage(path, ends[-1], notes["num_rows"] - stored.num_rows, reason)
        )
    return _decode(stored, notes), damage


def read_num_rows(path: Path) -> int:
    """Read the number of rows from the head of a sealed block; 0 if it is damaged."""
    return _read_note(path, _NUM_ROWS) or 0


def read_first_seq(path: Path) -> int | None:
    """Read ``seq`` of the first row from a sealed block; None if it is none of ours."""
    try:
        return _read_note(path, _FIRST_SEQ)
    except OSError:
        return None


def _read_note(path: Path, pattern: re.Pattern[bytes]) -> int | None:
    """Read a number from the notes in the head of a sealed block."""
    with path.open("rb") as file:
        found = pattern.search(file.read(1 << 16)) or pattern.search(file.read())
    return int(found[1]) if found else None


def _encode(table: pa.Table) -> tuple[dict[str, pa.Array], dict[str, Any]]:
    """Encode the columns; the notes say how to undo it."""
    constant: dict[str, Any] = {}
    first: dict[str, int] = {}
    columns: dict[str, pa.Array] = {}
    for name in (*COUNTS, *WORDS, "value", "payload"):
        column = join_chunks(table[name])
        if column.null_count == len(column) and name not in WORDS:
            constant[name] = None
        elif name in COUNTS:
            whole = column.cast(pa.int64())
            first[name] = read_array(whole.drop_null())[0].item()
            steps = _find_differences(whole)
            if name == "seq":  # always stored, so that rows can be counted
                steps[1:] -= 1
            elif whole.null_count == 0 and not steps.any():
                constant[name] = first[name]
                continue
            narrow = steps.astype(_find_narrowest(steps))
            columns[name] = make_array(narrow, _find_nulls(whole))
        elif name in WORDS and len(column.dictionary) == 1:
            constant[name] = column.dictionary[0].as_py()
        elif name in WORDS:
            columns[name] = _narrow_codes(column)
        else:
            columns[name] = _narrow_floats(column) if name == "value" else column
    return columns, {"constant": constant, "first": first}


def _find_differences(column: pa.Array) -> Any:
    """Difference of each number from the one before it; 0 at the first, and at a null."""
    numbers = read_array(column.drop_null())
    steps = np.zeros(len(column), np.int64)
    with np.errstate(over="ignore"):  # wraps around; the sum wraps back
        steps[read_array(column.is_valid())] = np.diff(numbers, prepend=numbers[:1])
    return steps


def _find_narrowest(
    numbers: np.ndarray[Any, np.dtype[np.int64]],
) -> type[np.signedinteger]:
    low, high = numbers.min(), numbers.max()
    for dtype in (np.int8, np.int16, np.int32):
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    return np.int64


def _narrow_codes(column: pa.DictionaryArray) -> pa.DictionaryArray:
    width = pa.int8() if len(column.dictionary) < 128 else pa.int16()
    return pa.DictionaryArray.from_arrays(column.indices.cast(width), column.dictionary)


def _narrow_floats(column: pa.Array) -> pa.Array:
    """Convert values to float32 if that keeps every bit of every value."""
    wide = read_array(column)
    with np.errstate(all="ignore"):
        narrow = wide.astype(np.float32)
        same = np.array_equal(
            narrow.astype(np.float64).view(np.int64), wide.view(np.int64)
        )
    if not same:
        return column
    return make_array(narrow, _find_nulls(column))


def _build_file(columns: pa.Table, notes: dict[str, Any]) -> bytes:
    """Build the Arrow file with the checksums of its pieces."""
    batches = columns.to_batches(BATCH_ROWS)
    blank = "luz-segments=" + _SEGMENT.format(0, 0) * (1 + len(batches))
    schema = columns.schema.with_metadata(
        {"luz-segments": blank, "luz": json.dumps(notes)}
    )
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    ends = [_START + schema.serialize().size]
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
            ends.append(sink.tell())
    data: bytes = sink.getvalue().to_pybytes()
    checks, start = "luz-segments=", _START
    for end in ends:
        checks += _SEGMENT.format(end, zlib.crc32(data[start:end]))
        start = end
    return data.replace(blank.encode(), checks.encode())


def _check_pieces(data: bytes) -> tuple[list[int], str]:
    """Return the ends of the pieces before the first damaged one, and what is wrong."""
    found = _SEGMENTS.search(data)
    if not found:
        return [], "the list of its pieces is missing"
    text = found[1].decode()
    pieces = [(int(p[:12], 16), int(p[13:], 16)) for p in text.split(",")[:-1]]
    blank = _SEGMENT.format(0, 0) * len(pieces)
    head = data[: pieces[0][0]].replace(found[1], blank.encode())
    ends: list[int] = []
    start = _START
    for end, check in pieces:
        piece = (head if not ends else data)[start:end]
        if len(piece) != end - start:
            return ends, f"the file ends after {len(data)} bytes"
        if zlib.crc32(piece) != check:
            return ends, "a checksum does not match"
        ends.append(end)
        start = end
    if not data.endswith(b"ARROW1"):
        return ends, "the end of the file is damaged"
    return ends, ""


def _decode(stored: pa.Table, notes: dict[str, Any]) -> pa.Table:
    constant, num_rows = notes["constant"], stored.num_rows
    columns = []
    for field in SCHEMA:
        name = field.name
        if name == "rank":
            column = make_array(np.full(num_rows, notes["rank"], np.int32))
        elif name in constant and (constant[name] is None or name not in COUNTS):
            column = _repeat_word(constant[name], field.type, num_rows)
        elif name in COUNTS:
            column = _sum_differences(stored, notes, name)
        else:
            column = stored[name]
        same = column.type == field.type
        columns.append(column if same else column.cast(field.type))
    return pa.table(columns, schema=SCHEMA)


def _sum_differences(stored: pa.Table, notes: dict[str, Any], name: str) -> pa.Array:
    start = notes["first"][name]
    if name in notes["constant"]:
        return make_array(np.full(stored.num_rows, start, np.int64))
    column = join_chunks(stored[name])
    steps = read_array(column.cast(pa.int64())).copy()
    if name == "seq":
        steps[1:] += 1
    steps[:1] += start
    return make_array(np.cumsum(steps), _find_nulls(column))


def _find_nulls(column: pa.Array) -> Any:
    """Mask of the nulls; None if there is none."""
    return read_array(column.is_null()) if column.null_count else None


def _repeat_word(value: str | None, type_: pa.DataType, num_rows: int) -> pa.Array:
    """Make a column with the same word, or null, in every row."""
    if value is None:
        return pa.nulls(num_rows, type_)
    codes = make_array(np.zeros(num_rows, np.int32))
    return pa.DictionaryArray.from_arrays(codes, make_texts([value]))
