"""Bytes of an open block: its layout, and reading it back, torn or whole.

``000012.rows`` holds ``CAPACITY`` rows of 48 bytes, zeros where none is yet. The last
field of a row tells that it is whole: a process killed while writing leaves a row
without its mark. ``000012.text`` is appended to: one entry for each new (what, set,
name), which rows then refer to by a number, and one for each payload.
"""

from __future__ import annotations

import itertools
import json
import struct
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tracking.schema import KINDS, NAMES, SCHEMA, VALUED, VOID
from tracking.sealed import CAPACITY, Damage

ROW: Final = struct.Struct("<qqqdiIHHI")
"""time (us since 1970), index, step, value, epoch, key, kind, flags, mark."""

SIZE: Final = ROW.size
MARK: Final = 0x9E2A6C5B
"""A row's mark is this, xor its slot."""

MARK_AT: Final = SIZE - 4
NO_COUNT: Final = -(2**63)
"""Null of ``index`` and ``step``."""

NO_EPOCH: Final = -(2**31)
HAS_TEXT: Final = 1
"""Flag of a row that has a payload."""

KEY, PAYLOAD = 1, 2
"""Tags of a text: a name, or the payload of the row in a slot."""

_DTYPE: Final = np.dtype(
    [
        ("time", "<i8"),
        ("index", "<i8"),
        ("step", "<i8"),
        ("value", "<f8"),
        ("epoch", "<i4"),
        ("key", "<u4"),
        ("kind", "<u2"),
        ("flags", "<u2"),
        ("mark", "<u4"),
    ]
)
_END_OF_TIME: Final = 253_402_300_800_000_000  # us to the year 10000
_ENTRY: Final = struct.Struct("<2sBxIII")  # sign, tag, number, length, checksum
# 0xff occurs nowhere in UTF-8, so a reader finds the next entry after a torn one.
_SIGN: Final = b"\xff\xfe"


@dataclass(frozen=True)
class Decoded:
    """What an open block holds.

    Attributes
    ----------
    table
        Its whole rows, in order.
    frontier
        First slot that is not whole yet: rows before it are final.
    damage
        What cannot be read, if the block's writer is gone.
    """

    table: pa.Table
    frontier: int
    damage: list[Damage]


def paths(part: Path, number: int) -> tuple[Path, Path]:
    """Files of an open block: rows and text."""
    return part / f"{number:06d}.rows", part / f"{number:06d}.text"


def read_files(part: Path, number: int) -> tuple[bytes, bytes, bytes]:
    """Marks, rows and text of an open block, consistent while it is being written.

    Notes
    -----
    The rows are read twice: one whose mark is in the first reading is whole in the
    second. The text is read last: it holds all that such rows refer to.
    """
    rows, text = paths(part, number)
    marks = rows.read_bytes()
    return marks, rows.read_bytes(), text.read_bytes() if text.exists() else b""


def entry(tag: int, number: int, text: str) -> bytes:
    """A text as it stands in the file."""
    data = text.encode()
    return _ENTRY.pack(_SIGN, tag, number, len(data), _check(tag, number, data)) + data


def decode(
    part: Path, number: int, rank: int, marks: bytes, rows: bytes, text: bytes
) -> Decoded:
    """Rows of an open block from the bytes of its files.

    Parameters
    ----------
    part, number, rank
        Which block it is.
    marks, rows, text
        Bytes of the files; ``marks`` is an earlier reading of ``rows``.
    """
    num_slots = min(len(marks), len(rows), CAPACITY * SIZE) // SIZE
    slots = np.arange(num_slots, dtype=np.uint32)
    found = np.frombuffer(rows, _DTYPE, num_slots)
    whole = np.frombuffer(marks, _DTYPE, num_slots)["mark"] == (MARK ^ slots)
    whole &= found["mark"] == (MARK ^ slots)
    # A row that lies on two pages may have lost the first of them to a power cut.
    whole &= (found["time"] > 0) & (found["time"] < _END_OF_TIME)
    keys, payloads, torn_at = _parse_text(text)
    time.sleep(0)  # a thread that logs goes first; so in _parse_text

    row, slot = found[whole], slots[whole]
    known = _has_its_text(row, slot, keys, payloads)
    final = whole.copy()
    final[slot[~known]] = False
    frontier = num_slots if final.all() else int(final.argmin())
    damage = _damage(paths(part, number)[0], rows, whole)
    lost = int((~known).sum())
    if torn_at is not None or lost:
        offset = len(text) if torn_at is None else torn_at
        reason = "texts that rows refer to are torn or absent"
        damage.append(Damage(paths(part, number)[1], offset, lost, reason))
    time.sleep(0)
    kept = known & (row["kind"] != VOID)
    first_seq = number * CAPACITY
    table = _as_table(row[kept], slot[kept], first_seq, rank, keys, payloads)
    return Decoded(table, frontier, damage)


