from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tracking.curves.charts import (
    ChartLimits,
    choose_charts,
    choose_metrics,
    thin_curve,
)
from tracking.curves.plot import plot_curves
from tracking.delivery.summaries import collect_charts
from tracking.read import PastRun


def test_main_metrics_come_first():
    sets = {
        "lr": {"train": 0},
        "accuracy": {"train": 0, "valid": 0},
        "gen/loss": {"train": 0},
        "norm": {"train": 0},
        "loss": {"train": 0, "valid": 0},
    }
    assert choose_metrics(sets) == ["loss", "gen/loss", "accuracy", "lr", "norm"]


def draw(x, y, columns, rows=50):
    """Dots that lines between points colour, one column of dots after the other."""
    left, right, low, high = x.min(), x.max(), np.nanmin(y), np.nanmax(y)
    found = set()
    column = np.minimum((x - left) / (right - left) * columns, columns - 1).astype(int)
    row = ((y - low) / (high - low) * (rows - 1)).round()
    for at in range(columns):
        inside = row[(column == at) & np.isfinite(row)]
        if len(inside):
            found |= {
                (at, one) for one in range(int(inside.min()), int(inside.max()) + 1)
            }
    return found


@pytest.mark.parametrize("spacing", [1.0, 3.0])
def test_thin_curve_shows_the_same_dots(spacing):
    rng = np.random.default_rng(0)
    x = np.arange(100_000) ** spacing
    y = np.cumsum(rng.standard_normal(len(x)))
    y[[1234, 50_001]] = 1e4, -1e4  # one point alone is still seen
    y[rng.integers(0, len(x), 1000)] = math.nan
    y[99] = math.inf
    shown = thin_curve(x, y, 200)
    assert len(shown) <= 4 * 200
    assert {0, 1234, 50_001, len(x) - 1} <= set(shown.tolist())
    assert (np.diff(shown) > 0).all()
    y[99] = math.nan
    assert draw(x[shown], y[shown], 200) == draw(x, y, 200)


def test_thin_curve_takes_odd_points():
    assert thin_curve([3, 1, 2], [1.0, 2.0, 3.0], 10).tolist() == [1, 2, 0]
    assert thin_curve([], [], 1).tolist() == []
    same = thin_curve(np.full(1000, 7), np.arange(1000.0), 2)
    assert same.tolist() == [0, 999]
    only_nan = thin_curve(np.arange(1000), np.full(1000, math.nan), 2)
    assert only_nan.tolist() == [0, 499, 500, 999]
    far = np.array([-1.7e308, 0.0, 1.0, 2.0, 1.7e308])
    assert thin_curve(far, np.arange(5.0), 1).tolist() == [0, 4]


def test_charts_keep_to_their_room_and_count_what_is_left_out():
    line = np.arange(1000), np.zeros(1000)
    lines = {f"m{i}": {f"set {n}": line for n in range(5)} for i in range(50)}
    charts = choose_charts(lines, ChartLimits(charts=2, lines=3, columns=10))
    assert [*charts.lines] == ["m0", "m1"]
    assert [*charts.lines["m1"]] == ["set 0", "set 1", "set 2"]
    assert charts.num_lines == dict.fromkeys(lines, 5)
    assert all(
        len(x) <= 40 for chart in charts.lines.values() for x, _ in chart.values()
    )


def test_picture_of_many_names_sets_and_points_says_what_it_leaves_out(record):
    run = record()
    values = {f"m{i} $x$y$": 1.0 for i in range(400)}
    for i in range(3):
        run.run.log("metrics", "train", values, index=i)
    for i in range(5000):
        run.run.log_metric("m300 $x$y$", 1.0, set="valid", index=i)
    for i in range(50):
        run.run.log_metric("loss", 1.0, set=f"set {i}", index=1)
    run.run.finish()
    charts = collect_charts(PastRun(run.path).records())
    assert [*charts.lines][:3] == ["loss", "m300 $x$y$", "m0 $x$y$"]
    assert len(charts.lines) == 24
    assert len(charts.lines["loss"]) == 20
    x, _ = charts.lines["m300 $x$y$"]["valid"]
    assert (x[0], x[-1]) == (0, 4999)
    assert 1000 <= len(x) <= 2400


def test_picture_has_bounded_charts_lines_and_points():
    rows: list[Any] = [("train", f"m{i}", 1, 1.0) for i in range(3000)]
    rows += [(f"set {i}", "loss", 1, 1.0) for i in range(50)]
    rows += [("train", "m2999", epoch, epoch % 7) for epoch in range(2, 20_000)]
    rows += [("valid", "m2999", 1, 2.0), ("train", "text", 1, "no number")]
    figure = plot_curves(rows)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:3] == ["loss (20 of 50 lines)", "m2999", "m0"]
    assert len(titles) == 24
    assert figure.get_suptitle() == "24 of 3001 metrics"
    assert len(figure.axes[1].lines[0].get_xdata()) <= 2400
    width, height = figure.get_size_inches() * 150
    assert width <= 2000
    assert height <= 4000
