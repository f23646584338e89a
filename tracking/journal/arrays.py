"""Make Arrow arrays of NumPy arrays and texts, and back, without importing pandas.

pyarrow imports pandas, which takes a third of a second, as soon as it converts a value by
itself: in ``pa.array``, ``to_numpy``, ``np.asarray(column)``, ``Schema.empty_table``, and
where ``pyarrow.compute`` gets a Python value. A process that only logs needs none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pyarrow as pa

from tracking.schema import SCHEMA

_DTYPES: Final = {
    pa.from_numpy_dtype(np.dtype(name)): np.dtype(name)
    for name in ("bool", "int8", "int16", "int32", "int64", "float32", "float64")
}
_MAX_OFFSET: Final = np.iinfo(np.int32).max


def make_array(values: Any, is_null: Any = None) -> pa.Array:
    """Make an array of numbers or booleans, as ``pa.array(values, mask=is_null)``.

    Parameters
    ----------
    values : (n,)
        Not copied if contiguous, and not to be changed afterwards.
    is_null : (n,), bool
        None: there is no null.
    """
    data = _pack(values) if values.dtype == bool else np.ascontiguousarray(values)
    valid = None if is_null is None else pa.py_buffer(_pack(~is_null))
    type_ = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(type_, len(values), [valid, pa.py_buffer(data)])


def make_texts(texts: Sequence[str | None]) -> pa.Array | pa.ChunkedArray:
    """Make an array of texts, as ``pa.array(texts, pa.string())``."""
    encoded = [(text or "").encode() for text in texts]
    data = b"".join(encoded)
    if len(data) > _MAX_OFFSET:
        return pa.array(texts, pa.string())  # it takes several chunks
    ends = np.zeros(len(encoded) + 1, np.int32)
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    np.cumsum(lengths, dtype=np.int32, out=ends[1:])
    valid = None
    if None in texts:
        valid = pa.py_buffer(_pack(np.array([text is not None for text in texts])))
    buffers = [valid, pa.py_buffer(ends), pa.py_buffer(data)]
    return pa.Array.from_buffers(pa.string(), len(encoded), buffers)


def make_empty_table() -> pa.Table:
    """Make a table of records without rows."""
    return pa.table([pa.nulls(0, field.type) for field in SCHEMA], schema=SCHEMA)


def join_chunks(column: pa.ChunkedArray) -> pa.Array:
    """Make one array of the chunks, as ``combine_chunks``; there may be none."""
    return column.combine_chunks() if column.num_chunks else pa.nulls(0, column.type)


def read_array(column: pa.Array | pa.ChunkedArray, null: float = 0) -> Any:
    """Return numbers or booleans as a NumPy array; ``null`` stands for null.

    It may be read-only.
    """
    dtype = _DTYPES[column.type]
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = [_read_chunk(chunk, dtype, null) for chunk in chunks]
    return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, dtype), *parts])


def _read_chunk(chunk: pa.Array, dtype: Any, null: float) -> Any:
    if not len(chunk):
        return np.empty(0, dtype)
    data, end = chunk.buffers()[1], chunk.offset + len(chunk)
    if dtype.kind == "b":
        packed = np.frombuffer(data, np.uint8)
        values = np.unpackbits(packed, count=end, bitorder="little").view(bool)
    else:
        values = np.frombuffer(data, dtype, end)
    values = values[chunk.offset :]
    if chunk.null_count:
        values = values.copy()
        values[read_array(chunk.is_null())] = null
    return values


def mask_first(*columns: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mask of the rows of columns that differ from the row before them."""
    is_first = np.ones(len(columns[0]), bool)
    is_first[1:] = np.any([one[1:] != one[:-1] for one in columns], axis=0)
    return is_first


def _pack(mask: Any) -> Any:
    """Pack booleans into bits, as Arrow has them."""
    return np.packbits(mask, bitorder="little")
