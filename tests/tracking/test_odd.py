"""Random programs that log anything anywhere, beside a list of what they logged.

They use names and values of every kind, overwrite and rewind in any order, read beside the
writer, and export. The long run draws new programs each time and prints how to repeat a
failure.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tracking
from tracking.schema import parse_value

# ------------------------------------------------------------------- what is logged

LETTERS = "aZ09 _-.:#é字🙂\n\t'\"\\{}[]"
WORDS = st.text(LETTERS, min_size=1, max_size=6)
NUMBERS = st.one_of(
    st.floats(),
    st.integers(-(2**70), 2**70),
    st.booleans(),
    st.floats(width=32).map(np.float32),
    st.integers(-9, 9).map(np.int64),
)
PLAIN = st.one_of(NUMBERS, st.none(), st.text(LETTERS, max_size=20))
LISTS = st.recursive(
    PLAIN,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=2)
    ),
    max_leaves=5,
).filter(lambda value: not isinstance(value, dict))
ARRAYS = st.lists(st.floats(width=32), min_size=1, max_size=4).map(
    lambda items: np.array(items, dtype=np.float32)
)
VALUES = st.recursive(
    st.one_of(PLAIN, LISTS, ARRAYS),
    lambda inner: st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
INDEXES = st.one_of(st.none(), st.integers(0, 4), st.sampled_from([10**8, 2**62]))
WHATS = st.one_of(st.sampled_from(["metrics", "profile", ""]), WORDS)
SETS = st.one_of(st.sampled_from(["train", "valid", ""]), WORDS)

CALLS = st.one_of(
    st.tuples(st.just("log"), WHATS, SETS, VALUES, INDEXES),
    st.tuples(st.just("overwrite"), WHATS, SETS, VALUES, st.integers(0, 4)),
    st.tuples(st.just("log_metric"), WORDS, VALUES, SETS, INDEXES),
    st.tuples(
        st.just("log_step"), st.dictionaries(WORDS, NUMBERS, max_size=3), SETS,
        st.integers(0, 10**6),
    ),
    st.tuples(st.just("mark")),
    st.tuples(st.just("rewind"), st.integers(0, 5)),
    st.tuples(st.just("look")),
    st.tuples(st.just("fit"), st.booleans()),
)  # fmt: skip


# ------------------------------------------------------------- what should be there


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name and value of each row of a logged value."""
    if not isinstance(value, Mapping) or not value:
        yield name, value
        return
    for key, item in value.items():
        yield from leaves(item, f"{name}/{key}" if name else key)


def plain(value: Any) -> Any:
    """The value as it comes back: lists for tuples and arrays, Python's own numbers."""
    if isinstance(value, np.ndarray | np.generic):
        return plain(value.tolist())
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


