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
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tracking.journal.segment import CAPACITY, Damage
from tracking.schema import KINDS, NAMES, SCHEMA, VALUED, VOID

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


def paths(rank_dir: Path, number: int) -> tuple[Path, Path]:
    """Files of an open block: rows and text."""
    return rank_dir / f"{number:06d}.rows", rank_dir / f"{number:06d}.text"


def read_files(rank_dir: Path, number: int) -> tuple[bytes, bytes, bytes]:
    """Marks, rows and text of an open block, consistent while it is being written.

    Notes
    -----
    The rows are read twice: one whose mark is in the first reading is whole in the
    second. The text is read last: it holds all that such rows refer to.
    """
    rows, text = paths(rank_dir, number)
    marks = rows.read_bytes()
    return marks, rows.read_bytes(), text.read_bytes() if text.exists() else b""


def entry(tag: int, number: int, text: str) -> bytes:
    """A text as it stands in the file."""
    data = text.encode()
    return _ENTRY.pack(_SIGN, tag, number, len(data), _check(tag, number, data)) + data


def no_pause() -> None:
    """Do nothing where others could be let go first."""


def decode(
    rank_dir: Path,
    number: int,
    rank: int,
    marks: bytes,
    rows: bytes,
    text: bytes,
    pause: Callable[[], None] = no_pause,
) -> Decoded:
    """Rows of an open block from the bytes of its files.

    Parameters
    ----------
    rank_dir, number, rank
        Which block it is.
    marks, rows, text
        Bytes of the files; ``marks`` is an earlier reading of ``rows``.
    pause
        Called every half a millisecond or so: where the interpreter lock can be let go.
    """
    num_slots = min(len(marks), len(rows), CAPACITY * SIZE) // SIZE
    found = np.frombuffer(rows, _DTYPE, num_slots)
    whole = _whole(np.frombuffer(marks, _DTYPE, num_slots)["mark"])
    if marks is not rows:
        whole &= _whole(found["mark"])
    # A row that lies on two pages may have lost the first of them to a power cut.
    whole &= (found["time"] > 0) & (found["time"] < _END_OF_TIME)
    pause()
    keys, payloads, torn_at = _parse_text(text, pause)

    slot = np.flatnonzero(whole)
    row = found if len(slot) == num_slots else found[slot]
    known = _has_its_text(row, slot, keys, payloads)
    lost = len(row) - int(known.sum())
    final = whole.copy()
    final[slot[~known]] = False
    frontier = num_slots if final.all() else int(final.argmin())
    damage = _damage(paths(rank_dir, number)[0], rows, whole)
    if torn_at is not None or lost:
        offset = len(text) if torn_at is None else torn_at
        reason = "texts that rows refer to are torn or absent"
        damage.append(Damage(paths(rank_dir, number)[1], offset, lost, reason))
    pause()
    kept = known & (row["kind"] != VOID)
    if not kept.all():
        row, slot = row[kept], slot[kept]
    table = _as_table(row, slot, number * CAPACITY, rank, keys, payloads, pause)
    return Decoded(table, frontier, damage)


