"""Plot the curves of a run: one chart for each metric, one line for each set."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PER_ROW = 3
"""Maximum number of charts side by side."""

MAX_PANELS = 24
"""Charts of one picture; each takes two megabytes of memory while it is drawn."""

MAX_LINES = 20
"""Lines of one chart."""

MAX_POINTS = 1000
"""Points of one line, far more than it has pixels."""

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

    Parameters
    ----------
    rows
        Set, metric, epoch (from 1) or step, and value. Values that are not numbers are
        skipped.
    path
        File to save the figure to; its suffix chooses the format. None: do not save.
    unit
        Label of the horizontal axis.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is no metric to plot.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  takes half a second

    lines: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for split, metric, epoch, value in rows:
        if isinstance(value, int | float):
            lines.setdefault(metric, {}).setdefault(split, []).append((epoch, value))
    num_metrics = len(lines)
    lines = dict(islice(lines.items(), MAX_PANELS))
    if not lines:
        msg = "plot: expected at least one numeric metric, got none."
        raise ValueError(f"{msg} Train for an epoch first.")
    sets = list(dict.fromkeys(split for chart in lines.values() for split in chart))
    across = min(PER_ROW, len(lines))
    down = -(-len(lines) // across)
    figure = Figure(figsize=(4.4 * across, 3.2 * down), layout="constrained")
    for place, (metric, chart) in enumerate(lines.items(), start=1):
        axes = figure.add_subplot(down, across, place)
        _draw_chart(axes, metric, chart, sets)
        axes.set_xlabel(unit)
    if num_metrics > MAX_PANELS:
        figure.suptitle(f"The first {MAX_PANELS} metrics")
    if path is not None:
        figure.savefig(path, dpi=150)
    return show_in_notebooks(figure)


def show_in_notebooks(figure: T) -> T:
    """Let a notebook show a figure, also before ``%matplotlib inline``; return the figure."""
    figure._repr_png_ = partial(_render_png, figure)  # type: ignore[attr-defined]
    return figure


def _render_png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def _draw_chart(
    axes: Any, metric: str, chart: dict[str, list[tuple[int, float]]], sets: list[str]
) -> None:
    """Draw one metric, with the colour of each set."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  takes half a second

    for split, all_points in islice(chart.items(), MAX_LINES):
        points = thin(all_points, MAX_POINTS)
        colour = COLOURS[sets.index(split) % len(COLOURS)]
        epochs, values = zip(*points, strict=True)
        mark = "o" if len(points) < 30 else None
        label = split[:_MAX_WORD]
        axes.plot(epochs, values, color=colour, marker=mark, ms=3, label=label)
    # A name with two dollar signs is no formula.
    axes.set_title(metric[:_MAX_WORD], fontsize=11, parse_math=False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    for text in axes.legend(frameon=False).get_texts():
        text.set_parse_math(False)


def thin(points: Sequence[T], most: int) -> Sequence[T]:
    """Return evenly spaced points, the first and the last one included."""
    if len(points) <= most:
        return points
    step = -(-(len(points) - 1) // (most - 1))
    return [*points[:-1:step], points[-1]]
