"""What a comparison of records finds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One row that is not the same in two places.

    Attributes
    ----------
    place
        ``MLflow``, ``journal``, or the name of a file.
    kind
        What it is there: ``missing``, ``doubled``, ``changed``, ``superseded`` (it was
        rewound or overwritten since), or ``unknown`` to the journal.
    row
        What and where it is.
    detail
        The values, if that says more.
    """

    place: str
    kind: str
    row: str
    detail: str = ""

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.kind} in {self.place}: {self.row}{detail}"
