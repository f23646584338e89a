"""Lines with the metrics of an epoch: a table where it fits, otherwise a line for each set."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

Values = Mapping[str, Mapping[str, str]]
"""Formatted metrics by set and name."""

MIN_COLUMN = len("0.001234")
"""Columns of the terminal that a metric gets at least, so that its heading stays above it."""

MIN_TIME = len("12.34 s")
"""The same for the time of an epoch."""

GAP = "  "

BEST = "*"
"""Mark of the best epoch so far."""


class EpochTable:
    """A table with a row for each epoch, as wide as the terminal allows.

    A heading is written before the first row, and again if a new metric appears. If the
    columns do not fit, each set has a line of its own. A line breaks only between metrics, so
    a number stays whole.
    """

    def __init__(self) -> None:
        self._columns: dict[tuple[str, str], int] = {}
        self._heads: dict[str, int] = {}
        self._is_headed = False

    def format(
        self, heads: Mapping[str, str], values: Values, width: int, *, is_best: bool
    ) -> list[str]:
        """Return the lines of an epoch, with a heading if one is due.

        Parameters
        ----------
        heads
            The first cells, by title: epoch, step, time.
        """
        self.fit_heads([heads])
        for split, metrics in values.items():
            for name, text in metrics.items():
                if (split, name) not in self._columns:
                    self._is_headed = False
                least = max(len(name), MIN_COLUMN)
                known = self._columns.get((split, name), least)
                self._columns[split, name] = max(known, len(text))
        if self._measure() > width:
            return stack(heads, values, width, is_best=is_best)
        row = self._format_row(heads, values)
        lines = [f"{row} {BEST}" if is_best else row.rstrip()]
        if not self._is_headed:
            self._is_headed = True
            lines = [*self._format_heading(), *lines]
        return lines

    def fit_heads(self, rows: Iterable[Mapping[str, str]]) -> None:
        """Make room for the first cells of rows."""
        for heads in rows:
            for title, text in heads.items():
                least = MIN_TIME if title == "time" else len(title)
                widest = max(least, len(text), self._heads.get(title, 0))
                self._heads[title] = widest

    @property
    def _sets(self) -> dict[str, list[str]]:
        """Names of the columns of each set."""
        found: dict[str, list[str]] = {}
        for split, name in self._columns:
            found.setdefault(split, []).append(name)
        return found

    def _measure(self) -> int:
        """Columns of the terminal that a row takes, with the mark."""
        return len(self._format_row({}, {})) + len(f" {BEST}")

    def _format_row(self, heads: Mapping[str, str], values: Values) -> str:
        cells = [
            f"{heads.get(title, ''):>{wide}}" for title, wide in self._heads.items()
        ]
        groups = [GAP.join(cells)]
        for split, names in self._sets.items():
            metrics = values.get(split, {})
            group = (
                f"{metrics.get(name, ''):>{self._columns[split, name]}}"
                for name in names
            )
            groups.append(GAP.join(group).ljust(len(split)))
        return " | ".join(groups)

    def _format_heading(self) -> list[str]:
        """The names of the sets, and below them those of the metrics."""
        titles = self._format_row(
            {title: title for title in self._heads},
            {split: {name: name for name in own} for split, own in self._sets.items()},
        )
        groups = self._format_row({}, {}).split(" | ")
        sets = [
            split.ljust(len(group))
            for split, group in zip(self._sets, groups[1:], strict=True)
        ]
        return [" | ".join([groups[0], *sets]).rstrip(), titles.rstrip()]


def stack(
    heads: Mapping[str, str], values: Values, width: int, *, is_best: bool
) -> list[str]:
    """Return a line for the epoch and, below it, lines for each set."""
    first = GAP.join(
        text if title == "time" else f"{title} {text}" for title, text in heads.items()
    )
    lines = [f"{first} {BEST}" if is_best else first]
    indent = max((len(split) for split in values), default=0)
    for split, metrics in values.items():
        pieces = [
            ("", f"  {shorten(split, width // 3):<{min(indent, width // 3)}}"),
            *(
                (GAP, join_metric(name, text, width - 4))
                for name, text in metrics.items()
            ),
        ]
        lines += wrap(pieces, width, "    ")
    return lines


def format_line(head: str, values: Values, width: int | None = None) -> list[str]:
    """Return one line with all metrics of an epoch; it breaks if `width` is given."""
    pieces = [("", head)]
    for split, metrics in values.items():
        for place, (name, value) in enumerate(metrics.items()):
            text = f"{name} {value:<7}"
            is_next_split = place == 0 and len(pieces) > 1
            gap = "| " if is_next_split else "  "
            pieces.append((gap, text if place else f"{split}: {text}"))
    return wrap(pieces, width)


def join_metric(name: str, text: str, room: int) -> str:
    """Return a metric's name and value; the name is shortened where both do not fit."""
    return f"{shorten(name, room - len(text) - 1)} {text}"


def shorten(text: str, room: int) -> str:
    """Return the text, with its middle left out if it is longer than `room` columns."""
    if len(text) <= room:
        return text
    kept = max(room - 2, 2)
    return f"{text[: -(-kept // 2)]}..{text[len(text) - kept // 2 :]}"


def wrap(
    pieces: Sequence[tuple[str, str]], width: int | None, indent: str = "  "
) -> list[str]:
    """Join pieces of text into lines that break only between pieces.

    Parameters
    ----------
    pieces
        Pairs of the gap before a piece and its text.
    width
        Columns of a line; None: no limit.
    indent
        Start of the lines after the first.
    """
    lines = [""]
    for gap, text in pieces:
        longer = lines[-1] + gap + text
        if width is not None and lines[-1] and len(longer.rstrip()) > width:
            lines.append(indent + text)
        else:
            lines[-1] = longer
    return lines


def format_duration(duration_s: float) -> str:
    """Return seconds as ``MM:SS`` or ``H:MM:SS``."""
    minutes, seconds = divmod(round(duration_s), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes:02}:{seconds:02}"
    )


def format_time(took_s: float) -> str:
    """Return a time as ``1.23 s``, or as ``MM:SS`` from a minute on."""
    return f"{took_s:.2f} s" if took_s < 60 else format_duration(took_s)
