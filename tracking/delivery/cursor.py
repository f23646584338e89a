"""How far a run's rows have been sent, and what must be remembered for the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pyarrow as pa

from tracking.delivery.reconcile import StalePoints
from tracking.journal.reader import JournalReader
from tracking.journal.tombstones import Place
from tracking.mlflow_store.points import UniqueTimestamps


@dataclass
class Cursor:
    """Where the sending of rows has got to, and what it must remember for the rest.

    Attributes
    ----------
    tail
        Gives the next rows.
    num_held
        Rows that were passed over for the places in `held`.
    stamps
        Times given so far.
    counts
        Points of each key so far; for thinning.
    indices
        Least and greatest index of what and set, among the rows done with.
    leftovers
        Points in MLflow that no row stands for.
    held
        Places that were overwritten after MLflow had them: sent when all is known.
    """

    tail: JournalReader
    num_held: int = 0
    stamps: UniqueTimestamps = field(default_factory=UniqueTimestamps)
    counts: dict[str, int] = field(default_factory=dict)
    indices: dict[tuple[str, str], list[int | None]] = field(default_factory=dict)
    leftovers: StalePoints = field(default_factory=StalePoints)
    held: set[Place] = field(default_factory=set)

    def touches(self, place: Place) -> bool:
        """Whether rows done with may be among those that an overwrite is about."""
        what, set_, index = place
        bounds = self.indices.get((what, set_))
        if bounds is None or index is None or bounds[0] is None or bounds[1] is None:
            return bounds is not None
        return bounds[0] <= index <= bounds[1]

    def note_indices(self, table: pa.Table) -> None:
        """Take note of the places that rows are at."""
        plain = table.select(["what", "set", "index"])
        plain = pa.table(
            {
                "what": plain["what"].cast(pa.string()),
                "set": plain["set"].cast(pa.string()),
                "index": plain["index"],
            }
        )
        found = plain.group_by(["what", "set"]).aggregate(
            [("index", "min"), ("index", "max")]
        )
        for row in found.to_pylist():
            key = row["what"], row["set"]
            low, high = row["index_min"], row["index_max"]
            bounds = self.indices.setdefault(key, [low, high])
            bounds[0] = _least(bounds[0], low, min)
            bounds[1] = _least(bounds[1], high, max)


def _least(
    known: int | None, new: int | None, choose: Callable[..., int]
) -> int | None:
    """The lesser, or greater, of two numbers that may be absent."""
    present = [number for number in (known, new) if number is not None]
    return choose(present) if len(present) == 2 else None
