"""Curves in a terminal: dots of braille letters in colours, or a letter for each curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Final

Points = Sequence[tuple[float, float]]
"""Pairs of index and value; values that are not finite are left out."""

HEIGHT: Final = 9
"""Lines of a chart."""

MARKS: Final = "*+ox#@%&"
"""Marks of curves without colours."""

COLOURS: Final = ("34", "33", "32", "35", "36", "31")
"""Codes of the colours of curves."""

_DOTS: Final = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def draw_chart(
    title: str, curves: Mapping[str, Points], width: int, *, has_colours: bool
) -> list[str]:
    """Draw curves over each other.

    Parameters
    ----------
    has_colours
        Whether the terminal shows colours; otherwise each curve has a mark of its own.
    """
    shown = {
        name: [(x, y) for x, y in points if math.isfinite(y)]
        for name, points in curves.items()
    }
    shown = {name: points for name, points in shown.items() if len(points) > 1}
    if not shown:
        return []
    ys = [y for points in shown.values() for _, y in points]
    xs = [x for points in shown.values() for x, _ in points]
    low, high, left, right = min(ys), max(ys), min(xs), max(xs)
    labels = [f"{value:.4g}" for value in (high, (high + low) / 2, low)]
    margin = max(map(len, labels))
    room = max(width - margin - 3, 8)
    cells = _Cells(room, dots=(2, 4) if has_colours else (1, 1))
    for place, points in enumerate(shown.values()):
        cells.draw(
            [
                (_scale(x, left, right), 1 - _scale(y, low, high))
                for x, y in sorted(points)
            ],
            place,
        )
    rows = [f"{'':>{margin}} |{line}" for line in cells.render()]
    for place, label in zip((0, HEIGHT // 2, HEIGHT - 1), labels, strict=True):
        rows[place] = f"{label:>{margin}} |{rows[place][margin + 2 :]}"
    ends = f"{left:g}", f"{right:g}"
    axis = f"{ends[0]}{ends[1]:>{max(room - len(ends[0]), 1)}}"
    marks = [_mark(place, name, has_colours) for place, name in enumerate(shown)]
    head = ["   ".join([title, *marks])]
    if len("   ".join([title, *shown])) + 2 * len(shown) > width:
        head = [title, *marks]
    return [*head, *rows, f"{'':>{margin}}  {axis}"]


def _scale(value: float, low: float, high: float) -> float:
    """Place of a value between two others, from 0 to 1; half of each, so none overflows."""
    return 0.5 if high == low else (value / 2 - low / 2) / (high / 2 - low / 2)


def _mark(place: int, name: str, has_colours: bool) -> str:
    if has_colours:
        return f"\x1b[{COLOURS[place % len(COLOURS)]}m{name}\x1b[0m"
    return f"{MARKS[place % len(MARKS)]} {name}"


class _Cells:
    """A grid of letters, each with some dots.

    Parameters
    ----------
    width
        Letters of a line.
    dots
        Dots of a letter, across and down.
    """

    def __init__(self, width: int, dots: tuple[int, int]) -> None:
        self._across, self._down = dots
        self._width, self._wide, self._high = width, width * dots[0], HEIGHT * dots[1]
        self._found: dict[tuple[int, int], tuple[int, int]] = {}

    def draw(self, points: Points, curve: int) -> None:
        """Draw lines between points from 0 to 1."""
        places = [(x * (self._wide - 1), y * (self._high - 1)) for x, y in points]
        for (x0, y0), (x1, y1) in pairwise(places):
            count = max(round(abs(x1 - x0)), round(abs(y1 - y0)), 1)
            for step in range(count + 1):
                at = step / count
                self._add(round(x0 + (x1 - x0) * at), round(y0 + (y1 - y0) * at), curve)

    def _add(self, x: int, y: int, curve: int) -> None:
        cell = x // self._across, y // self._down
        dots = self._found.get(cell, (0, curve))[0]
        dots |= _DOTS[y % self._down][x % self._across]
        self._found[cell] = dots, curve

    def render(self) -> list[str]:
        """Return the lines."""
        return [
            "".join(self._letter(x, y) for x in range(self._width)).rstrip()
            for y in range(HEIGHT)
        ]

    def _letter(self, x: int, y: int) -> str:
        if (x, y) not in self._found:
            return " "
        dots, curve = self._found[x, y]
        if self._down == 1:
            return MARKS[curve % len(MARKS)]
        return f"\x1b[{COLOURS[curve % len(COLOURS)]}m{chr(0x2800 + dots)}\x1b[0m"
