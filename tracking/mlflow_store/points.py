"""The points that MLflow is to have: numeric rows of the journal in MLflow's terms.

MLflow keeps times in milliseconds, infinities as the largest floats, and equal points
of one millisecond once. So a point that repeats another gets the next free millisecond.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.mlflow_store.keys import KeyMap, SeriesId

NOT_METRICS: Final = ("params", "tags", "artifacts", "inputs")
"""``what`` of the rows that are something else to MLflow."""

POINTS: Final = pa.schema(
    [
        pa.field("seq", pa.int64()),
        pa.field("key", pa.dictionary(pa.int32(), pa.string())),
        pa.field("time_ms", pa.int64()),
        pa.field("step", pa.int64()),
        pa.field("value", pa.float64()),
        pa.field("row", pa.int64()),
    ]
)
"""Columns of points; ``row`` is the place in the table they were made of."""

_NUMERIC: Final = pa.array(["float", "int", "bool"])


def distinct_series(table: pa.Table) -> tuple[list[SeriesId], np.ndarray[Any, Any]]:
    """Series in a table in order of first appearance, and each row's place in them."""
    if not table.num_rows:
        return [], np.empty(0, np.int64)
    code = np.zeros(table.num_rows, np.int64)
    for name in ("what", "set", "name"):
        column = table[name].combine_chunks()
        code = code * max(1, len(column.dictionary)) + column.indices.to_numpy()
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    heads = table.select(["what", "set", "name"]).take(np.sort(first)).to_pydict()
    series = list(zip(heads["what"], heads["set"], heads["name"], strict=True))
    return series, rank[inverse]


def is_metric(table: pa.Table) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Mask of the rows that are points to MLflow."""
    what, kind = (table[name].cast(pa.string()) for name in ("what", "kind"))
    other = pc.is_in(what, pa.array(NOT_METRICS))
    return np.asarray(pc.and_not(pc.is_in(kind, _NUMERIC), other))


def points_table(table: pa.Table, keys: KeyMap) -> pa.Table:
    """Points that a table's numeric rows are, in its order, as `POINTS` has them.

    Parameters
    ----------
    table
        Rows in the public schema, only such as count.
    keys
        Of MLflow's metrics; new series are added.
    """
    where = np.flatnonzero(is_metric(table))
    rows = table.take(where)
    series, place = distinct_series(rows)
    words = pa.array([keys.of(one) for one in series], pa.string())
    by_step = np.array([what == "steps" for what, _, _ in series], bool)[place]
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
        pa.array(where),
    ]
    return pa.table(arrays, schema=POINTS)


@dataclass
class UniqueTimestamps:
    """Times that tell repeated points apart.

    Of two equal points in one millisecond the later gets the next that is free. Only
    the last few ten thousand points are remembered, which no millisecond exceeds.
    """

    window: int = 32_768
    _recent: dict[tuple[Any, ...], None] = field(default_factory=dict)
    _older: dict[tuple[Any, ...], None] = field(default_factory=dict)

    def settled(self, points: pa.Table) -> pa.Table:
        """Points with times that differ where nothing else does."""
        step, value = (points[name].to_pylist() for name in ("step", "value"))
        key, times = points["key"].to_pylist(), points["time_ms"].to_pylist()
        for i, (name, number, at, time_ms) in enumerate(
            zip(key, value, step, times, strict=True)
        ):
            if number != number:  # NaN, which equals nothing
                number = None
            while (name, at, number, time_ms) in self:
                time_ms += 1
            times[i] = time_ms
            self._remember((name, at, number, time_ms))
        column = points.schema.get_field_index("time_ms")
        return points.set_column(
            column, POINTS.field("time_ms"), pa.array(times, "int64")
        )

    def __contains__(self, point: object) -> bool:
        return point in self._recent or point in self._older

    def _remember(self, point: tuple[Any, ...]) -> None:
        if len(self._recent) >= self.window:
            self._older, self._recent = self._recent, {}
        self._recent[point] = None
