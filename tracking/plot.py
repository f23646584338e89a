"""Curves of a run: each metric by epoch, sets side by side."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

PER_ROW = 3
"""Charts side by side at most."""

COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#64748b")
"""Of the sets, in order of appearance."""


def curves(
    rows: Iterable[tuple[str, str, int, float]], path: str | Path | None = None
) -> Any:
    """One chart for each metric, one line for each set.

    Parameters
    ----------
    rows
        Set, metric, epoch (from 1) and value; what is no number is left out.
    path
        Where to save the picture; its suffix says the format. None: nowhere.

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If there is no metric to draw.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415  takes half a second
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415

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
        axes = figure.add_subplot(down, across, place)
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
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure
