"""Read one rank's records: complete, torn, or while they are being written.

The folder of a rank contains blocks numbered from 0: ``000012.arrow`` when sealed, a
pair ``000012.rows`` and ``000012.text`` before. ``seq`` is block * CAPACITY + slot.
Reading changes nothing on the disk.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pyarrow as pa

from tracking.journal import row_format
from tracking.journal.arrays import make_array, make_empty_table, read_array
from tracking.journal.row_format import BlockContent
from tracking.journal.segment import (
    CAPACITY,
    Damage,
    read_first_seq,
    read_num_rows,
    read_segment,
)
from tracking.store import is_being_written

_BLOCK: Final = re.compile(r"([0-9]{6}|[1-9][0-9]{6,14})\.(?:arrow|rows)")

MAX_GAP: Final = 1000
"""Missing blocks before one that must prove that it is no stray file."""


SealedBlocks = dict[Path, BlockContent]
"""Sealed blocks by their files; they do not change any more."""


def get_segment_path(rank_dir: Path, number: int) -> Path:
    """Return the file of a sealed block."""
    return rank_dir / f"{number:06d}.arrow"


def list_blocks(rank_dir: Path) -> list[int]:
    """Return the numbers of the existing blocks, in order.

    Notes
    -----
    A file far behind all others is a block only if its rows have the ``seq`` that its
    name says. Else one stray file would look like millions of missing blocks.
    """
    if not rank_dir.is_dir():
        return []
    with os.scandir(rank_dir) as entries:
        matches = [_BLOCK.fullmatch(one.name) for one in entries if one.is_file()]
    blocks: list[int] = []
    for number in sorted({int(match[1]) for match in matches if match}):
        num_missing = number - blocks[-1] - 1 if blocks else number
        if num_missing <= MAX_GAP or _is_in_place(rank_dir, number):
            blocks.append(number)
    return blocks


def _is_in_place(rank_dir: Path, number: int) -> bool:
    """Whether a sealed block has the rows that its number says."""
    first = read_first_seq(get_segment_path(rank_dir, number))
    return first is not None and first // CAPACITY == number


def read_block(rank_dir: Path, number: int) -> BlockContent | None:
    """Read a block, sealed or open; None if it does not exist.

    Notes
    -----
    The writer may seal the block and remove the open pair while this looks for them, so
    both are tried more than once.
    """
    segment_path = get_segment_path(rank_dir, number)
    for _ in range(3):
        try:
            return BlockContent(*read_segment(segment_path))
        except (FileNotFoundError, IsADirectoryError):
            pass
        try:
            found = row_format.read_block_files(rank_dir, number)
        except FileNotFoundError:
            continue
        if not segment_path.is_file():
            return row_format.decode_block(rank_dir, number, *found)
    return None


def read_records(
    rank_dir: Path, known: SealedBlocks | None = None
) -> tuple[pa.Table, list[Damage]]:
    """Read all rows of a rank, including superseded and control rows.

    Parameters
    ----------
    rank_dir
        Folder of the rank's records, which may be being written.
    known
        Sealed blocks that are not read again; those that are read here are added.

    Returns
    -------
    rows in the public schema in order of ``seq``, and what could not be read

    Notes
    -----
    While the records are being written, incomplete rows are left out and are not
    reported as damage.
    """
    damage: list[Damage] = []
    found = read_blocks(rank_dir, damage, known)
    return concat_rows([content.table for _, content in found]), damage


def read_blocks(
    rank_dir: Path, damage: list[Damage], known: SealedBlocks | None = None
) -> Iterator[tuple[int, BlockContent]]:
    """Yield the number and the content of each block, as ``read_records``.

    What could not be read is added to ``damage``.
    """
    is_live = is_being_written(rank_dir)
    expected = 0
    for number in list_blocks(rank_dir):
        path = get_segment_path(rank_dir, number)
        content = known.get(path) if known else None
        content = content or read_block(rank_dir, number)
        if content is None:
            continue
        if known is not None and content.is_sealed:
            known[path] = content
        if not is_live:
            damage += _describe_gap(rank_dir, expected, number)
        expected = number + 1
        if content.is_sealed or not is_live:
            damage += content.damage
        yield number, content


def concat_rows(tables: list[pa.Table]) -> pa.Table:
    """Concatenate tables of rows, whose words get one dictionary."""
    if not tables:
        return make_empty_table()
    table = tables[0] if len(tables) == 1 else pa.concat_tables(tables)
    return table.unify_dictionaries()


def _describe_gap(rank_dir: Path, first: int, end: int) -> list[Damage]:
    """Damage for the missing blocks from a number to before another."""
    if first == end:
        return []
    missing = end - first
    reason = "the block is missing" if missing == 1 else f"{missing} blocks are missing"
    path = get_segment_path(rank_dir, first)
    return [Damage(path, 0, missing * CAPACITY, reason)]


@dataclass
class JournalReader:
    """Reads a rank's rows as they are written: in order, each once.

    Parameters
    ----------
    rank_dir
        Folder of the rank's records; it may not exist yet.
    after
        ``seq`` of the last row to skip; -1 for none.

    Notes
    -----
    While the records are being written, the reader stops at a row that is incomplete,
    since it may still be completed. Once there is no writer, it skips such a row.
    """

    rank_dir: Path
    after: int = -1
    _sealed: tuple[int, BlockContent] | None = None
    _counts: dict[int, int] = field(default_factory=dict)

    def read(self, max_rows: int = 10_000) -> pa.Table:
        """Read the next rows; an empty table if there are none yet.

        Parameters
        ----------
        max_rows : >= 1
            Fewer rows may be returned although there are more: call again until none
            are.
        """
        while True:
            # In this order: a writer that ends in between has written everything.
            is_live = is_being_written(self.rank_dir)
            present = list_blocks(self.rank_dir)
            number = (self.after + 1) // CAPACITY
            if number not in present:
                later = [n for n in present if n > number]
                if is_live or not later:
                    return make_empty_table()
                self.after = later[0] * CAPACITY - 1
                continue
            content = self._read_block(number)
            table = _select_rows(content, self.after, number, is_live=is_live)
            if table.num_rows:
                table = table.slice(0, max_rows)
                self.after = table["seq"][-1].as_py()
                return table
            is_done = content.is_sealed or content.frontier == CAPACITY or not is_live
            if not is_done or number == present[-1]:
                return make_empty_table()
            self.after = (number + 1) * CAPACITY - 1

    def count_unread(self) -> int:
        """Count the rows that exist and have not been read."""
        first = (self.after + 1) // CAPACITY
        count = 0
        for number in list_blocks(self.rank_dir):
            if number == first:
                table = self._read_block(number).table
                count += int((read_array(table["seq"]) > self.after).sum())
            elif number > first:
                count += self._count_rows(number)
        return count

    def _read_block(self, number: int) -> BlockContent:
        """Read a block; a sealed one is kept, since it is read in several steps."""
        if self._sealed and self._sealed[0] == number:
            return self._sealed[1]
        content = read_block(self.rank_dir, number)
        if content is None:  # somebody removed it after it was listed
            return BlockContent(make_empty_table(), [])
        self._sealed = (number, content) if content.is_sealed else None
        return content

    def _count_rows(self, number: int) -> int:
        """Count the rows of a block of which none was read."""
        with contextlib.suppress(FileNotFoundError):
            if number not in self._counts:
                path = get_segment_path(self.rank_dir, number)
                self._counts[number] = read_num_rows(path)
            return self._counts[number]
        try:
            return row_format.count_rows(self.rank_dir, number)
        except FileNotFoundError:  # it was sealed after the first look
            is_there = number in list_blocks(self.rank_dir)
            return self._count_rows(number) if is_there else 0


def _select_rows(
    content: BlockContent, after: int, number: int, *, is_live: bool
) -> pa.Table:
    """Select the rows of a block past ``after`` that will not change."""
    seq = read_array(content.table["seq"])
    wanted = seq > after
    if is_live and not content.is_sealed:
        end = number * CAPACITY + content.frontier
        wanted &= seq < end
    return content.table.filter(make_array(wanted))