@dataclass
class Expected:
    """The rows of a run, as a list; row or overwrite: ``(what, set, name, index, ...)``.

    A row with a ``control`` overwrites, or is behind what a fit begins or ends.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    seq: int = 0
    begun_at: int | None = None

    @property
    def fit(self) -> int:
        return self.rows[-1]["fit"] if self.rows else 1

    def begin_fit(self) -> int:
        """The number is one more than that of the last fit that logged anything."""
        begun_at = self.seq if self.begun_at is None else self.begun_at
        fits = [row["fit"] for row in self.live() if row["seq"] > begun_at]
        fits += [row["fit"] for row in self.live() if row["fit"] > 1]
        self.begun_at = begun_at
        return self.go_on(1 + max(fits, default=0))

    def go_on(self, fit: int) -> int:
        self.rows.append({"control": "fit", "fit": fit})
        return fit

    def add(
        self,
        what: str,
        set_: str,
        value: Any,
        index: int | None,
        step: int | None = None,
    ) -> None:
        if index is None and step is None:
            index = self._next_index(what, set_)
        self.seq += 1
        place = {"what": what, "set": set_, "index": index, "step": step}
        place |= {"fit": self.fit, "seq": self.seq}
        self.rows += [
            {**place, "name": name, "value": repr(plain(item))}
            for name, item in leaves(value)
        ]

    def overwrite(self, what: str, set_: str, index: int) -> None:
        place = {"what": what, "set": set_, "index": index, "fit": self.fit}
        self.rows.append({**place, "control": "overwrite"})

    def _next_index(self, what: str, set_: str) -> int:
        place = (what, set_, self.fit)
        names = ("what", "set", "fit")
        same = [row for row in self.rows if tuple(map(row.get, names)) == place]
        given = [row["index"] for row in same if row["index"] is not None]
        return max(given, default=0) + 1

    def live(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for row in self.rows:
            if "control" not in row:
                found.append(row)
            elif row["control"] == "overwrite":
                names = ("what", "set", "index", "fit")
                key = [row[name] for name in names]
                found = [one for one in found if [one[n] for n in names] != key]
        return found

    def shown(self) -> list[dict[str, Any]]:
        """Live rows as ``read`` reads them."""
        hidden = (
            ("seq",) if any(row["fit"] > 1 for row in self.live()) else ("seq", "fit")
        )
        return [
            {name: item for name, item in row.items() if name not in hidden}
            for row in self.live()
        ]


def read(table: pa.Table) -> list[dict[str, Any]]:
    names = ["what", "set", "index", "step", "name"]
    names += ["fit"] if "fit" in table.column_names else []
    return [
        {name: row[name] for name in names}
        | {"value": repr(parse_value(row["kind"], row["value"], row["payload"]))}
        for row in table.to_pylist()
    ]


def change_fit(run: tracking.Run, expected: Expected, begins: bool) -> None:
    if begins:
        assert run.begin_fit() == expected.begin_fit()
    else:
        run.end_fit()
        expected.go_on(1)
    assert run.fit == expected.fit


def run_program(calls: list[tuple[Any, ...]], folder: Path) -> None:
    """Make the calls, and compare what is read while and after they are made."""
    expected = Expected()
    marks: list[tuple[int, int]] = [(-1, 0)]
    with tracking.start(runs_dir=folder, save_diff=False, delivery=False) as run:
        begin = run.position()
        marks[0] = (begin, 0)
        past = tracking.open(run.path)
        others = past.records().num_rows

        def look() -> None:
            assert read(past.records())[others:] == expected.shown()

        for kind, *rest in calls:
            if kind == "log":
                what, set_, value, index = rest
                run.log(what, set_, value, index)
                expected.add(what, set_, value, index)
            elif kind == "overwrite":
                what, set_, value, index = rest
                run.log(what, set_, value, index, append=False)
                expected.overwrite(what, set_, index)
                expected.add(what, set_, value, index)
            elif kind == "log_metric":
                name, value, set_, index = rest
                run.log_metric(name, value, set=set_, index=index)
                expected.add("metrics", set_, {name: value}, index)
            elif kind == "log_step":
                values, set_, step = rest
                run.log_step(values, step, set=set_)
                expected.add("steps", set_, values, None, step)
            elif kind == "fit":
                change_fit(run, expected, *rest)
            elif kind == "mark":
                marks.append((run.position(), len(expected.rows)))
            elif kind == "rewind":
                seq, length = marks[rest[0] % len(marks)]
                run.rewind(seq)
                del expected.rows[length:]
                marks = [mark for mark in marks if mark[1] <= length]
            else:
                look()
        look()
    look()
    tracking.export([past], folder / "all.parquet")
    exported = pq.read_table(folder / "all.parquet")
    assert read(exported)[others:] == expected.shown()
    check_wide(past.wide(), expected.live())


def check_wide(wide: pa.Table, rows: list[dict[str, Any]]) -> None:
    """The last number of each metric at each index is there, and nothing else."""
    wanted: dict[tuple[str, str], dict[tuple[int, int], str]] = {}
    has_fits = any(row["fit"] > 1 for row in rows)
    for row in rows:
        if row["what"] == "metrics" and is_number(row["value"]):
            key = (row["set"], row["name"])
            place = (row["fit"], row["index"])
            wanted.setdefault(key, {})[place] = row["value"]
    names = ["/".join(filter(None, key)) for key in wanted]
    if len({*names}) < len(names) or {"index", "fit"} & {*names}:
        return  # names that meet are told apart by a test of their own
    for name, values in zip(names, wanted.values(), strict=True):
        index = wide["index"].to_pylist()
        fits = wide["fit"].to_pylist() if has_fits else [1] * len(index)
        places = zip(fits, index, strict=True)
        column = dict(zip(places, wide[name].to_pylist(), strict=True))
        found = {index: value for index, value in column.items() if value is not None}
        assert found.keys() == values.keys(), name
        for index, value in values.items():
            assert repr(found[index]) == repr(as_float(value)), (name, index)


def is_number(text: str) -> bool:
    value = evaluate(text)
    return isinstance(value, float | int)


def as_float(text: str) -> float:
    try:
        return float(evaluate(text))
    except OverflowError:
        raise AssertionError(text) from None


def evaluate(text: str) -> Any:
    return eval(text, {"nan": float("nan"), "inf": float("inf")})


PROGRAMS = st.lists(CALLS, min_size=1, max_size=25)
CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]


@given(PROGRAMS)
@settings(
    max_examples=40, derandomize=True, database=None, suppress_health_check=CHECKS
)
def test_odd_programs_find_what_they_logged(calls: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_program(calls, Path(folder))


@pytest.mark.slow
@given(PROGRAMS)
@settings(
    max_examples=200, database=None, print_blob=True, suppress_health_check=CHECKS
)
def test_many_odd_programs_find_what_they_logged(calls: list[tuple[Any, ...]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run_program(calls, Path(folder))
