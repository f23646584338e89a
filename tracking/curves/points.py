"""The points of a run's metrics, sorted once by name.

What asks for one name after the other looks at its part of the arrays, so the cost is in
rows plus names, not in rows times names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from pyarrow import compute as pc

from tracking.curves.charts import Array, Line
from tracking.journal.arrays import make_array, mask_first, read_array
from tracking.journal.fits import COLUMN, get_fits, name_in_fit
from tracking.schema import find_free_name

FIT: Final = COLUMN.name
INDEX: Final = "index"


class SeriesName(NamedTuple):
    """Name of a series."""

    set: str
    name: str
    #: whether its places are steps: of ``log_step``, or of a metric without index
    is_step: bool

    @property
    def key(self) -> str:
        """``<set>/<name>``, at steps ``<set>/<name>_step``, as in MLflow."""
        return "/".join(filter(None, (self.set, self.name))) + self._ending

    @property
    def metric(self) -> str:
        """Name of the metric alone."""
        return (self.name or self.set) + self._ending

    @property
    def _ending(self) -> str:
        return "_step" if self.is_step else ""


@dataclass(frozen=True)
class MetricPoints:
    """Points of the numeric metrics of a run, in order of name, fit and place."""

    names: list[SeriesName]  #: name of each series, in order of appearance
    keys: list[str]  #: the key of each series; keys that meet are numbered
    series: Array  #: place in ``names`` of each point
    #: Fit of each point, its index, or step, and its number. Where several values were
    #: logged at one place, the last one of the lowest rank.
    fit: Array
    place: Array
    value: Array
    has_fits: bool  #: whether the run has several fits

    @cached_property
    def _starts(self) -> Array:
        """Where the points of each series begin, and the end of all."""
        return np.searchsorted(self.series, np.arange(len(self.names) + 1))

    def find(self, number: int) -> slice:
        """Where the points of a series are."""
        return slice(int(self._starts[number]), int(self._starts[number + 1]))

    def find_last_fit(self) -> int:
        """Return the number of the last fit; 1 if there is no point."""
        return int(self.fit.max(initial=1))

    def get_line(self, number: int, fit: int) -> Line:
        """Return the places and values of a series that one fit logged."""
        at = self.find(number)
        start, end = at.start + np.searchsorted(self.fit[at], [fit, fit + 1])
        return self.place[start:end], self.value[start:end]

    def summarize(self) -> dict[str, dict[str, float]]:
        """Return ``last``, ``min``, ``max`` and ``count`` of each series, by fit and key."""
        if not len(self.value):
            return {}
        starts = np.flatnonzero(mask_first(self.series, self.fit))
        ends = np.append(starts[1:], len(self.value))
        columns = {
            "last": self.value[ends - 1].tolist(),
            # A NaN is passed over, unless there is nothing else.
            "min": np.fmin.reduceat(self.value, starts).tolist(),
            "max": np.fmax.reduceat(self.value, starts).tolist(),
            "count": (ends - starts).tolist(),
        }
        series, fit = self.series[starts], self.fit[starts]
        found: dict[str, dict[str, float]] = {}
        for at in np.lexsort((series, fit)).tolist():
            name = name_in_fit(self.keys[series[at]], int(fit[at]))
            name = find_free_name(name, found)
            found[name] = {word: numbers[at] for word, numbers in columns.items()}
        return found

    def widen(self) -> pa.Table:
        """Return a table with a row for each place and a column for each series."""
        order = np.lexsort((self.place, self.fit))
        fit, place = self.fit[order], self.place[order]
        is_new = mask_first(fit, place)
        row = np.empty(len(order), np.int64)
        row[order] = np.cumsum(is_new) - 1
        columns = {FIT: make_array(fit[is_new])} if self.has_fits else {}
        columns[INDEX] = make_array(place[is_new])
        num_rows = len(columns[INDEX])
        for number, key in enumerate(self.keys):
            at = self.find(number)
            columns[key] = _spread(self.value[at], row[at], num_rows)
        return pa.table(columns)

    def iter_places(self, skip: int = 0) -> Iterator[dict[str, float]]:
        """Yield what each place has: ``fit`` if there are several, ``index``, and values.

        Parameters
        ----------
        skip
            Places to leave out at the beginning.
        """
        order = np.lexsort((self.series, self.place, self.fit))
        if skip:
            starts = np.flatnonzero(mask_first(self.fit[order], self.place[order]))
            order = order[starts[skip] :] if skip < len(starts) else order[:0]
        heads = (self.fit, self.place) if self.has_fits else (self.place,)
        words = (FIT, INDEX) if self.has_fits else (INDEX,)
        head: tuple[Any, ...] = ()
        found: dict[str, float] = {}
        columns = [column[order].tolist() for column in (*heads, self.series)]
        values = self.value[order].tolist()
        for *new, series, value in zip(*columns, values, strict=True):
            if tuple(new) != head:
                if found:
                    yield found
                head = tuple(new)
                found = dict(zip(words, head, strict=True))
            found[self.keys[series]] = value
        if found:
            yield found


def collect_points(records: pa.Table) -> MetricPoints:
    """Collect the points of a run's metrics from its live rows.

    Parameters
    ----------
    records
        Rows of all ranks in the public schema, as ``Snapshot.records`` has them.
    """
    has_fits = FIT in records.column_names
    what, words = encode_names(records["what"])
    codes = [words.index(word) for word in ("metrics", "steps") if word in words]
    has_index = read_array(pc.is_valid(records["index"]))
    has_place = has_index | read_array(pc.is_valid(records["step"]))
    is_shown = has_place & read_array(pc.is_valid(records["value"]))
    # Metrics come before steps.
    places = [np.flatnonzero(is_shown & (what == code)) for code in codes]
    rows = np.concatenate([np.empty(0, np.int64), *places])
    series, names = _number_series(records, rows, has_index)
    place = read_array(pc.coalesce(records["index"], records["step"]))
    fit, place = get_fits(records)[rows], place[rows]
    # Ranks are in rising order: backwards, the lowest rank's value is the last.
    order = np.argsort(-read_array(records["rank"])[rows], kind="stable")
    narrow = series.astype(np.min_scalar_type(len(names)))  # 16 bits are sorted quickly
    order = order[np.lexsort((place[order], fit[order], narrow[order]))]
    series, fit, place = series[order], fit[order], place[order]
    is_last = np.ones(len(order), bool)
    is_last[:-1] = mask_first(series, fit, place)[1:]
    return MetricPoints(
        names=names,
        keys=_name_columns(names, has_fits=has_fits),
        series=series[is_last],
        fit=fit[is_last],
        place=place[is_last],
        value=read_array(records["value"])[rows[order[is_last]]],
        has_fits=has_fits,
    )


def encode_names(column: pa.ChunkedArray) -> tuple[Array, list[str]]:
    """Return a number for the word of each row, and the words."""
    coded = pa.chunked_array(column.chunks, column.type).unify_dictionaries()
    if not len(coded):
        return np.empty(0, np.int64), []
    # In a file of somebody else a word may be there twice, or be null.
    words = [word or "" for word in (*coded.chunk(0).dictionary.to_pylist(), "")]
    numbers: dict[str, int] = {}
    merged = [numbers.setdefault(word, len(numbers)) for word in words]
    codes = [read_array(chunk.indices, len(words) - 1) for chunk in coded.chunks]
    places = np.concatenate(codes)
    return np.array(merged, np.int64)[places], list(numbers)


def _number_series(
    records: pa.Table, rows: Array, has_index: Array
) -> tuple[Array, list[SeriesName]]:
    """Number the series of rows, and name them, in order of appearance."""
    split, splits = encode_names(records["set"])
    name, words = encode_names(records["name"])
    pair = (split[rows] * len(words) + name[rows]) * 2 + ~has_index[rows]
    coded = make_array(pair).dictionary_encode()
    names = []
    for number in coded.dictionary.to_pylist():
        number, is_step = divmod(number, 2)
        split_at, name_at = divmod(number, len(words))
        names.append(SeriesName(splits[split_at], words[name_at], bool(is_step)))
    return read_array(coded.indices).astype(np.int64), names


def _name_columns(names: list[SeriesName], *, has_fits: bool) -> list[str]:
    """Name the columns of a wide table: ``<set>/<name>``."""
    keys: dict[str, None] = {INDEX: None}  # the other columns of the table
    if has_fits:
        keys[FIT] = None
    num_others = len(keys)
    for one in names:
        keys[find_free_name(one.key, keys)] = None
    return [*keys][num_others:]


def _spread(values: Array, rows: Array, num_rows: int) -> pa.Array:
    """Make a column with values in some rows, and null in the others."""
    if len(values) == num_rows:
        return make_array(values)
    column, is_absent = np.zeros(num_rows), np.ones(num_rows, bool)
    column[rows], is_absent[rows] = values, False
    return make_array(column, is_absent)
