"""Records of logged values in memory, and the run of a fit without tracking."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from harness.pytree import named_leaves

if TYPE_CHECKING:
    import pandas as pd

MAX_TEXT = 60
"""Characters of a value in a table of metrics."""

MAX_GAP = 1000
"""A list is padded with None up to here; beyond, it becomes a ``SparseList``."""


class SparseList(Sequence[Any]):
    """A list whose items are None but for a few, of which it keeps only those.

    A series of records is one if an index was far beyond its end. It is read as a list.

    Parameters
    ----------
    items
        The items that are kept, by place from 0.
    length
        Items in all; at least one more than the highest place.
    """

    def __init__(self, items: Mapping[int, object], length: int) -> None:
        self.items = dict(items)
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, at: Any) -> Any:
        """Item at a place, or another sparse list of the places of a slice."""
        places = range(self._length)[at]  # IndexError as of a list
        if isinstance(places, int):
            return self.items.get(places)
        found = {places.index(n): item for n, item in self.items.items() if n in places}
        return SparseList(found, len(places))

    def __setitem__(self, place: int, item: object) -> None:
        """Set an item; a place from 0 may lie behind the end."""
        self.items[place] = item
        self._length = max(self._length, place + 1)

    def __eq__(self, other: object) -> bool:
        """Whether a list, or another sparse list, has the same items."""
        if not isinstance(other, SparseList | list) or len(self) != len(other):
            return False
        return dict(iter_filled(self)) == dict(iter_filled(other))

    __hash__ = None  # type: ignore[assignment]  # as a list

    def __repr__(self) -> str:
        return f"SparseList({self.items}, {self._length})"


Series = list[Any] | SparseList
Records = dict[str, dict[str, Series]]
"""Series of logged values by `what` and set."""

Packed = dict[str, dict[str, list[Any] | dict[str, object]]]
"""Records as files have them: the length and the items of a ``SparseList`` are a dict."""


def iter_filled(
    series: Series, first: int = 1, last: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Index and value of the items that are not None, in order.

    Parameters
    ----------
    first, last : >= 1
        Indices to begin and to end at; None: the end of the series.
    """
    places = range(len(series))[max(first - 1, 0) : last]
    if isinstance(series, SparseList):
        kept = series.items
        if len(places) > len(kept):
            found = sorted(place for place in kept if place in places)
        else:
            found = [place for place in places if place in kept]
        pairs = ((place + 1, kept[place]) for place in found)
    else:
        pairs = ((place + 1, series[place]) for place in places)
    return (pair for pair in pairs if pair[1] is not None)


def pack_records(records: Records) -> Packed:
    """Records for files."""
    return {
        what: {
            split: {"length": len(series), "items": [*map(list, iter_filled(series))]}
            if isinstance(series, SparseList)
            else series
            for split, series in sets.items()
        }
        for what, sets in records.items()
    }


def unpack_records(packed: Packed) -> Records:
    """Records that ``pack_records`` packed."""
    return {
        what: {
            split: _unpack_series(series, f"records/{what}/{split}")
            for split, series in sets.items()
        }
        for what, sets in packed.items()
    }


def _unpack_series(series: Any, place: str) -> Series:
    if isinstance(series, list):
        return series
    if not isinstance(series, dict) or series.keys() != {"length", "items"}:
        msg = f"{place}: expected a list, got {type(series).__name__}."
        raise TypeError(f"{msg} The file is damaged or from another version.")
    items = {index - 1: value for index, value in series["items"]}
    return SparseList(items, max([series["length"], *(place + 1 for place in items)]))


ARRAYS = (Tensor, np.ndarray, np.generic)
"""Types that are logged unread and become plain numbers when the records are read."""


