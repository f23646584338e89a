"""Metric points for MLflow, made from the numeric rows of the journal.

MLflow stores times in milliseconds and infinities as the largest floats. It stores two
equal points of the same millisecond once, so a repeated point gets the next free
millisecond.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.journal.fits import get_fits
from tracking.mlflow_store.client import Point
from tracking.mlflow_store.keys import KeyMap, SeriesId

NON_METRICS: Final = ("params", "tags", "artifacts", "inputs")
"""``what`` of the rows that MLflow does not store as metrics."""

POINTS: Final = pa.schema(
    [
        pa.field("seq", pa.int64()),
        pa.field("key", pa.dictionary(pa.int32(), pa.string())),
        pa.field("time_ms", pa.int64()),
        pa.field("step", pa.int64()),
        pa.field("value", pa.float64()),
    ]
)
"""Columns of a table of points."""

_NUMERIC: Final = pa.array(["float", "int", "bool"])


def distinct_series(table: pa.Table) -> tuple[list[SeriesId], np.ndarray[Any, Any]]:
    """List the series in a table, and number each row's series.

    Returns
    -------
    series in order of first appearance, and for each row its place in that list
    """
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

    Returns
    -------
    table with the schema `POINTS`
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
    columns = (table[name].to_pylist() for name in ("key", "value", "time_ms", "step"))
    return [Point(*row) for row in zip(*columns, strict=True)]


@dataclass
class UniqueTimestamps:
    """Gives equal points of the same millisecond different times.

    The later of two equal points gets the next free millisecond. Only the last few ten
    thousand points are remembered: no millisecond has more.
    """

    window: int = 32_768
    _recent: dict[tuple[Any, ...], None] = field(default_factory=dict)
    _older: dict[tuple[Any, ...], None] = field(default_factory=dict)

    def assign(self, points: pa.Table) -> pa.Table:
        """Replace the times of points that repeat an earlier one."""
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
