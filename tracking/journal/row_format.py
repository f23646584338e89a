"""The bytes of an open block: their layout, and how they are read, torn or complete.

``000012.rows`` contains ``CAPACITY`` rows of 48 bytes; unused ones are zeros. The last
field of a row is its check, written last: a process that is killed while writing leaves
a row without it, and a row whose bytes have changed does not match it. ``000012.text``
is appended to: one entry for each new (what, set, name), which rows then refer to by
number, and one for each payload.
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

from tracking.journal.arrays import make_array, make_texts
from tracking.journal.segment import CAPACITY, Damage, get_rank
from tracking.schema import KINDS, SCHEMA, VALUED, VOID

FIELDS: Final = struct.Struct("<qqqdiIHH")
"""time (us since 1970), index, step, value, epoch, key, kind, flags."""

ROW: Final = struct.Struct(f"<{FIELDS.size}sI")
"""The packed fields and their check: their CRC-32, which starts from the row's slot."""

ROW_BYTES: Final = ROW.size
OLD_MARK: Final = 0x9E2A6C5B
"""Before format 2 a row had this number xor its slot in place of the check."""

NO_COUNT: Final = -(2**63)
"""Null of ``index`` and ``step``."""

MAX_COUNT: Final = 2**63 - 1
"""Highest ``index`` and ``step``."""

NO_EPOCH: Final = -(2**31)
HAS_TEXT: Final = 1
"""Flag of a row with a payload."""

KEY, PAYLOAD = 1, 2
"""Tags of a text: a name, or the payload of the row in a slot."""

_DTYPE: Final = np.dtype(
    {
        "names": str.split("time index step value epoch key kind flags check"),
        "formats": str.split("<i8 <i8 <i8 <f8 <i4 <u4 <u2 <u2 <u4"),
    }
)
_END_OF_TIME: Final = 253_402_300_800_000_000  # us to the year 10000
_WORDS: Final = ROW_BYTES // 8
_ENTRY: Final = struct.Struct("<2sBxIII")  # sign, tag, number, length, checksum
# 0xff occurs nowhere in UTF-8, so a reader finds the next entry after a torn one.
_SIGN: Final = b"\xff\xfe"


