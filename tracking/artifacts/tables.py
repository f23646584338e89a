"""Tables: columns of any usual library as JSON that MLflow's page and pandas read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final

import numpy as np

from tracking.artifacts.arrays import as_array
from tracking.artifacts.images import is_picture
from tracking.schema import find_free_name, is_tensor

MAX_CELLS: Final = 250_000
"""Rows times columns; MLflow's page reads the whole file."""

MAX_TEXT: Final = 10_000
"""Characters of a cell."""

MAX_PICTURES: Final = 1000

Columns = tuple[list[str], list[list[Any]]]
"""Names, and the rows."""


def make_table(
    table: Any,
    place: str,
    *,
    mask: Callable[[str, Any], Any],
    save_picture: Callable[[Any], Any],
) -> dict[str, Any]:
    """Turn a table of any usual form into plain columns and rows.

    Parameters
    ----------
    table
        Dictionary of columns, list of rows (dictionaries or lists), table of pandas,
        pyarrow or polars, or array of two dimensions. A dictionary of plain values is one
        row.
    mask
        Called with the column's name and a cell, or with ``""`` and the column's name;
        masks the secrets in it.
    save_picture
        Called with a cell that is a picture; returns what stands for it in the table.

    Returns
    -------
    dict
        ``columns`` and ``data``, a list for each row, as in ``orient="split"`` of pandas.
        NaN becomes None, as in JSON; what has no number or text of its own, its text.
    """
    names, rows = _read_table(table, place)
    num_cells = len(names) * len(rows)
    if num_cells > MAX_CELLS:
        raise ValueError(
            f"{place}: expected at most {MAX_CELLS} cells, got {num_cells}. "
            "Write it to a Parquet file and use log_artifact."
        )
    num_pictures = sum(is_picture(cell) for row in rows for cell in row)
    if num_pictures > MAX_PICTURES:
        raise ValueError(
            f"{place}: expected at most {MAX_PICTURES} images, got {num_pictures}. "
            "Log fewer rows."
        )

    def convert(name: str, cell: Any) -> Any:
        return save_picture(cell) if is_picture(cell) else mask(name, _as_plain(cell))

    data = [
        [convert(name, cell) for name, cell in zip(names, row, strict=True)]
        for row in rows
    ]
    columns: list[str] = []
    for name in names:
        columns.append(find_free_name(mask("", name), columns))
    return {"columns": columns, "data": data}


def encode_table(table: Mapping[str, Any]) -> bytes:
    """Return a table of ``make_table`` as JSON."""
    return json.dumps(table, separators=(",", ":")).encode()


def _read_table(table: Any, place: str) -> Columns:
    if hasattr(table, "itertuples") and hasattr(table, "reset_index"):  # pandas
        is_numbered = type(table.index).__name__ == "RangeIndex"
        frame = table if is_numbered else table.reset_index()
        names = [_as_name(name) for name in frame.columns]
        return names, [list(row) for row in frame.itertuples(index=False, name=None)]
    if hasattr(table, "to_arrow"):  # polars
        table = table.to_arrow()
    if hasattr(table, "to_pydict") and hasattr(table, "column_names"):  # pyarrow
        names = [str(name) for name in table.column_names]
        columns = [table.column(at).to_pylist() for at in range(len(names))]
        return names, [list(row) for row in zip(*columns, strict=True)]
    if isinstance(table, Mapping):
        return _read_columns(table, place)
    if is_tensor(table) or hasattr(table, "__array__"):
        return _read_rows(as_array(table, place), table, place)
    if isinstance(table, Sequence) and not isinstance(table, str | bytes):
        return _read_rows(table, table, place)
    raise _type_error(table, place)


def _read_columns(table: Mapping[Any, Any], place: str) -> Columns:
    columns = {_as_name(name): _as_cells(cells) for name, cells in table.items()}
    lengths = {n: len(cells) for n, cells in columns.items() if isinstance(cells, list)}
    if len({*lengths.values()}) > 1:
        raise ValueError(
            f"{place}: expected columns of one length, got {lengths}. "
            "Give each column a value for each row."
        )
    num_rows = max(lengths.values(), default=1 if columns else 0)
    full = [
        cells if isinstance(cells, list) else [cells] * num_rows
        for cells in columns.values()
    ]
    return list(columns), [list(row) for row in zip(*full, strict=True)]


def _read_rows(rows: Iterable[Any], table: Any, place: str) -> Columns:
    if getattr(rows, "ndim", 2) != 2:
        raise _type_error(table, place)
    rows = list(rows)
    if rows and all(isinstance(row, Mapping) for row in rows):
        names = list(dict.fromkeys(name for row in rows for name in row))
        words = [_as_name(name) for name in names]
        return words, [[row.get(name) for name in names] for row in rows]
    lists = [_as_cells(row) for row in rows]
    if not all(isinstance(row, list) for row in lists):
        raise _type_error(table, place)
    widths = sorted({len(row) for row in lists})
    if len(widths) > 1:
        raise ValueError(
            f"{place}: expected rows of one length, got rows of {widths[0]} and of "
            f"{widths[-1]} cells. Pass dictionaries where cells are missing."
        )
    return [str(at) for at in range(widths[0] if widths else 0)], lists


def _as_cells(values: Any) -> Any:
    """Return a column as a list; what is no column, as it is."""
    if isinstance(values, list | tuple):
        return list(values)
    if is_tensor(values):
        values = values.detach().cpu()
        return list(values) if values.ndim > 1 else values.tolist()
    if isinstance(values, str | bytes | Mapping) or not hasattr(values, "__len__"):
        return values
    is_flat = len(getattr(values, "shape", (0,))) < 2
    return values.tolist() if hasattr(values, "tolist") and is_flat else [*values]


def _as_name(name: object) -> str:
    """Text of a column's name; the levels of pandas are joined by ``/``."""
    if isinstance(name, tuple):
        return "/".join(map(str, name))
    return str(name)


def _as_plain(cell: Any, depth: int = 0) -> Any:
    """Return a cell as JSON has it."""
    if cell is None or isinstance(cell, bool | int):
        return cell
    if isinstance(cell, float) and (math.isfinite(cell) or math.isnan(cell)):
        return None if math.isnan(cell) else float(cell)
    if not isinstance(cell, np.datetime64 | np.timedelta64) and depth < 10:
        if is_tensor(cell) or isinstance(cell, np.generic | np.ndarray):
            return _as_plain(cell.tolist(), depth + 1)
        if isinstance(cell, list | tuple | set | frozenset):
            return [_as_plain(item, depth + 1) for item in cell]
        if isinstance(cell, Mapping):
            return {
                _cut(str(key)): _as_plain(item, depth + 1) for key, item in cell.items()
            }
    text = str(cell)
    return None if text in ("<NA>", "NaT") and not isinstance(cell, str) else _cut(text)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def _type_error(table: object, place: str) -> TypeError:
    return TypeError(
        f"{place}: expected a table, got {type(table).__name__}. Pass a dictionary of "
        "columns, a list of rows, or a table of pandas or pyarrow."
    )
