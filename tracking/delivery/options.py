"""Options of delivery that the user can give."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tracking.errors import InvalidFileError
from tracking.store import Manifest

DEFAULT_PER_KEY: Final = 10_000
DEFAULT_PATIENCE_S: Final = 60.0
DEFAULT_WAIT_S: Final = 60.0


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

    per_key: int | None = DEFAULT_PER_KEY
    patience_s: float = DEFAULT_PATIENCE_S
    wait_s: float = DEFAULT_WAIT_S


def check_options(options: Mapping[str, Any] | None) -> DeliveryOptions:
    """Check the options that the user gave."""
    given = dict(options or {})
    for name in given:
        if name not in DeliveryOptions.__dataclass_fields__:
            raise ValueError(
                f"start(delivery=): expected per_key, patience_s or wait_s, got {name!r}. "
                "Use one of the three."
            )
    per_key = given.get("per_key", DEFAULT_PER_KEY)
    patience_s = given.get("patience_s", DEFAULT_PATIENCE_S)
    if per_key is not None:
        _check_number("per_key", per_key, int, 2)
    wait_s = given.get("wait_s", DEFAULT_WAIT_S)
    _check_number("patience_s", patience_s, (int, float), 0)
    _check_number("wait_s", wait_s, (int, float), 0)
    return DeliveryOptions(
        per_key=per_key, patience_s=float(patience_s), wait_s=float(wait_s)
    )


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
    place = f"start(delivery={{{name!r}: ...}})"
    word = "a whole number" if kind is int else "a number"
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(
            f"{place}: expected {word} of at least {least}, got {value!r}. "
            "Leave it out for the default."
        )
    if not value >= least:
        raise ValueError(
            f"{place}: expected {word} of at least {least}, got {value!r}. "
            "Leave it out for the default."
        )
