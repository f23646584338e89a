"""Fewer points of a long series for MLflow, the same ones at every try.

While a series grows its length is not known, and MLflow deletes no point. So a point
is sent at once only where it would be sent whatever comes: the first few, then every
second, fourth, eighth... When the run has ended, points between are added, evenly and
up to the number allowed, and the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

Ordinals = np.ndarray[Any, np.dtype[np.int64]]
Mask = np.ndarray[Any, np.dtype[np.bool_]]

_SHARE: Final = 32
"""A series of this many doublings still leaves half the points for the end."""

DEFAULT_PATIENCE_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class DeliveryOptions:
    """How a run is delivered.

    Attributes
    ----------
    per_key
        Points of one metric that MLflow gets at most; None: all.
    patience_s : seconds
        How long a server that does not answer is waited for after the trainer's end.
    """

    per_key: int | None = None
    patience_s: float = DEFAULT_PATIENCE_S


def check_options(options: Mapping[str, Any] | None) -> DeliveryOptions:
    """Options of delivery from what the user gave.

    Raises
    ------
    TypeError
        If a value is of the wrong type.
    ValueError
        If a name is unknown, or a number too small.
    """
    given = dict(options or {})
    for name in given:
        if name not in DeliveryOptions.__dataclass_fields__:
            raise ValueError(
                f"start(delivery=): expected per_key or patience_s, got {name!r}. "
                "Use one of the two."
            )
    per_key, patience_s = given.get("per_key"), given.get("patience_s", 60.0)
    if per_key is not None:
        _check_number("per_key", per_key, int, 2)
    _check_number("patience_s", patience_s, (int, float), 0)
    return DeliveryOptions(per_key=per_key, patience_s=float(patience_s))


def _check_number(name: str, value: Any, kind: Any, least: int) -> None:
    """Raise unless a value is a number that is large enough."""
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


def sent_at_once(ordinals: Ordinals, per_key: int) -> Mask:
    """Which points of a series are sent whatever its length will be.

    Parameters
    ----------
    ordinals : >= 0
        Place of each point in its series.
    per_key : >= 2
        Points allowed.
    """
    base = max(1, per_key // _SHARE)
    # frexp's exponent is the number of bits: 0 below base, 1 up to twice that, ...
    doublings = np.frexp((ordinals // base).astype(np.float64))[1]
    sent: Mask = ordinals % (np.int64(1) << doublings.astype(np.int64)) == 0
    return sent


def sent_in_the_end(ordinals: Ordinals, length: int, per_key: int) -> Mask:
    """Which points of a series of known length MLflow has in the end.

    Parameters
    ----------
    ordinals : >= 0
        Place of each point in its series.
    length
        Of the whole series.
    per_key : >= 2
        Points allowed; never exceeded.
    """
    if length <= per_key:
        return np.ones(len(ordinals), bool)
    sent: Mask = sent_at_once(ordinals, per_key) | (ordinals == length - 1)
    at_once = int(sent_at_once(np.arange(length), per_key).sum())
    room = per_key - at_once - 1
    stride = 1
    while room > 0 and -(-length // stride) > room:
        stride *= 2
    if room > 0:
        sent |= ordinals % stride == 0
    return sent
