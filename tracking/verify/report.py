"""Sum up in a few lines what verifying runs has found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from tracking.verify.verify import Verification

MAX_EXAMPLES: Final = 3
"""Rows that are named of each kind of difference, besides the last one."""

MAX_ERRORS: Final = 5
"""Runs with differences that get a line of their own."""


def list_findings(results: Sequence[Verification]) -> list[str]:
    """Lines for the notes and differences of runs; none if all is equal.

    Parameters
    ----------
    results
        One for each run. If there are several, each line names its run.
    """
    found: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            found.setdefault("note", []).append(f"{result.run}: {note}")
        run = f"{result.run}: " if len(results) > 1 else ""
        for one in result.mismatches:
            kind = f"{one.kind} in {one.place}"
            found.setdefault(kind, []).append(f"{run}{one.describe_row()}")
    return [f"{kind}: {text}" for kind, some in found.items() for text in _sum_up(some)]


def list_errors(errors: Sequence[str]) -> list[str]:
    """The first lines about runs that differ or cannot be compared, and how many follow."""
    more = len(errors) - MAX_ERRORS
    if more <= 1:
        return list(errors)
    return [
        *errors[:MAX_ERRORS],
        f"verify: {more:,} more runs differ or cannot be compared. Use --json for all.",
    ]


def _sum_up(texts: list[str]) -> list[str]:
    """The first few texts, and the last one with the number of those before it."""
    more = len(texts) - MAX_EXAMPLES
    if more <= 1:
        return texts
    return [*texts[:MAX_EXAMPLES], f"{more:,} more, the last one {texts[-1]}"]