class RecordBook:
    """Logged values in memory; tensors stay on their device until the records are read.

    Parameters
    ----------
    records
        Initial records; None: none.

    Attributes
    ----------
    values : dict
        The records, with unread tensors; ``read`` returns them as plain numbers.
    """

    def __init__(self, records: Records | None = None) -> None:
        if records is None:
            records = {"metrics": {"train": [], "valid": []}}
        self.values = records
        self._unread: list[tuple[Any, Any]] = []  # containers and keys of tensors

    def get_series(self, what: str, set: str) -> Series:
        """The series of a set, with its tensors unread; an empty list if there is none."""
        return self.values.get(what, {}).get(set, [])

    def check_index(self, what: str, set: str, index: int | None) -> int:
        """Return the index to log at, from 1; None stands for the end of the series.

        Raises
        ------
        ValueError
            If the index is below 1.
        """
        if index is None:
            return len(self.get_series(what, set)) + 1
        if index < 1:
            msg = f"ctx.log(index): expected an index from 1, got {index!r}."
            raise ValueError(f"{msg} Leave it out to add at the end.")
        return index

    def get(self, what: str, set: str, index: int | None = None) -> Any:
        """Value at an index from 1, or the last one; None if there is none."""
        series = self.read().get(what, {}).get(set, [])
        at = len(series) if index is None else index
        return series[at - 1] if 1 <= at <= len(series) else None

    def add(self, what: str, set: str, value: object, index: int, append: bool) -> None:
        """Add a value at an index from 1, or replace what is there."""
        sets = self.values.setdefault(what, {})
        series = sets.setdefault(set, [])
        if len(series) < index:
            series = sets[set] = self._lengthen(series, index)
        current = series[index - 1]
        series[index - 1] = append_logged(current, value) if append else value
        self._remember_tensors(series, index - 1)

    def _lengthen(self, series: Series, length: int) -> Series:
        """Add None up to a length; return the list, or a sparse one in its place."""
        if isinstance(series, list) and length <= len(series) + MAX_GAP:
            series.extend([None] * (length - len(series)))
            return series
        sparse = SparseList({n - 1: item for n, item in iter_filled(series)}, length)
        self._unread = [
            (sparse if container is series else container, key)
            for container, key in self._unread
        ]
        return sparse

    def _remember_tensors(self, container: Any, key: Any) -> None:
        value = container[key]
        if isinstance(value, ARRAYS):
            self._unread.append((container, key))
        elif isinstance(value, dict):
            for name in value:
                self._remember_tensors(value, name)
        elif isinstance(value, list):
            for place in range(len(value)):
                self._remember_tensors(value, place)

    def read(self) -> Records:
        """All records, with tensors and arrays as plain numbers."""
        for container, key in self._unread:
            if isinstance(container[key], ARRAYS):
                container[key] = container[key].tolist()
        self._unread.clear()
        return self.values

    def replace(self, records: Records) -> RecordBook:
        """Return a book of other records; warn if training metrics are lost."""
        if self.get_series("metrics", "train"):
            msg = "unsafe_set_records: expected no training metrics, got some. They are lost."
            warnings.warn(msg, stacklevel=3)
        return RecordBook(records)

    def count(self) -> dict[str, dict[str, int]]:
        """Length of each series; nothing is read from a device."""
        return {
            what: {split: len(series) for split, series in sets.items()}
            for what, sets in self.values.items()
        }


