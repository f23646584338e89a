"""Plot the curves of a run: one chart for each metric, one line for each set."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from tracking.curves.charts import ChartLimits, Charts, Line, choose_charts

PER_ROW = 3
"""Maximum number of charts side by side."""

LIMITS: Final = ChartLimits(charts=24, lines=20, columns=600)
"""Each chart takes two megabytes of memory while it is drawn, and has 600 pixels at most."""

_MAX_WORD = 60

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b")
"""Colours of the sets, in order of appearance."""


def plot_curves(
    rows: Iterable[tuple[str, str, int, float]],
    path: str | Path | None = None,
    *,
    unit: str = "epoch",
) -> Any:
    """Plot one chart for each metric, with one line for each set.

    A picture has at most 24 charts, of the main metrics: losses first, then those that
    several sets have, such as train and valid. A chart has at most 20 lines. A line has as
    many points as its pixels can show, the lowest and the highest ones always. So the
    picture and the memory for it stay small, whatever was logged; the picture says what it
    leaves out.

    Parameters
    ----------
    rows
        Set, metric, epoch (from 1) or step, and value. Values that are not numbers are
        skipped.
    path
        File to save the figure to; its suffix chooses the format. None: do not save.
    """
    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for split, metric, epoch, value in rows:
        if isinstance(value, int | float):
            series.setdefault(metric, {}).setdefault(split, []).append((epoch, value))
    if not series:
        msg = "plot: expected at least one numeric metric, got none."
        raise ValueError(f"{msg} Train for an epoch first.")
    lines = {
        metric: {split: _as_line(points) for split, points in sets.items()}
        for metric, sets in series.items()
    }
    return plot_charts(choose_charts(lines, LIMITS), path, unit=unit)


def _as_line(points: list[tuple[int, float]]) -> Line:
    epochs, values = zip(*points, strict=True)
    return np.array(epochs), np.array(values, np.float64)


def plot_charts(
    charts: Charts, path: str | Path | None = None, *, unit: str = "epoch"
) -> Any:
    """Plot charts within `LIMITS`; arguments and result as of ``plot_curves``."""
    from matplotlib.figure import Figure  # noqa: PLC0415  takes half a second

    lines = charts.lines
    sets = list(dict.fromkeys(split for chart in lines.values() for split in chart))
    colours = {split: COLOURS[at % len(COLOURS)] for at, split in enumerate(sets)}
    across = min(PER_ROW, len(lines))
    down = -(-len(lines) // across)
    figure = Figure(figsize=(4.4 * across, 3.2 * down), layout="constrained")
    for place, (metric, chart) in enumerate(lines.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        title = metric[:_MAX_WORD]
        if charts.num_lines[metric] > len(chart):
            title += f" ({len(chart)} of {charts.num_lines[metric]} lines)"
        _draw_chart(axes, title, chart, colours)
        axes.set_xlabel(unit)
    if len(charts.num_lines) > len(lines):
        figure.suptitle(f"{len(lines)} of {len(charts.num_lines)} metrics")
    if path is not None:
        figure.savefig(path, dpi=150)
    # A notebook shows it, also before ``%matplotlib inline``.
    figure._repr_png_ = partial(_render_png, figure)  # type: ignore[attr-defined]
    return figure


def _render_png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw_chart(
    axes: Any, title: str, chart: dict[str, Line], colours: dict[str, str]
) -> None:
    """Draw one metric, with the colour of each set."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  takes half a second

    for split, (places, values) in chart.items():
        mark = "o" if len(places) < 30 else None
        label = split[:_MAX_WORD]
        axes.plot(places, values, color=colours[split], marker=mark, ms=3, label=label)
    # A name with two dollar signs is no formula.
    axes.set_title(title, fontsize=11, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)
