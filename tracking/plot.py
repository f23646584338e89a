"""Plot the curves of a run: one chart for each metric, one line for each set."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PER_ROW = 3
"""Maximum number of charts side by side."""

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b")
"""Colours of the sets, in order of appearance."""


def plot_curves(
    rows: Iterable[tuple[str, str, int, float]], path: str | Path | None = None
) -> Any:
    """Plot one chart for each metric, with one line for each set.

    Parameters
    ----------
    rows
        Set, metric, epoch (from 1) and value. Values that are not numbers are skipped.
    path
        File to save the figure to; its suffix chooses the format. None: do not save.

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
    if not lines:
        msg = "plot: expected at least one numeric metric, got none."
        raise ValueError(f"{msg} Train for an epoch first.")
    sets = list(dict.fromkeys(split for chart in lines.values() for split in chart))
    across = min(PER_ROW, len(lines))
    down = -(-len(lines) // across)
    figure = Figure(figsize=(4.4 * across, 3.2 * down), layout="constrained")
    for place, (metric, chart) in enumerate(lines.items(), start=1):
        _draw_chart(figure.add_subplot(down, across, place), metric, chart, sets)
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw_chart(
    axes: Any, metric: str, chart: dict[str, list[tuple[int, float]]], sets: list[str]
) -> None:
    """Draw one metric, with the colour of each set."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415  takes half a second

    for split, points in chart.items():
        colour = COLOURS[sets.index(split) % len(COLOURS)]
        epochs, values = zip(*points, strict=True)
        mark = "o" if len(points) < 30 else None
        axes.plot(epochs, values, color=colour, marker=mark, ms=3, label=split)
    axes.set_title(metric, fontsize=11)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