class NullRun:
    """A run that takes every call of a ``tracking.Run`` and records nothing.

    It stands in ``ctx.run`` where tracking is off, so that a model or callback may call
    ``ctx.run.log_figure(...)`` without asking first.

    Parameters
    ----------
    check_value
        Called with each logged value and the name of the call. It raises for a value that
        a run would refuse. None: every value is accepted.
    check_item
        The same for images, tables and histograms: called with the name of the method and
        its arguments.

    Attributes
    ----------
    id, path, mlflow_run_id
        None: there is no run.
    fit
        1: nothing is recorded of an earlier fit.
    """

    id: None = None
    fit: int = 1
    path: None = None
    mlflow_run_id: None = None

    def __init__(
        self,
        check_value: Callable[[object, str], object] | None = None,
        check_item: Callable[..., object] | None = None,
    ) -> None:
        self._check_value = check_value
        self._check_item = check_item or self._drop

    def log(self, what: str, set: str, value: object, *_: object, **__: object) -> None:
        """Check the value and drop it."""
        if self._check_value is not None:
            self._check_value(value, f"log({what!r}, {set!r})")

    def log_metric(
        self, name: str, value: object, step: int | None = None, **_: object
    ) -> None:
        """Check the value and drop it."""
        if self._check_value is not None:
            self._check_value({name: value}, "log_metric")

    def log_step(
        self,
        values: Mapping[str, object],
        step: int,
        *,
        set: str = "train",
        **_: object,
    ) -> None:
        """Check the values and drop them."""
        if self._check_value is not None:
            self._check_value(values, f"log_step(set={set!r})")

    def log_image(self, name: str, image: object, **options: object) -> None:
        """Check the image and drop it."""
        self._check_item("log_image", name, image, **options)

    def log_table(self, name: str, table: object, **options: object) -> None:
        """Check the table and drop it."""
        self._check_item("log_table", name, table, **options)

    def log_histogram(self, name: str, values: object, **options: object) -> None:
        """Check the values and drop them."""
        self._check_item("log_histogram", name, values, **options)

    def position(self) -> int:
        """Position before the first row."""
        return -1

    def get_indices(self) -> None:
        """Nothing is indexed."""

    def begin_fit(self, number: int | None = None) -> int:
        """Return the number, or 1."""
        return number or 1

    def wait(self, timeout_s: float | None = None) -> bool:
        """Return True: there is nothing to wait for."""
        return True

    def _drop(self, *_: object, **__: object) -> None:
        pass

    log_params = set_tags = log_input = log_artifact = log_figure = log_text = _drop
    flush = rewind = restore_indices = restore_indices_later = save_manifest = (
        deliver
    ) = finish = _drop
    end_fit = _drop


def metrics_frame(
    records: Records, unit: str = "epoch", first: int = 1, last: int | None = None
) -> pd.DataFrame:
    """Metric records as a DataFrame with the columns set, metric, epoch, value.

    The third column is called `unit`, after what the indices of the records count. Only
    those from `first` to `last` are looked at.
    """
    import pandas as pd  # noqa: PLC0415  slow to import, seldom used

    rows = [*iter_metrics(records, first, last)]
    return pd.DataFrame(rows, columns=["set", "metric", unit, "value"])


def iter_metrics(
    records: Records, first: int = 1, last: int | None = None
) -> Iterator[tuple[str, str, int, Any]]:
    """Iterate over set, name, index and value of each metric."""
    for split, series in records.get("metrics", {}).items():
        for index, metrics in iter_filled(series, first, last):
            if isinstance(metrics, Mapping):
                for name, value in named_leaves(metrics):
                    yield split, name, index, value


def format_metrics(metrics: Mapping[str, object]) -> dict[str, str]:
    """Format metrics with four significant digits, by name; nested names are joined."""
    return {name: format_value(value) for name, value in named_leaves(metrics)}


def format_value(value: object) -> str:
    """Format a metric: a number with four digits, and of a long value, such as a matrix, a part.

    Examples
    --------
    >>> format_value(0.123456), format_value([[10, 0], [7, 3]])
    ('0.1235', '[[10, 0], [7, 3]]')
    """
    if isinstance(value, int | float):
        return f"{value:.4g}"
    text = str(value)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}..."


def copy_logged(value: object) -> Any:
    """Copy a value: tensors are detached and stay on their device; tuples become lists."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray | np.generic):
        return value.copy()
    if isinstance(value, dict):
        return {name: copy_logged(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [copy_logged(item) for item in value]
    return value


def append_logged(current: object, value: object) -> Any:
    """Add a value to what was logged before at the same index."""
    if current is None:
        return value
    if isinstance(current, dict) and isinstance(value, dict):
        return {**current, **value}
    old = current if isinstance(current, list) else [current]
    return old + (value if isinstance(value, list) else [value])