def _make_crc_table() -> Any:
    """Table of CRC-32 as of zlib, to check many rows at once."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = np.where(table & 1, (table >> 1) ^ np.uint32(0xEDB88320), table >> 1)
    return table


_CRC_TABLE: Final = _make_crc_table()


@dataclass(frozen=True)
class BlockContent:
    """A block as a reader finds it."""

    table: pa.Table  #: rows that can be read, in order, in the public schema
    #: damage of a sealed block; in an open one, rows that are being written look the
    #: same, so this counts only if the block has no writer
    damage: list[Damage]
    frontier: int = CAPACITY  #: slots below it will not change
    is_sealed: bool = True  #: whether no more rows can come


def get_block_paths(rank_dir: Path, number: int) -> tuple[Path, Path]:
    """Return the files of an open block: rows and text."""
    return rank_dir / f"{number:06d}.rows", rank_dir / f"{number:06d}.text"


def read_block_files(rank_dir: Path, number: int) -> tuple[bytes, bytes, bytes]:
    """Read rows, again rows, and text of an open block while it may be being written.

    Notes
    -----
    The rows are read twice: a row whose check is in the first reading is complete in the
    second. The text is read last: it contains everything that such rows refer to.
    """
    rows, text = get_block_paths(rank_dir, number)
    before = rows.read_bytes()
    return before, rows.read_bytes(), text.read_bytes() if text.exists() else b""


def encode_row(slot: int, *fields: Any) -> tuple[int, bytes, int]:
    """Encode a row as the arguments of ``Block.put``: its offset, fields and check."""
    data = FIELDS.pack(*fields)
    return slot * ROW_BYTES, data, zlib.crc32(data, slot)


def encode_text(tag: int, number: int, text: str) -> bytes:
    """Encode a text as an entry of the file."""
    data = text.encode()
    return (
        _ENTRY.pack(_SIGN, tag, number, len(data), _checksum(tag, number, data)) + data
    )


def _no_pause() -> None:
    pass


def decode_block(
    rank_dir: Path,
    number: int,
    before: bytes,
    rows: bytes,
    text: bytes,
    pause: Callable[[], None] = _no_pause,
) -> BlockContent:
    """Decode the bytes of an open block's files.

    Parameters
    ----------
    rank_dir, number
        Identify the block.
    before, rows, text
        Bytes of the files; ``before`` is an earlier reading of ``rows``.
    pause
        Called about every half millisecond, so that other threads can run.
    """
    num_slots = min(len(before), len(rows), CAPACITY * ROW_BYTES) // ROW_BYTES
    num_used = min(num_slots, _count_used(rows))
    found = np.frombuffer(rows, _DTYPE, num_used)
    is_complete = np.zeros(num_slots, bool)
    is_complete[:num_used] = _match_checks(found, pause)
    if before is not rows:
        earlier = np.frombuffer(before, _DTYPE, num_used)
        # The fields are written first: with its check a row has all of them.
        is_same = (earlier["check"] == found["check"]) & _is_written(earlier)
        is_complete[:num_used] &= is_same
    pause()
    keys, payloads, torn_at = _parse_texts(text, pause)

    slot = np.flatnonzero(is_complete)
    row = found if len(slot) == num_used else found[slot]
    is_known = _has_texts(row, slot, keys, payloads)
    num_lost = len(row) - int(is_known.sum())
    is_final = is_complete.copy()
    is_final[slot[~is_known]] = False
    frontier = num_slots if is_final.all() else int(is_final.argmin())
    rows_path, text_path = get_block_paths(rank_dir, number)
    damage = _find_damage(rows_path, rows, is_complete, num_used)
    if torn_at is not None or num_lost:
        offset = len(text) if torn_at is None else torn_at
        reason = "texts that rows refer to are torn or absent"
        damage.append(Damage(text_path, offset, num_lost, reason))
    pause()
    kept = is_known & (row["kind"] != VOID)
    if not kept.all():
        row, slot = row[kept], slot[kept]
    place = number * CAPACITY, get_rank(rank_dir)
    table = _build_table(row, slot, *place, keys, payloads, pause)
    return BlockContent(table, damage, frontier, is_sealed=False)


def count_rows(rank_dir: Path, number: int) -> int:
    """Count the rows of an open block, including those whose text is missing."""
    data = get_block_paths(rank_dir, number)[0].read_bytes()
    found = np.frombuffer(data, _DTYPE, min(_count_used(data), CAPACITY))
    return int((_match_checks(found, _no_pause) & (found["kind"] != VOID)).sum())


def _count_used(rows: bytes) -> int:
    """Count the slots up to the last one that is not empty; a short run leaves most empty."""
    words = np.frombuffer(rows, np.int64, len(rows) // ROW_BYTES * _WORDS)
    used = np.flatnonzero(words)
    return int(used[-1]) // _WORDS + 1 if len(used) else 0


def has_holes(rows: bytes, limit: int) -> bool:
    """Whether a slot below ``limit`` has no row yet."""
    return not _is_written(np.frombuffer(rows, _DTYPE, limit)).all()


def is_written(slot: int, row: bytes) -> bool:
    """Whether the bytes of one slot are a row, complete or damaged."""
    data, check = ROW.unpack(row)
    return bool(check) or zlib.crc32(data, slot) == 0


def _is_written(found: Any) -> Any:
    """Mask of the slots, counted from 0, that have a check, right or wrong."""
    mask = found["check"] != 0
    if not mask.all():
        # One row in 2**32 has the check 0.
        (doubtful,) = np.nonzero(~mask & (found["time"] != 0))
        for slot in doubtful:
            mask[slot] = is_written(int(slot), found[slot].tobytes())
    return mask


def _match_checks(found: Any, pause: Callable[[], None]) -> Any:
    """Mask of the slots, counted from 0, whose row matches its check."""
    slots = np.arange(len(found), dtype=np.uint32)
    # A power cut may lose the first page of an old row that lies on two.
    is_old = found["check"] == slots ^ np.uint32(OLD_MARK)
    is_old &= (found["time"] > 0) & (found["time"] < _END_OF_TIME)
    crc = ~slots
    data = found.view(np.uint8).reshape(len(found), ROW_BYTES)
    for at in range(FIELDS.size):
        crc = _CRC_TABLE[(crc ^ data[:, at]) & 0xFF] ^ (crc >> 8)
        if at % 8 == 7:
            pause()
    return is_old | (~crc == found["check"])


def _has_texts(
    row: Any, slot: Any, keys: dict[int, tuple[str, str, str]], payloads: dict[int, str]
) -> Any:
    """Mask of the rows whose key, payload and kind are known."""
    highest = max(keys, default=-1) + 1
    is_key = np.zeros(highest + 1, bool)  # the last stands for all higher ones
    is_key[list(keys)] = True
    is_known = is_key[np.minimum(row["key"], highest)] | (row["kind"] == VOID)
    is_known &= row["kind"] < len(KINDS)
    for at in np.flatnonzero(row["flags"] & HAS_TEXT):
        is_known[at] &= int(slot[at]) in payloads
    return is_known


def _find_damage(
    path: Path, rows: bytes, is_complete: Any, num_used: int
) -> list[Damage]:
    """Find torn rows, and a file that is too short or too long."""
    num_slots = len(is_complete)
    damage = []
    empty = np.flatnonzero(~is_complete[:num_used])
    raw = np.frombuffer(rows, np.int64, num_used * _WORDS).reshape(num_used, _WORDS)
    torn = empty[raw[empty].any(axis=1)]
    if len(torn):
        reason = "rows that were torn while being written, or changed later"
        damage.append(Damage(path, int(torn[0]) * ROW_BYTES, len(torn), reason))
    if num_slots < CAPACITY:
        reason = "the file is cut short: at most so many rows were there"
        damage.append(Damage(path, len(rows), CAPACITY - num_slots, reason))
    elif len(rows) > CAPACITY * ROW_BYTES:
        damage.append(Damage(path, CAPACITY * ROW_BYTES, 0, "more bytes than rows"))
    return damage


def _build_table(
    row: Any,
    slot: Any,
    first_seq: int,
    rank: int,
    keys: dict[int, tuple[str, str, str]],
    payloads: dict[int, str],
    pause: Callable[[], None],
) -> pa.Table:
    kind, key = row["kind"], row["key"]
    columns = [
        make_array(slot + first_seq),
        make_array(np.full(len(row), rank, np.int32)),
        make_array(row["time"]).view(SCHEMA.field("time").type),
        *(_encode_words({k: v[i] for k, v in keys.items()}, key) for i in range(3)),
    ]
    pause()
    columns += [
        _make_nullable(row["index"], NO_COUNT),
        _make_nullable(row["epoch"], NO_EPOCH),
        _make_nullable(row["step"], NO_COUNT),
        _make_values(row["value"], kind),
        _make_payloads(row["flags"], slot, payloads),
        _encode_words(dict(enumerate(KINDS)), kind),
    ]
    pause()
    return pa.table(columns, schema=SCHEMA)


def _encode_words(words: dict[int, str], numbers: Any) -> pa.DictionaryArray:
    """Make the column of ``words[numbers[i]]``; only words in use enter the dictionary."""
    used: Any = np.flatnonzero(np.bincount(numbers)) if len(numbers) else []
    distinct: dict[str, int] = {}
    codes = np.zeros(len(used) and used[-1] + 1, np.int32)
    for number in used:
        codes[number] = distinct.setdefault(words[int(number)], len(distinct))
    names = make_texts([*distinct])
    return pa.DictionaryArray.from_arrays(make_array(codes[numbers]), names)


def _make_values(values: Any, kinds: Any) -> pa.Array:
    """Make the column ``value``; null in rows of a kind that has no number."""
    is_valued = np.zeros(len(KINDS), bool)
    is_valued[list(VALUED)] = True
    valued = is_valued[kinds]
    return make_array(values, None if valued.all() else ~valued)


def _make_payloads(flags: Any, slot: Any, payloads: dict[int, str]) -> pa.Array:
    """Make the column ``payload``; null in rows that have none."""
    having = np.flatnonzero(flags & HAS_TEXT)
    if not len(having):
        return pa.nulls(len(flags), pa.string())
    places = np.zeros(len(flags), np.int32)
    places[having] = np.arange(len(having))
    absent = np.ones(len(flags), bool)
    absent[having] = False
    texts = make_texts([payloads[int(number)] for number in slot[having]])
    return texts.take(make_array(places, absent))


def _make_nullable(numbers: Any, null: int) -> pa.Array:
    """Make a column of integers, in which ``null`` stands for null."""
    absent = numbers == null
    if absent.all():
        return pa.nulls(len(numbers), pa.from_numpy_dtype(numbers.dtype))
    return make_array(numbers, absent if absent.any() else None)


def _parse_texts(
    data: bytes, pause: Callable[[], None]
) -> tuple[dict[int, tuple[str, str, str]], dict[int, str], int | None]:
    """Parse a file of texts into keys, payloads and the offset of the first torn entry."""
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
    """Return tag, number and text of the entry at an offset; None if it is torn."""
    start = at + _ENTRY.size
    if len(data) < start:
        return None
    sign, tag, number, length, check = _ENTRY.unpack_from(data, at)
    text = data[start : start + length]
    if sign != _SIGN or len(text) != length or _checksum(tag, number, text) != check:
        return None
    return tag, number, text


def _checksum(tag: int, number: int, data: bytes) -> int:
    """Checksum of a text, its tag, number and length."""
    return zlib.crc32(data, zlib.crc32(struct.pack("<BII", tag, number, len(data))))
