"""Keys in MLflow: one for each series of the journal, and none for two of them.

MLflow takes letters, digits, ``_ - . : /`` and space, at most 250 characters, and only
what is a plain relative path. Any other name gets a readable form of it with a hash at
its end; so does a name whose key is taken already (``train/a`` and ``b``, ``train``
and ``a/b``). Who comes first in the journal has the plain key, so the same journal
always gives the same keys.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final

SeriesId = tuple[str, str, str]
"""What, set and name of a record."""

MAX_KEY_LENGTH: Final = 250
_VALID: Final = re.compile(r"[/\w.\- :]+")
_REFUSED: Final = re.compile(r"[^/\w.\- :]+")


@dataclass
class KeyMap:
    """The key of each series in one of MLflow's name spaces.

    Attributes
    ----------
    reserved
        Beginning of the keys that are not given to the user's names.
    given
        Key by series, in the order of first use.
    """

    reserved: str = "\0"
    given: dict[SeriesId, str] = field(default_factory=dict)
    _taken: dict[str, SeriesId] = field(default_factory=dict)

    def of(self, series: SeriesId) -> str:
        """Key of a series, the same at every call."""
        key = self.given.get(series)
        if key is None:
            key = self._new_key(series)
            self.given[series] = key
            self._taken[key] = series
        return key

    def mapped(self) -> dict[str, SeriesId]:
        """Series by key, where the key is not simply the series' own name."""
        return {k: s for s, k in self.given.items() if k != plain_key(s)}

    def _new_key(self, series: SeriesId) -> str:
        """Plain key of a series if it is to be had, else one with a hash."""
        plain = plain_key(series)
        is_reserved = plain.startswith(self.reserved)
        if is_valid(plain) and not is_reserved and plain not in self._taken:
            return plain
        return _hashed(plain, series, self._taken)


def plain_key(series: SeriesId) -> str:
    """Key that a series has if MLflow takes it and no other series has it.

    Examples
    --------
    >>> plain_key(("metrics", "train", "loss")), plain_key(("steps", "train", "loss"))
    ('train/loss', 'train/loss_step')
    >>> plain_key(("profile", "", "fit"))
    'profile/fit'
    """
    what, set_, name = series
    if what in ("metrics", "steps", "params", "tags"):
        what, suffix = "", "_step" if what == "steps" else ""
    else:
        suffix = ""
    return "/".join(part for part in (what, set_, name) if part) + suffix


def is_valid(key: str) -> bool:
    """Whether MLflow takes a key as it is."""
    return (
        len(key) <= MAX_KEY_LENGTH
        and _VALID.fullmatch(key) is not None
        and posixpath.normpath(key) == key
        and key not in (".", "..")
        and not key.startswith(("/", "../"))
    )


def _hashed(plain: str, series: SeriesId, taken: Collection[str]) -> str:
    """Readable form of a key with a hash of the series behind it."""
    readable = _REFUSED.sub("_", plain)[:200]
    parts = [part for part in readable.split("/") if part not in ("", ".", "..")]
    digest = hashlib.sha256(json.dumps(series).encode()).hexdigest()
    for length in range(8, len(digest)):
        key = "-".join(["/".join(parts) or "name", digest[:length]])
        if key not in taken:
            return key
    raise AssertionError(f"no free key for {series!r}")
