"""Metric points for MLflow, made from the numeric rows of the journal.

MLflow stores times in milliseconds and infinities as the largest floats. It stores two
equal points of the same millisecond once, so a repeated point gets the next free
millisecond.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.journal.fits import get_fits
from tracking.mlflow_store.client import HISTORY, Point
from tracking.mlflow_store.keys import KeyMap, SeriesId
from tracking.mlflow_store.matching import Hashes, Rows, hash_rows, row_ids

NON_METRICS: Final = ("params", "tags", "artifacts", "inputs")
"""``what`` of the rows that MLflow does not store as metrics."""

POINTS: Final = pa.schema([pa.field("seq", pa.int64()), *HISTORY])
"""Columns of a table of points."""

_TIME: Final = 3
"""Column of a row's time, after the key, the step and the value."""

_NUMERIC: Final = pa.array(["float", "int", "bool"])


def distinct_series(table: pa.Table) -> tuple[list[SeriesId], np.ndarray[Any, Any]]:
    """List the series in a table, and number each row's series."""
    if not table.num_rows:
        return [], np.empty(0, np.int64)
    fits = get_fits(table)
    code = fits.copy()
    for name in ("what", "set", "name"):
        column = table[name].combine_chunks()
        code = code * max(1, len(column.dictionary)) + column.indices.to_numpy()
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    heads = np.sort(first)
    words = table.select(["what", "set", "name"]).take(heads).to_pydict().values()
    series = map(SeriesId, *words, fits[heads].tolist())
    return list(series), rank[inverse]


def mask_metrics(table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mask of the rows that MLflow stores as metric points."""
    what, kind = (table[name].cast(pa.string()) for name in ("what", "kind"))
    other = pc.is_in(what, pa.array(NON_METRICS))
    return np.asarray(pc.and_not(pc.is_in(kind, _NUMERIC), other))


def points_table(table: pa.Table, keys: KeyMap) -> pa.Table:
    """Convert the numeric rows of a table to points, in the same order.

    Parameters
    ----------
    table
        Live rows in the public schema, perhaps with their fits; the columns ``rank``,
        ``epoch`` and ``payload`` may be absent.
    keys
        Of MLflow's metrics; new series are added.
    """
    rows = table.filter(pa.array(mask_metrics(table)))
    series, place = distinct_series(rows)
    words = pa.array([keys.key_for(one) for one in series], pa.string())
    by_step = np.array([one.what == "steps" for one in series], bool)[place]
    index, step = rows["index"], rows["step"]
    chosen = pc.if_else(
        pa.array(by_step, pa.bool_()),
        pc.coalesce(step, index, 0),
        pc.coalesce(index, step, 0),
    )
    largest = sys.float_info.max
    value = np.clip(rows["value"].to_numpy().astype(np.float64), -largest, largest)
    time_us = rows["time"].cast(pa.int64()).to_numpy()
    arrays = [
        rows["seq"].combine_chunks(),
        pa.DictionaryArray.from_arrays(pa.array(place, pa.int32()), words),
        pa.array(time_us // 1000),
        chosen.combine_chunks() if isinstance(chosen, pa.ChunkedArray) else chosen,
        pa.array(value),
    ]
    return pa.table(arrays, schema=POINTS)


def point_list(table: pa.Table) -> list[Point]:
    """Points of a table as objects, in the same order."""
    key = table["key"].combine_chunks()
    words = key.dictionary.to_pylist()
    keys = map(words.__getitem__, key.indices.to_numpy().tolist())
    # By way of numpy: Arrow makes an object of its own for each number.
    numbers = (table[name].to_numpy().tolist() for name in ("value", "time_ms", "step"))
    return list(map(Point, keys, *numbers))


@dataclass
class UniqueTimestamps:
    """Gives equal points of the same millisecond different times.

    The later of two equal points gets the next free millisecond. Only the last few ten
    thousand points are remembered: no millisecond has more.

    Parameters
    ----------
    window
        Number of points that are remembered at least.
    """

    window: int = 32_768
    _keys: dict[str, None] = field(default_factory=dict)
    _pages: deque[Rows] = field(default_factory=deque)
    _hashes: deque[Hashes] = field(default_factory=deque)

    def assign(self, points: pa.Table) -> pa.Table:
        """Replace the times of points that repeat an earlier one."""
        if not points.num_rows:
            return points
        for chunk in points["key"].chunks:
            self._keys |= dict.fromkeys(chunk.dictionary.to_pylist())
        keys = pa.array(self._keys, pa.string())
        rows = row_ids(points, keys, ["step", "value", "time_ms"])
        hashes = hash_rows(rows)
        if self._may_repeat(rows, hashes):
            self._move(rows)
            hashes = hash_rows(rows)
            times = pa.array(rows[:, _TIME])
            column = points.schema.get_field_index("time_ms")
            points = points.set_column(column, POINTS.field("time_ms"), times)
        self._pages.append(rows)
        self._hashes.append(hashes)
        while sum(map(len, self._pages)) - len(self._pages[0]) >= self.window:
            self._pages.popleft()
            self._hashes.popleft()
        return points

    def _may_repeat(self, rows: Rows, hashes: Hashes) -> bool:
        """Whether a row may equal an earlier one; only equal hashes are looked for."""
        if len(np.unique(hashes)) < len(hashes):
            return True
        since = rows[:, _TIME].min()
        found = zip(self._pages, self._hashes, strict=True)
        return any(
            np.isin(hashes, earlier[page[:, _TIME] >= since]).any()
            for page, earlier in found
            if page[:, _TIME].max() >= since
        )

    def _move(self, rows: Rows) -> None:
        """Give each row that repeats an earlier one the next free millisecond."""
        taken = {tuple(row) for page in self._pages for row in page.tolist()}
        for i, (*place, time_ms) in enumerate(rows.tolist()):
            while (*place, time_ms) in taken:
                time_ms += 1
            taken.add((*place, time_ms))
            rows[i, _TIME] = time_ms