def num_marked(part: Path, number: int) -> int:
    """Rows that an open block holds, those not readable for want of text included."""
    data = paths(part, number)[0].read_bytes()
    found = np.frombuffer(data, _DTYPE, min(len(data) // SIZE, CAPACITY))
    whole = found["mark"] == (MARK ^ np.arange(len(found), dtype=np.uint32))
    return int((whole & (found["kind"] != VOID)).sum())


def last_marked(rows: bytes) -> int:
    """Highest slot that is written; -1 if none is."""
    found = np.frombuffer(rows, _DTYPE, CAPACITY)["mark"]
    marked = np.flatnonzero(found == (MARK ^ np.arange(CAPACITY, dtype=np.uint32)))
    return int(marked[-1]) if len(marked) else -1


def has_holes(rows: bytes, limit: int) -> bool:
    """Whether a slot below ``limit`` has no row yet."""
    found = np.frombuffer(rows, _DTYPE, limit)["mark"]
    return bool((found != (MARK ^ np.arange(limit, dtype=np.uint32))).any())


def _has_its_text(
    row: Any,
    slot: Any,
    keys: dict[int, tuple[str, str, str]],
    payloads: dict[int, str],
) -> Any:
    """Mask of the rows whose key, payload and kind are known."""
    known = np.isin(row["key"], np.fromiter(keys, np.uint32, len(keys)))
    known = (known | (row["kind"] == VOID)) & (row["kind"] < len(KINDS))
    for at in np.flatnonzero(row["flags"] & HAS_TEXT):
        known[at] &= int(slot[at]) in payloads
    return known


def _damage(path: Path, rows: bytes, whole: Any) -> list[Damage]:
    """Torn rows, and a file that is too short or too long."""
    num_slots = len(whole)
    raw = np.frombuffer(rows, np.int64, num_slots * SIZE // 8).reshape(
        num_slots, SIZE // 8
    )
    torn = np.flatnonzero(raw.any(axis=1) & ~whole)
    damage = []
    if len(torn):
        reason = "rows without their mark, torn while being written"
        damage.append(Damage(path, int(torn[0]) * SIZE, len(torn), reason))
    if num_slots < CAPACITY:
        reason = "the file is cut short: at most so many rows were there"
        damage.append(Damage(path, len(rows), CAPACITY - num_slots, reason))
    elif len(rows) > CAPACITY * SIZE:
        damage.append(Damage(path, CAPACITY * SIZE, 0, "more bytes than rows"))
    return damage


def _as_table(
    row: Any,
    slot: Any,
    first_seq: int,
    rank: int,
    keys: dict[int, tuple[str, str, str]],
    payloads: dict[int, str],
) -> pa.Table:
    """Rows in the public schema."""
    used, place = np.unique(row["key"], return_inverse=True)
    words = [keys[int(key)] for key in used]
    kinds, kind_place = np.unique(row["kind"], return_inverse=True)
    valued = np.isin(row["kind"], VALUED)
    texts: list[str | None] = [None] * len(row)
    for at in np.flatnonzero(row["flags"] & HAS_TEXT):
        texts[at] = payloads[int(slot[at])]
    columns = [
        pa.array(slot.astype(np.int64) + first_seq),
        pa.array(np.full(len(row), rank, np.int32)),
        pa.array(row["time"]).cast(SCHEMA.field("time").type),
        *(_coded([word[i] for word in words], place) for i in range(3)),
        _nullable(row["index"], NO_COUNT),
        _nullable(row["epoch"], NO_EPOCH),
        _nullable(row["step"], NO_COUNT),
        pa.array(row["value"], mask=None if valued.all() else ~valued),
        pa.array(texts, pa.string()),
        _coded([KINDS[kind] for kind in kinds], kind_place),
    ]
    return pa.table(columns, schema=SCHEMA)


def _coded(words: list[str], place: Any) -> pa.DictionaryArray:
    """Column of ``words[place[i]]``, each word once in the dictionary."""
    distinct = {word: i for i, word in enumerate(dict.fromkeys(words))}
    codes = np.array([distinct[word] for word in words], np.int32)[place]
    return pa.DictionaryArray.from_arrays(
        codes, pa.array([*distinct], NAMES.value_type)
    )


def _nullable(numbers: Any, null: int) -> pa.Array:
    """Integers, with what stands for null as null."""
    absent = numbers == null
    return pa.array(numbers, mask=absent if absent.any() else None)


def _parse_text(
    data: bytes,
) -> tuple[dict[int, tuple[str, str, str]], dict[int, str], int | None]:
    """Keys and payloads of a text file, and where the first torn entry is."""
    keys: dict[int, tuple[str, str, str]] = {}
    payloads: dict[int, str] = {}
    torn_at, at = None, 0
    for count in itertools.count(1):
        if at >= len(data):
            break
        found = _parse_entry(data, at)
        if found is None:
            torn_at = at if torn_at is None else torn_at
            after = data.find(_SIGN, at + 1)
            at = len(data) if after < 0 else after
            continue
        tag, number, text = found
        at += _ENTRY.size + len(text)
        if tag == KEY:
            what, set_, name = json.loads(text)
            keys[number] = (what, set_, name)
        else:
            payloads[number] = text.decode()
        if count % 256 == 0:
            time.sleep(0)
    return keys, payloads, torn_at


def _parse_entry(data: bytes, at: int) -> tuple[int, int, bytes] | None:
    """Tag, number and text of the entry at an offset; None if it is torn."""
    start = at + _ENTRY.size
    if len(data) < start:
        return None
    sign, tag, number, length, check = _ENTRY.unpack_from(data, at)
    text = data[start : start + length]
    if sign != _SIGN or len(text) != length or _check(tag, number, text) != check:
        return None
    return tag, number, text


def _check(tag: int, number: int, data: bytes) -> int:
    """Checksum of a text and of what is said about it."""
    return zlib.crc32(data, zlib.crc32(struct.pack("<BII", tag, number, len(data))))
