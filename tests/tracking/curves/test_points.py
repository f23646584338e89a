from __future__ import annotations

import math
import random
import shutil
import struct

import pyarrow as pa
import pytest

import tracking
from tracking.curves.points import collect_points
from tracking.read import PastRun

NAMES = ("loss", "acc", "a/b", "b", "index", "fit", "loss_step", "", "x#2", "loss_fit2")
SETS = ("train", "valid", "", "train/a", "a")
VALUES = (1.0, -1.5, math.nan, math.inf, 0.0, -0.0, 3, True, 2**60, None, "text", [1])


def log_oddly(run, rng):
    """Log some values, with overwrites, rewinds, later fits and what is no number."""
    positions = [run.position()]
    for _ in range(150):
        split, name, other = rng.choice(SETS), rng.choice(NAMES), rng.choice(NAMES)
        index, step = rng.choice((None, 1, 2, 3, 10**8)), rng.choice((None, 1, 7))
        what = rng.choice(("metrics", "metrics", "steps", "notes"))
        values = {name: rng.choice(VALUES), other: rng.choice(VALUES)}
        choice = rng.random()
        if choice < 0.6:
            append = rng.random() < 0.9
            run.log(what, split, values, index, step=step, append=append)
        elif choice < 0.9:
            run.log_step(values, rng.randrange(5), set=split)
        elif choice < 0.93:
            run.begin_fit()
        elif choice < 0.97:
            positions.append(run.position())
        else:
            run.rewind(rng.choice(positions))


@pytest.fixture(scope="module", params=range(3))
def past(request, tmp_path_factory):
    """A run of two ranks; the second logged the same and something else."""
    folder, rng = tmp_path_factory.mktemp("runs"), random.Random(request.param)
    with tracking.start(runs_dir=folder, delivery=False) as run:
        log_oddly(run, rng)
    with tracking.start(runs_dir=folder, delivery=False) as other:
        log_oddly(other, rng)
    shutil.copytree(other.path / "records" / "0", run.path / "records" / "1")
    return PastRun(run.path)


def collect_slowly(records):
    """Values by key, fit and place, one row after the other."""
    has_fits = "fit" in records.column_names
    rows = records.to_pylist()
    series: dict[tuple[str, str, bool], dict[tuple[int, int], tuple[int, float]]] = {}
    for row in [r for what in ("metrics", "steps") for r in rows if r["what"] == what]:
        place = row["step"] if row["index"] is None else row["index"]
        if place is None or row["value"] is None:
            continue
        points = series.setdefault((row["set"], row["name"], row["index"] is None), {})
        where = (row.get("fit", 1), place)
        if where not in points or points[where][0] >= row["rank"]:
            points[where] = (row["rank"], row["value"])
    taken = ["fit", "index"] if has_fits else ["index"]
    found = {}
    for (split, name, is_step), points in series.items():
        key = "/".join(word for word in (split, name) if word)
        key += "_step" if is_step else ""
        number, free = 1, key
        while free in taken:
            number += 1
            free = f"{key}#{number}"
        taken.append(free)
        found[free] = {where: value for where, (_, value) in sorted(points.items())}
    return has_fits, found


def bits(value):
    return None if value is None else struct.pack("<d", value)


def test_wide_is_what_a_look_at_each_row_finds_bit_for_bit(past):
    has_fits, series = collect_slowly(past.records())
    places = sorted({where for points in series.values() for where in points})
    wide = past.wide()
    heads = ["fit", "index"] if has_fits else ["index"]
    assert wide.column_names == [*heads, *series]
    assert wide["index"].to_pylist() == [place for _, place in places]
    if has_fits:
        assert wide["fit"].to_pylist() == [fit for fit, _ in places]
    for key, points in series.items():
        assert wide[key].type == pa.float64()
        expected = [bits(points.get(where)) for where in places]
        assert list(map(bits, wide[key].to_pylist())) == expected


def test_summary_is_what_a_look_at_each_row_finds(past):
    _, series = collect_slowly(past.records())
    expected: dict[str, list[float]] = {}
    for fit in sorted({fit for points in series.values() for fit, _ in points}):
        for key, points in series.items():
            values = [value for (one, _), value in points.items() if one == fit]
            if values:
                name, number = key if fit == 1 else f"{key}_fit{fit}", 1
                free = name
                while free in expected:
                    number += 1
                    free = f"{name}#{number}"
                expected[free] = values
    found = past.summary()
    assert list(found) == list(expected)
    for name, values in expected.items():
        finite = [value for value in values if not math.isnan(value)] or [math.nan]
        assert bits(found[name]["last"]) == bits(values[-1])
        assert found[name]["count"] == len(values)
        limits = (found[name]["min"], found[name]["max"])
        assert str(limits) == str((min(finite), max(finite))) or limits == (0.0, 0.0)


def test_places_are_the_rows_of_the_wide_table(past):
    rows = [
        {name: value for name, value in row.items() if value is not None}
        for row in past.wide().to_pylist()
    ]
    points = past.snapshot().points
    for skip in range(len(rows) + 2):
        assert str(list(points.iter_places(skip))) == str(rows[skip:])


def test_snapshot_answers_as_the_run_does(tmp_path):
    with tracking.start(runs_dir=tmp_path, delivery=False, params={"lr": 1}) as run:
        run.set_tags({"note": "x"})
        run.log_input("digits", "training", rows=3)
        run.log_metric("loss", 1.0, index=1)
        run.log("metrics", "train", {"loss": 2.0}, 1, append=False)
        past, read = PastRun(run.path), PastRun(run.path).snapshot()
        run.log_metric("loss", 9.0, index=2)
    assert (read.params, read.tags) == ({"lr": 1}, {"note": "x"})
    assert (read.inputs, read.damage) == (past.inputs, past.damage)
    assert read.summary()["train/loss"]["last"] == 2.0
    assert past.summary()["train/loss"]["last"] == 9.0
    assert read.wide().num_rows == 1
    whole, written = past.snapshot(), past.records(superseded=True)
    assert whole.records.equals(past.records())
    assert whole.count_rows_after(-1) == written.num_rows > whole.records.num_rows
    assert whole.count_rows_after(written["seq"][-2].as_py()) == 1
    assert whole.count_rows_after(-1, rank=7) == 0


def test_words_that_are_null_or_twice_in_a_dictionary_are_read():
    indices = pa.array([0, 1, None, 2], pa.int32())
    words = pa.DictionaryArray.from_arrays(indices, pa.array(["train", "train", "a"]))
    names = pa.array(["loss"] * 4).dictionary_encode()
    records = pa.table(
        {
            "what": pa.array(["metrics"] * 4).dictionary_encode(),
            "set": words,
            "name": names,
            "index": pa.array([1, 2, 3, 4]),
            "step": pa.nulls(4, pa.int64()),
            "value": pa.array([1.0, 2.0, 3.0, 4.0]),
            "rank": pa.array([0] * 4, pa.int32()),
        }
    )
    points = collect_points(records)
    assert points.keys == ["train/loss", "loss", "a/loss"]
    assert points.widen()["train/loss"].to_pylist() == [1.0, 2.0, None, None]
