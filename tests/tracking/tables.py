"""Compare tables of records in the tests."""

from __future__ import annotations

import pyarrow as pa


def floats(table):
    return table["value"].to_pylist()


def plain(table):
    """Replace dictionary codes, whose order does not matter, by their words."""
    words = dict.fromkeys(("what", "set", "name", "kind"), pa.string())
    return table.cast(
        pa.schema([f.with_type(words.get(f.name, f.type)) for f in table.schema])
    )


def same(first, second):
    return plain(first).equals(plain(second))