def num_marked(rank_dir: Path, number: int) -> int:
    """Rows that an open block holds, those not readable for want of text included."""
    data = paths(rank_dir, number)[0].read_bytes()
    found = np.frombuffer(data, _DTYPE, min(len(data) // SIZE, CAPACITY))
    return int((_whole(found["mark"]) & (found["kind"] != VOID)).sum())


def last_marked(rows: bytes) -> int:
    """Highest slot that is written; -1 if none is."""
    marked = np.flatnonzero(_whole(np.frombuffer(rows, _DTYPE, CAPACITY)["mark"]))
    return int(marked[-1]) if len(marked) else -1


def has_holes(rows: bytes, limit: int) -> bool:
    """Whether a slot below ``limit`` has no row yet."""
    return not _whole(np.frombuffer(rows, _DTYPE, limit)["mark"]).all()


def _whole(marks: Any) -> Any:
    """Mask of the slots, from 0, whose mark is in place."""
    return (marks ^ np.uint32(MARK)) == np.arange(len(marks), dtype=np.uint32)


def _has_its_text(
    row: Any,
    slot: Any,
    keys: dict[int, tuple[str, str, str]],
    payloads: dict[int, str],
) -> Any:
    """Mask of the rows whose key, payload and kind are known."""
    highest = max(keys, default=-1) + 1
    is_key = np.zeros(highest + 1, bool)  # the last is for all that are higher
    is_key[list(keys)] = True
    known = is_key[np.minimum(row["key"], highest)] | (row["kind"] == VOID)
    known &= row["kind"] < len(KINDS)
    for at in np.flatnonzero(row["flags"] & HAS_TEXT):
        known[at] &= int(slot[at]) in payloads
    return known


def _damage(path: Path, rows: bytes, whole: Any) -> list[Damage]:
    """Torn rows, and a file that is too short or too long."""
    num_slots = len(whole)
    damage = []
    empty = np.flatnonzero(~whole)
    raw = np.frombuffer(rows, np.int64, num_slots * SIZE // 8)
    torn = empty[raw.reshape(num_slots, SIZE // 8)[empty].any(axis=1)]
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
    pause: Callable[[], None],
) -> pa.Table:
    """Rows in the public schema."""
    kind, key = row["kind"], row["key"]
    columns = [
        pa.array(slot + first_seq),
        pa.array(np.full(len(row), rank, np.int32)),
        pa.array(row["time"].copy()).view(SCHEMA.field("time").type),
        *(_coded({k: v[i] for k, v in keys.items()}, key) for i in range(3)),
    ]
    pause()
    columns += [
        _nullable(row["index"], NO_COUNT),
        _nullable(row["epoch"], NO_EPOCH),
        _nullable(row["step"], NO_COUNT),
        _values(row["value"], kind),
        _payloads(row["flags"], slot, payloads),
        _coded(dict(enumerate(KINDS)), kind),
    ]
    pause()
    return pa.table(columns, schema=SCHEMA)


def _coded(words: dict[int, str], numbers: Any) -> pa.DictionaryArray:
    """Column of ``words[numbers[i]]``, each word that is used once in the dictionary."""
    used: Any = np.flatnonzero(np.bincount(numbers)) if len(numbers) else []
    distinct: dict[str, int] = {}
    codes = np.zeros(len(used) and used[-1] + 1, np.int32)
    for number in used:
        codes[number] = distinct.setdefault(words[int(number)], len(distinct))
    names = pa.array([*distinct], NAMES.value_type)
    return pa.DictionaryArray.from_arrays(codes[numbers], names)


def _values(values: Any, kinds: Any) -> pa.Array:
    """Numbers; null in a row of a kind that has none."""
    is_valued = np.zeros(len(KINDS), bool)
    is_valued[list(VALUED)] = True
    valued = is_valued[kinds]
    return pa.array(values.copy(), mask=None if valued.all() else ~valued)


def _payloads(flags: Any, slot: Any, payloads: dict[int, str]) -> pa.Array:
    """Texts; null in a row that has none."""
    having = np.flatnonzero(flags & HAS_TEXT)
    if not len(having):
        return pa.nulls(len(flags), pa.string())
    places = np.zeros(len(flags), np.int32)
    places[having] = np.arange(len(having))
    absent = np.ones(len(flags), bool)
    absent[having] = False
    texts = pa.array([payloads[int(number)] for number in slot[having]], pa.string())
    return texts.take(pa.array(places, mask=absent))


def _nullable(numbers: Any, null: int) -> pa.Array:
    """Integers, with what stands for null as null."""
    absent = numbers == null
    if absent.all():
        return pa.nulls(len(numbers), pa.from_numpy_dtype(numbers.dtype))
    return pa.array(numbers.copy(), mask=absent if absent.any() else None)


def _parse_text(
    data: bytes, pause: Callable[[], None]
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
            pause()
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
