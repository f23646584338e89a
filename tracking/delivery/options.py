"""Options of delivery that the user can give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tracking.errors import InvalidFileError
from tracking.store import Manifest


@dataclass(frozen=True, kw_only=True)
class DeliveryOptions:
    """How a run is delivered.

    Attributes
    ----------
    per_key
        Maximum number of points that MLflow gets of each metric; None: all points.
    patience_s : seconds
        How long to wait for a server that does not answer, after training has ended.
    wait_s : seconds
        How long the end of the interpreter waits for the delivery.
    """

    per_key: int | None = 10_000
    patience_s: float = 60.0
    wait_s: float = 60.0


def check_options(options: Mapping[str, Any] | None) -> DeliveryOptions:
    """Check the options that the user gave."""
    given = dict(options or {})
    for name, value in given.items():
        if name not in DeliveryOptions.__dataclass_fields__:
            raise ValueError(
                f"start(delivery=): expected per_key, patience_s or wait_s, got {name!r}. "
                "Use one of the three."
            )
        if name != "per_key":
            _check_number(name, value, (int, float), 0)
        elif value is not None:
            _check_number(name, value, int, 2)
    return DeliveryOptions(**given)


def read_options(manifest: Manifest) -> DeliveryOptions:
    """Read the options that a run was started with."""
    try:
        return check_options(manifest.delivery)
    except (TypeError, ValueError) as error:
        raise InvalidFileError(
            f"run {manifest.id}: expected options of delivery in run.json, got others: "
            f"{error}"
        ) from error


def _check_number(name: str, value: Any, kind: Any, least: int) -> None:
    word = "a whole number" if kind is int else "a number"
    is_number = isinstance(value, kind) and not isinstance(value, bool)
    if not (is_number and value >= least):
        raise (ValueError if is_number else TypeError)(
            f"start(delivery={{{name!r}: ...}}): expected {word} of at least {least}, got "
            f"{value!r}. Leave it out for the default."
        )
